"""Checks of config values that need neither models nor data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from detectron2.config import CfgNode

from contnet.config.nodes import config_error, flatten, get_value

__all__ = ["REGISTER_FORM", "check_choice", "check_values", "is_number"]

REGISTER_FORM = (
    "it must be a list of [name, annotation file, image folder], such as "
    "[['mine', 'mine.json', 'images']], and for classification of [name, folder] or "
    "[name, label file .txt or .csv, folder]"
)
CHOICES = {
    "DATASETS.CHECK_IMAGES": ("first", "all", "none"),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "INPUT.CLASSIFIER.INTERPOLATION": ("bilinear", "bicubic", "random"),
    "INPUT.CLASSIFIER.INTERPOLATION_TEST": ("bilinear", "bicubic"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.AMP.DTYPE": ("float16", "bfloat16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "SOLVER.FLOAT32_PRECISION": ("", "tf32", "ieee"),
    # Detectron2's third schedule, WarmupStepWithFixedGammaLR, fails in its last iteration.
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupPolyLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}

# Smallest legal values of integers.
COUNTS = {
    "LOG_PERIOD": 1,
    "INPUT.CLASSIFIER.CROP_TEST": 1,
    "INPUT.CLASSIFIER.RESIZE_TEST": 1,
    "INPUT.CLASSIFIER.SIZE": 1,
    "INPUT.MAX_PIXELS": 0,
    "INPUT.MAX_SIZE_TEST": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MIN_SIZE_TEST": 0,
    "MODEL.CLASSIFIER.NUM_CLASSES": 1,
    "MODEL.FCOS.NUM_CLASSES": 1,
    "MODEL.FCOS.NUM_CONVS": 1,
    "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1,
    "MODEL.PSP_HEAD.AUX_CONVS_DIM": 1,
    "MODEL.RETINANET.NUM_CLASSES": 1,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 1,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 1,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 1,
    "DATALOADER.GROUP_SIZE": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.TIMEOUT": 0,
    "SOLVER.GRAD_ACCUM_STEPS": 1,
    "SOLVER.CHECKPOINTS_KEPT": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.AUG.MAX_SIZE": 1,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.IMS_PER_PROCESS": 1,
    "TEST.LOSS_PERIOD": 0,
    "TEST.PATIENCE": 0,
}

# Intervals as they are printed; a round bracket excludes the bound.
RANGES = {
    "DATASETS.CACHE_SIZE_GB": "[0, inf)",
    "INPUT.CLASSIFIER.COLOR_JITTER": "[0, 1]",
    "INPUT.CLASSIFIER.RANDOM_ERASING": "[0, 1]",
    "MODEL.CLASSIFIER.CUTMIX_ALPHA": "[0, inf)",
    "MODEL.CLASSIFIER.CUTMIX_PROB": "[0, 1]",
    "MODEL.CLASSIFIER.DROP_PATH_RATE": "[0, 1)",
    "MODEL.CLASSIFIER.LABEL_SMOOTHING": "[0, 1)",
    "MODEL.CLASSIFIER.MIXUP_ALPHA": "[0, inf)",
    "MODEL.CLASSIFIER.MIX_PROB": "[0, 1]",
    "MODEL.CONTNET.DROP_PATH_RATE": "[0, 1)",
    "MODEL.FCOS.CENTER_SAMPLING_RADIUS": "[0, inf)",
    "MODEL.FCOS.FOCAL_LOSS_ALPHA": "[0, 1]",
    "MODEL.FCOS.FOCAL_LOSS_GAMMA": "[0, inf)",
    "MODEL.FCOS.NMS_THRESH_TEST": "[0, 1]",
    "MODEL.FCOS.PRIOR_PROB": "(0, 1)",
    "MODEL.FCOS.SCORE_THRESH_TEST": "[0, 1]",
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": "(0, 1]",
    "MODEL.PSP_HEAD.AUX_LOSS_WEIGHT": "[0, inf)",
    "MODEL.PSP_HEAD.DROPOUT": "[0, 1)",
    "MODEL.RETINANET.NMS_THRESH_TEST": "[0, 1]",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "[0, 1]",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "[0, 1]",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": "[0, 1]",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "[0, 1]",
    "MODEL.RPN.NMS_THRESH": "[0, 1]",
    "MODEL.RPN.POSITIVE_FRACTION": "[0, 1]",
    "SOLVER.BACKBONE_MULTIPLIER": "(0, inf)",
    "SOLVER.BASE_LR": "(0, inf)",
    "SOLVER.BASE_LR_END": "[0, inf)",
    "SOLVER.BIAS_LR_FACTOR": "[0, inf)",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "(0, inf)",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "(0, inf]",
    "SOLVER.CHECKPOINT_PERIOD_EPOCHS": "[0, inf)",
    "SOLVER.COMPILE_MEMORY_BUDGET": "(0, 1]",
    "SOLVER.EMA.DECAY": "(0, 1)",
    "SOLVER.GAMMA": "(0, inf)",
    "SOLVER.LAYER_DECAY": "(0, 1]",
    "SOLVER.MAX_EPOCHS": "[0, inf)",
    "SOLVER.MOMENTUM": "[0, 1)",
    "SOLVER.POLY_POWER": "(0, inf)",
    "SOLVER.WARMUP_EPOCHS": "[0, inf)",
    "SOLVER.WARMUP_FACTOR": "[0, inf)",
    "SOLVER.WEIGHT_DECAY": "[0, inf)",
    "TEST.EVAL_PERIOD_EPOCHS": "[0, inf)",
    "TEST.LOSS_PERIOD_EPOCHS": "[0, inf)",
}


def is_number(value: object) -> bool:
    """Whether a config value is a number, and not NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def check_choice(cfg: CfgNode, key: str, legal: Iterable) -> None:
    """Raises UserError unless a key has one of the legal values."""
    legal = list(legal)
    if (value := get_value(cfg, key)) not in legal:
        names = ", ".join(str(each) or "''" for each in legal)
        raise config_error(f"{key} is {value!r}, it must be one of {names}")


def _numbers(value: object) -> Iterator[float]:
    """Yields the floats in a value, also those in lists."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers(each)


def _check_finite(cfg: CfgNode) -> None:
    """Raises UserError for NaN and infinity in keys without a range, also of extensions."""
    for key, value in flatten(cfg, cfg):
        if key not in RANGES and not all(map(math.isfinite, _numbers(value))):
            raise config_error(f"{key} is {value!r}, it must be finite")


def _check_numbers(cfg: CfgNode) -> None:
    for key, least in COUNTS.items():
        value = get_value(cfg, key)
        if not isinstance(value, int) or value < least:
            raise config_error(f"{key} is {value!r}, it must be a whole number from {least}")
    for key, interval in RANGES.items():
        value = get_value(cfg, key)
        low, high = map(float, interval[1:-1].split(","))
        inside = is_number(value) and (
            low < value < high
            or (value == low and interval[0] == "[")
            or (value == high and interval[-1] == "]")
        )
        if not inside:
            raise config_error(f"{key} is {value!r}, it must be in {interval}")


def _check_sizes(cfg: CfgNode) -> None:
    node = cfg.INPUT
    sizes = node.MIN_SIZE_TRAIN
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise config_error(f"INPUT.MIN_SIZE_TRAIN is {sizes!r}, it must be whole numbers from 1")
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        raise config_error(
            f"INPUT.MIN_SIZE_TRAIN is {sizes!r}, INPUT.MIN_SIZE_TRAIN_SAMPLING range takes the "
            "smallest and the largest"
        )
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        raise config_error(
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must have the same length, they have "
            f"{len(cfg.MODEL.PIXEL_MEAN)} and {len(cfg.MODEL.PIXEL_STD)} values"
        )
    if not all(is_number(each) and each > 0 for each in cfg.MODEL.PIXEL_STD):
        raise config_error(f"MODEL.PIXEL_STD is {cfg.MODEL.PIXEL_STD!r}, it must be above 0")


def _check_windows(cfg: CfgNode) -> None:
    window = cfg.TEST.SLIDING_WINDOW
    for key in ("SIZE", "STRIDE"):
        if len(window[key]) != 2 or not all(isinstance(n, int) and n > 0 for n in window[key]):
            raise config_error(
                f"TEST.SLIDING_WINDOW.{key} is {window[key]!r}, it must be a height and a width"
            )
    if any(step > side for step, side in zip(window.STRIDE, window.SIZE, strict=True)):
        raise config_error(
            f"TEST.SLIDING_WINDOW.STRIDE {window.STRIDE!r} exceeds SIZE {window.SIZE!r}: windows "
            "would leave gaps"
        )


def _check_end(cfg: CfgNode) -> None:
    """Checks iterations against SOLVER.MAX_ITER, once epochs have been converted into them."""
    solver = cfg.SOLVER
    if solver.MAX_EPOCHS or solver.STEPS_EPOCHS or solver.WARMUP_EPOCHS:
        return
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and solver.MAX_ITER in solver.STEPS:
        raise config_error(
            f"SOLVER.STEPS {solver.STEPS!r} has SOLVER.MAX_ITER {solver.MAX_ITER}: a step at the "
            "end does nothing, remove it"
        )
    if solver.RESCALE_INTERVAL and not 0 < solver.WARMUP_ITERS < solver.MAX_ITER:
        raise config_error(
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, with SOLVER.RESCALE_INTERVAL it must "
            f"be from 1 to below SOLVER.MAX_ITER {solver.MAX_ITER}"
        )
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR" and solver.WARMUP_ITERS >= solver.MAX_ITER:
        raise config_error(
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is not below SOLVER.MAX_ITER "
            f"{solver.MAX_ITER}: {solver.LR_SCHEDULER_NAME} would warm up to its final rate, lower "
            "it"
        )


def _check_solver(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE < 0 or (
        solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE
    ):
        raise config_error(
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE}, it must divide "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, or be 0"
        )
    if solver.IMS_PER_BATCH % solver.GRAD_ACCUM_STEPS:
        raise config_error(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not a multiple of "
            f"SOLVER.GRAD_ACCUM_STEPS {solver.GRAD_ACCUM_STEPS}, it counts the images of all passes"
        )
    betas = solver.ADAMW_BETAS
    if len(betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise config_error(f"SOLVER.ADAMW_BETAS is {betas!r}, it must be two numbers in [0, 1)")
    steps = list(solver.STEPS)
    if not all(isinstance(step, int) for step in steps) or steps != sorted(set(steps)):
        raise config_error(f"SOLVER.STEPS is {solver.STEPS!r}, it must be rising iterations")
    if solver.NESTEROV and solver.MOMENTUM == 0:
        raise config_error("SOLVER.NESTEROV needs a SOLVER.MOMENTUM above 0")
    if solver.BASE_LR_END > solver.BASE_LR:
        raise config_error(
            f"SOLVER.BASE_LR_END {solver.BASE_LR_END} is above SOLVER.BASE_LR {solver.BASE_LR}"
        )


def _check_patience(cfg: CfgNode) -> None:
    test = cfg.TEST
    if test.PATIENCE and not (test.EVAL_PERIOD or test.EVAL_PERIOD_EPOCHS):
        raise config_error(
            f"TEST.PATIENCE is {test.PATIENCE}, which does nothing without evaluations in "
            "training: set TEST.EVAL_PERIOD"
        )


def _check_epochs(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    steps, end = list(solver.STEPS_EPOCHS), solver.MAX_EPOCHS
    rising = all(is_number(step) and 0 < step < math.inf for step in steps)
    if not rising or steps != sorted(set(steps)):
        raise config_error(
            f"SOLVER.STEPS_EPOCHS is {solver.STEPS_EPOCHS!r}, it must be rising numbers above 0"
        )
    if end and steps and steps[-1] >= end:
        raise config_error(
            f"SOLVER.STEPS_EPOCHS {solver.STEPS_EPOCHS!r} is not below SOLVER.MAX_EPOCHS {end:g}"
        )
    if 0 < end <= solver.WARMUP_EPOCHS:
        raise config_error(
            f"SOLVER.WARMUP_EPOCHS {solver.WARMUP_EPOCHS:g} is not below SOLVER.MAX_EPOCHS {end:g}"
        )


def _check_register(cfg: CfgNode) -> None:
    names = []
    for entry in cfg.DATASETS.REGISTER:
        parts = list(entry) if isinstance(entry, (list, tuple)) else []
        if len(parts) not in (2, 3) or not all(isinstance(p, str) and p for p in parts):
            raise config_error(f"DATASETS.REGISTER has {entry!r}, {REGISTER_FORM}")
        names.append(parts[0])
    if double := [name for name in names if names.count(name) > 1]:
        raise config_error(f"DATASETS.REGISTER has the name {double[0]!r} twice")


def _check_dataset_names(cfg: CfgNode) -> None:
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        value = get_value(cfg, key)
        if not isinstance(value, (list, tuple)) or not all(isinstance(n, str) for n in value):
            raise config_error(f"{key} is {value!r}, it must be a list of names of data sets")


def check_values(cfg: CfgNode) -> None:
    """Checks values beyond their types; may be called again after changes.

    Values that only a model can judge are checked in preflight.

    Raises:
        UserError: for the first illegal value, with its key and the legal values.
    """
    for key, legal in CHOICES.items():
        check_choice(cfg, key, legal)
    _check_numbers(cfg)
    _check_finite(cfg)
    _check_sizes(cfg)
    _check_windows(cfg)
    _check_solver(cfg)
    _check_epochs(cfg)
    _check_patience(cfg)
    _check_end(cfg)
    _check_dataset_names(cfg)
    _check_register(cfg)
