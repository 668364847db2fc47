"""Builds the optimiser from the config and the model's hints about its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler, get_default_optimizer_params
from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from contnet.modeling.backbone import backbone_prefix
from contnet.modeling.classifier import ImageClassifier
from contnet.utils.errors import UsageError

__all__ = [
    "OPTIMIZERS",
    "build_lr_scheduler",
    "build_optimizer",
    "matching_state",
    "parameter_names",
    "set_iteration",
]

OPTIMIZERS = ("SGD", "AdamW")


def _undecayed_names(model: nn.Module) -> set[str]:
    """Full names of the parameters that a module excludes from weight decay."""
    names = set()
    for prefix, module in model.named_modules():
        declare = getattr(module, "no_weight_decay", None)
        if callable(declare):
            names |= {f"{prefix}.{name}" if prefix else name for name in declare()}
    return names


def _vector_names(model: nn.Module) -> set[str]:
    """Names of the 1D parameters except biases, e.g. layer scales, which timm treats like norms."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 and not name.endswith(".bias")
    }


def _lr_factors(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Factors of the learning rate by full name; missing names have factor 1."""
    decay, multiplier = cfg.SOLVER.LAYER_DECAY, cfg.SOLVER.BACKBONE_MULTIPLIER
    if decay == multiplier == 1:
        return {}
    try:
        prefix = backbone_prefix(model)
    except ValueError as error:
        raise UsageError(
            f"SOLVER.LAYER_DECAY and SOLVER.BACKBONE_MULTIPLIER must be 1, for {error}"
        ) from error
    network = model.get_submodule(prefix.removesuffix("."))
    depth = dict.fromkeys((name for name, _ in network.named_parameters()), 0)
    if decay != 1:
        if not hasattr(network, "group_matcher"):
            raise UsageError(
                f"SOLVER.LAYER_DECAY is {decay}, but {type(network).__name__} has no layer "
                "groups (group_matcher): set it to 1"
            )
        depth = group_parameters(network, network.group_matcher(), reverse=True)
    deepest = max(depth.values())
    return {prefix + name: multiplier * decay ** (deepest - i) for name, i in depth.items()}


def _make_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Builds a parameter group for each pair of learning rate and weight decay."""
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    undecayed = _undecayed_names(model)
    # If WEIGHT_DECAY_NORM is None, norms have WEIGHT_DECAY.
    like_norms = isinstance(model, ImageClassifier) and solver.WEIGHT_DECAY_NORM is not None
    vectors = _vector_names(model) if like_norms else ()
    factors = _lr_factors(cfg, model)
    single = []
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            decay = solver.WEIGHT_DECAY_NORM if name in vectors else group["weight_decay"]
            single.append(
                {
                    "params": [parameter],
                    "param_names": [name],
                    "lr": group["lr"] * factors.get(name, 1.0),
                    "weight_decay": 0.0 if name in undecayed else decay,
                }
            )
    if not single:
        raise UsageError("all parameters of the model are frozen, there is nothing to train")
    return reduce_param_groups(single)


def parameter_names(cfg: CfgNode, model: nn.Module) -> list[list[str]]:
    """Parameter names in each group of the optimiser that a config describes."""
    return [group["param_names"] for group in _make_groups(cfg, model)]


def _clip_full_model(optimizer: Optimizer, max_norm: float, norm_type: float) -> None:
    """Clips the norm of all gradients before each step, after any unscaling."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_) -> None:
        clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Builds SGD or AdamW over the model's trainable parameters, with gradient clipping.

    Weight decay is Detectron2's (``WEIGHT_DECAY_NORM``, ``WEIGHT_DECAY_BIAS``), and 0 for the names
    in a module's ``no_weight_decay()``. In classifiers, all vectors except biases have the weight
    decay of norms, as in timm. Learning rates are Detectron2's, times ``BACKBONE_MULTIPLIER`` and
    ``LAYER_DECAY`` in the bottom-up network.

    Raises:
        UserError: if the optimiser is unknown, all parameters are frozen, or layer decay is set for
            a network without layer groups.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        kind = SGD
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    elif solver.OPTIMIZER == "AdamW":
        kind = AdamW
        options = {"betas": tuple(solver.ADAMW_BETAS)}
    else:
        raise UsageError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}, it must be one of {', '.join(OPTIMIZERS)}"
        )
    clip = solver.CLIP_GRADIENTS
    full_model = clip.ENABLED and clip.CLIP_TYPE == "full_model"
    if not full_model:
        kind = maybe_add_gradient_clipping(cfg, kind)
    optimizer = kind(_make_groups(cfg, model), lr=solver.BASE_LR, **options)
    if full_model:
        _clip_full_model(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Builds Detectron2's schedules or WarmupPolyLR, which are stepped once per iteration."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2_scheduler(cfg, optimizer)
    schedule = WarmupParamScheduler(
        PolynomialDecayParamScheduler(1.0, solver.POLY_POWER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)


# --- resuming ------------------------------------------------------------------------------------


def _states_by_name(state: Mapping, names: Sequence[Sequence[str]]) -> dict[str, dict]:
    """The optimiser state of each parameter, by name."""
    found = {}
    for group, known in zip(state["param_groups"], names, strict=True):
        for number, name in zip(group["params"], known, strict=True):
            values = state["state"].get(number, {})
            found[name] = {key: value for key, value in values.items() if value is not None}
    return found


def _fits(state: Mapping[str, object], parameter: Tensor) -> bool:
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return all(tensor.numel() == 1 or tensor.shape == parameter.shape for tensor in tensors)


def matching_state(
    optimizer: Optimizer, state: Mapping, names: Sequence[Sequence[str]]
) -> tuple[dict, list[str]]:
    """Adapts the state of an earlier optimiser to this one, which keeps its groups and settings.

    Args:
        optimizer: from :func:`build_optimizer`.
        state: state of the earlier optimiser of the same kind; its groups may differ.
        names: parameter names in each group of the earlier optimiser.

    Returns:
        A state for ``load_state_dict``, and the names of parameters that have no state although the
        others do.
    """
    states = _states_by_name(state, names)
    own = optimizer.state_dict()["param_groups"]
    matching, new = {}, []
    for group, numbers in zip(optimizer.param_groups, own, strict=True):
        if group.get("momentum") == 0:  # without momentum, there is no state to restore
            continue
        triples = zip(numbers["params"], group["param_names"], group["params"], strict=True)
        for number, name, parameter in triples:
            if (found := states.get(name)) and _fits(found, parameter):
                matching[number] = found
            elif found or name not in states or not state["state"]:
                new.append(name)
    return {"state": matching, "param_groups": own}, new


def set_iteration(scheduler: LRScheduler, iteration: int) -> None:
    """Sets a schedule, and so the learning rates of its optimiser, to an iteration."""
    scheduler.last_epoch = iteration
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate
