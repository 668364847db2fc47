"""Workarounds for bugs and noisy warnings of our dependencies.

tests/modeling/test_compat.py fails when the pinned libraries no longer need one of them. Nothing
here is applied on import: entry points call :func:`silence_known_warnings`, and scripts call it
before their other imports, because importing Detectron2 already warns.
"""

import logging
import warnings
from types import ModuleType

import numpy as np
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contnet.utils.errors import UserError
from contnet.utils.failures import explain_failure, lost_contact

__all__ = [
    "KNOWN_WARNINGS",
    "fix_gradient_order",
    "restore_in1d",
    "silence_known_warnings",
    "use_plain_focal_loss",
]

# (category, start of the message as a regular expression, where it comes from)
KNOWN_WARNINGS: tuple[tuple[type[Warning], str, str], ...] = (
    (
        FutureWarning,
        r"`torch\.jit\.script` is deprecated\. Please switch to `torch\.compile`",
        "import of fvcore.nn.focal_loss and detectron2.modeling.box_regression, which script code",
    ),
    (
        UserWarning,
        r"torch\.meshgrid: in an upcoming release, it will be required to pass the indexing",
        "detectron2.modeling.anchor_generator, first grid of anchors",
    ),
    (
        FutureWarning,
        r"`broadcast_buffers` is deprecated\. Use `forward_sync_buffers`",
        "detectron2.engine.create_ddp_model, which knows no other way, with several processes",
    ),
    (
        UserWarning,
        r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",
        "PyTorch, when the float16 loss scaler skips the first step to lower its scale, rightly",
    ),
    (
        UserWarning,
        r"Detected pickle protocol \d+ in the checkpoint, which was not the default",
        "torch.load of a plain pickle, which it then reads as safely, or refuses",
    ),
)


class _NoKnownTracebacks(logging.Filter):
    """Drops Detectron2's traceback in the training loop for errors that we log in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        known = isinstance(error, UserError) or (error and explain_failure(error))
        return not (known or (error and lost_contact(error)))


class _NoTracingAdvice(logging.Filter):
    """Drops PyTorch's advice about tracing, which Detectron2's RoI pooler triggers at each call."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("is_fx_tracing will return true for both")


class _NoTermination(logging.Filter):
    """Drops the lines about terminating other processes after a failure, which we log ourselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Terminating process")


# Filters by the names of the loggers whose lines they drop.
_LOG_FILTERS: dict[str, type[logging.Filter]] = {
    "detectron2.engine.train_loop": _NoKnownTracebacks,
    "torch.fx._symbolic_trace": _NoTracingAdvice,
    "torch.multiprocessing.spawn": _NoTermination,
}


def silence_known_warnings() -> None:
    """Silences exactly the warnings in ``KNOWN_WARNINGS``, and three kinds of log lines."""
    for category, message, _ in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    for name, kind in _LOG_FILTERS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, kind) for each in logger.filters):
            logger.addFilter(kind())


def restore_in1d(module: ModuleType) -> None:
    """Gives one module the function ``np.in1d``, which cityscapesscripts calls and numpy 2.4 lacks.

    Args:
        module: a module that imports numpy as ``np``; numpy itself does not change.
    """
    stand_in = ModuleType("numpy")
    stand_in.__dict__.update(vars(np), in1d=np.isin)
    module.np = stand_in


def fix_gradient_order(model: nn.Module) -> None:
    """Makes DistributedDataParallel arrange its gradient buckets now, not after its first step.

    With more than two processes, the order in which a gradient is summed depends on its position in
    the buckets, so a resumed run, whose first step is a later one, would differ in the last bits.
    Gradients are then exchanged late. This is only for processes on the CPU, which cannot overlap
    communication and computation anyway.
    """
    if isinstance(model, DistributedDataParallel):
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()


def use_plain_focal_loss() -> None:
    """Makes Detectron2's dense detectors use the focal loss without TorchScript.

    A scripted function is optimised after its first calls and then rounds differently, so a resumed
    run would differ from an uninterrupted one in the last bits.
    """
    from detectron2.modeling.meta_arch import fcos, retinanet
    from fvcore.nn import sigmoid_focal_loss

    fcos.sigmoid_focal_loss_jit = retinanet.sigmoid_focal_loss_jit = sigmoid_focal_loss
