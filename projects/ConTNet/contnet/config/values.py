"""Checks of what the types of config values alone do not settle."""

from __future__ import annotations

import math
from functools import lru_cache

import timm
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)

from contnet.config.keys import add_contnet_config
from contnet.config.nodes import flatten, get_value, nearest, one_line
from contnet.data.datasets.imagenet_labels import LABEL_ENDINGS
from contnet.data.pipeline.transforms import build_classification_transform
from contnet.modeling.backbone import BOTTOM_UPS, NORMS, TOP_BLOCKS
from contnet.modeling.classifier import OPTION_KEYS
from contnet.modeling.contnet import CHECKPOINTS, FEATURES, OUTPUT_STRIDES, TAPS, VARIANTS
from contnet.modeling.fcos import BOX_LOSSES, CENTERNESS_BRANCHES
from contnet.modeling.pspnet import SEGMENTORS
from contnet.modeling.tta import tta_class

__all__ = ["validate"]

CHOICES = {
    "MODEL.CONTNET.VARIANT": tuple(VARIANTS),
    "MODEL.CONTNET.CHECKPOINT": CHECKPOINTS,
    "MODEL.CONTNET.TAPS": TAPS,
    "MODEL.CONTNET.NORM": NORMS,
    "MODEL.CONTNET.OUTPUT_STRIDE": OUTPUT_STRIDES,
    "MODEL.RESNETS.OUTPUT_STRIDE": OUTPUT_STRIDES,
    "MODEL.FCOS.BOX_LOSS": BOX_LOSSES,
    "MODEL.FCOS.CENTERNESS_ON": CENTERNESS_BRANCHES,
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "INPUT.CLASSIFIER.INTERPOLATION": ("bilinear", "bicubic", "random"),
    "INPUT.CLASSIFIER.INTERPOLATION_TEST": ("bilinear", "bicubic"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.AMP.DTYPE": ("float16", "bfloat16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    # Detectron2's third schedule, WarmupStepWithFixedGammaLR, fails in its last iteration.
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupPolyLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}

# Names that builders look up.
PARTS = {
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}

# What Detectron2 makes norms of, in all parts but ConTNet.
PART_NORMS = (
    "",
    "BN",
    "FrozenBN",
    "SyncBN",
    "nnSyncBN",
    "naiveSyncBN",
    "naiveSyncBN_N",
    "GN",
    "LN",
)

# What an ImageClassifier makes no use of, beside some keys of MODEL.CONTNET: starts of keys.
_DETECTOR_KEYS = (
    "MODEL.BACKBONE.",
    "MODEL.MASK_ON",
    "MODEL.RESNETS.",
    "INPUT.CROP.",
    "INPUT.MAX_SIZE_",
    "INPUT.MIN_SIZE_",
)
# Of these, what configs/Base.yaml sets for all models.
_BASE_KEYS = ("MODEL.RESNETS.OUT_FEATURES", "MODEL.RESNETS.STRIDE_IN_1X1")
# What does what somebody may have meant by some of these.
_INSTEAD = {
    "INPUT.MIN_SIZE_TEST": " (INPUT.CLASSIFIER.RESIZE_TEST and CROP_TEST are the sizes)",
    "INPUT.MIN_SIZE_TRAIN": " (INPUT.CLASSIFIER.SIZE is the size)",
    "MODEL.BACKBONE.NAME": " (MODEL.CLASSIFIER.NAME chooses the network)",
    "MODEL.CONTNET.VARIANT": " (MODEL.CLASSIFIER.NAME chooses the network)",
    "MODEL.RESNETS.DEPTH": " (MODEL.CLASSIFIER.NAME chooses the network)",
}

# Least legal value of whole numbers.
COUNTS = {
    "LOG_PERIOD": 1,
    "INPUT.CLASSIFIER.CROP_TEST": 1,
    "INPUT.CLASSIFIER.RESIZE_TEST": 1,
    "INPUT.CLASSIFIER.SIZE": 1,
    "MODEL.CLASSIFIER.NUM_CLASSES": 1,
    "MODEL.FCOS.NUM_CLASSES": 1,
    "MODEL.FCOS.NUM_CONVS": 1,
    "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1,
    "MODEL.PSP_HEAD.AUX_CONVS_DIM": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.ACCUMULATE": 1,
    "SOLVER.CHECKPOINTS_KEPT": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.AUG.MAX_SIZE": 1,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.IMS_PER_PROCESS": 1,
}

# Intervals as they are printed; a round bracket leaves the bound out.
RANGES = {
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
    "SOLVER.BACKBONE_MULTIPLIER": "(0, inf)",
    "SOLVER.BASE_LR": "(0, inf)",
    "SOLVER.BASE_LR_END": "[0, inf)",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "(0, inf)",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "(0, inf]",
    "SOLVER.EMA.DECAY": "(0, 1)",
    "SOLVER.LAYER_DECAY": "(0, 1]",
    "SOLVER.MOMENTUM": "[0, 1)",
    "SOLVER.POLY_POWER": "(0, inf)",
    "SOLVER.WEIGHT_DECAY": "[0, inf)",
}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _check_choices(cfg: CfgNode) -> None:
    choices = {
        **CHOICES,
        **{key: [name for name, _ in registry] for key, registry in PARTS.items()},
    }
    for key, _ in flatten(cfg, cfg):
        if key.endswith(".NORM"):
            choices.setdefault(key, PART_NORMS)
    if not cfg.MODEL.ROI_BOX_HEAD.NAME:  # Detectron2's default, for heads that need none
        del choices["MODEL.ROI_BOX_HEAD.NAME"]
    for key, legal in choices.items():
        if (value := get_value(cfg, key)) not in legal:
            names = ", ".join(str(each) or "''" for each in legal)
            raise one_line(f"{key} is {value!r}, it must be one of {names}")


def _check_numbers(cfg: CfgNode) -> None:
    for key, least in COUNTS.items():
        value = get_value(cfg, key)
        if not isinstance(value, int) or value < least:
            raise one_line(f"{key} is {value!r}, it must be a whole number from {least}")
    for key, interval in RANGES.items():
        value = get_value(cfg, key)
        low, high = map(float, interval[1:-1].split(","))
        inside = _is_number(value) and (
            low < value < high
            or (value == low and interval[0] == "[")
            or (value == high and interval[-1] == "]")
        )
        if not inside:
            raise one_line(f"{key} is {value!r}, it must be in {interval}")


def _check_network(cfg: CfgNode) -> None:
    node = cfg.MODEL.CONTNET
    for key in ("DROP_RATE", "LAST_DROP_RATE"):
        if not _is_number(node[key]) or not (node[key] == -1 or 0 <= node[key] < 1):
            raise one_line(
                f"MODEL.CONTNET.{key} is {node[key]!r}, it must be in [0, 1), or -1 for the "
                "variant's own"
            )
    if node.FREEZE_AT not in range(len(FEATURES) + 2):
        raise one_line(f"MODEL.CONTNET.FREEZE_AT is {node.FREEZE_AT!r}, it must be 0 to 5")
    names = node.OUT_FEATURES
    if not names or not set(names) <= set(FEATURES) or len(set(names)) < len(names):
        raise one_line(
            f"MODEL.CONTNET.OUT_FEATURES is {names!r}, it must be some of {', '.join(FEATURES)}"
        )
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        raise one_line(
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be of one length, they have "
            f"{len(cfg.MODEL.PIXEL_MEAN)} and {len(cfg.MODEL.PIXEL_STD)} values"
        )


def _check_sizes(cfg: CfgNode) -> None:
    node = cfg.INPUT
    sizes = node.MIN_SIZE_TRAIN
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise one_line(f"INPUT.MIN_SIZE_TRAIN is {sizes!r}, it must be whole numbers from 1")
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        raise one_line(
            f"INPUT.MIN_SIZE_TRAIN is {sizes!r}, INPUT.MIN_SIZE_TRAIN_SAMPLING range takes the "
            "least and the greatest"
        )


def _check_pyramid(cfg: CfgNode) -> None:
    bottom_ups = {
        f"build_{prefix}{name}_fpn_backbone": name for prefix in TOP_BLOCKS for name in BOTTOM_UPS
    }
    bottom_up = bottom_ups.get(cfg.MODEL.BACKBONE.NAME)
    if bottom_up is None:
        return
    key = {"contnet": "MODEL.CONTNET", "resnet": "MODEL.RESNETS"}[bottom_up] + ".OUT_FEATURES"
    given = list(get_value(cfg, key))
    wanted = list(cfg.MODEL.FPN.IN_FEATURES)
    if not wanted or wanted != list(FEATURES[-len(wanted) :]):
        raise one_line(
            f"MODEL.FPN.IN_FEATURES is {wanted!r}, it must be the last of {', '.join(FEATURES)}, "
            "in this order"
        )
    if missing := [name for name in wanted if name not in given]:
        raise one_line(
            f"MODEL.FPN.IN_FEATURES has {missing[0]!r}, which {key} {given!r} does not give"
        )


def _check_fcos(cfg: CfgNode) -> None:
    width = cfg.MODEL.FPN.OUT_CHANNELS
    grouped = cfg.MODEL.META_ARCHITECTURE == "FCOS" and cfg.MODEL.FCOS.NORM == "GN"
    # With one channel a group, a map of one pixel has no variance.
    if grouped and (width % 32 or width < 64):
        raise one_line(
            f"MODEL.FPN.OUT_CHANNELS is {width}, with MODEL.FCOS.NORM GN it must be a multiple of "
            "32 from 64"
        )


def _check_segmentation(cfg: CfgNode) -> None:
    window = cfg.TEST.SLIDING_WINDOW
    for key in ("SIZE", "STRIDE"):
        if len(window[key]) != 2 or not all(isinstance(n, int) and n > 0 for n in window[key]):
            raise one_line(
                f"TEST.SLIDING_WINDOW.{key} is {window[key]!r}, it must be a height and a width"
            )
    if any(step > side for step, side in zip(window.STRIDE, window.SIZE, strict=True)):
        raise one_line(
            f"TEST.SLIDING_WINDOW.STRIDE {window.STRIDE!r} exceeds SIZE {window.SIZE!r}: windows "
            "would leave gaps"
        )
    if cfg.MODEL.META_ARCHITECTURE not in SEGMENTORS:
        return
    head = cfg.MODEL.SEM_SEG_HEAD
    if head.NAME == "PSPHead" and len(head.IN_FEATURES) != 2:
        raise one_line(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {head.IN_FEATURES!r}, PSPHead takes two: the "
            "auxiliary classifier's and the main one"
        )


@lru_cache(maxsize=1)
def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_contnet_config(cfg)
    return cfg


def _check_unused(cfg: CfgNode) -> None:
    """Refuses settings of detectors in a classifier's config, where they would do nothing."""
    name = cfg.MODEL.CLASSIFIER.NAME
    used = OPTION_KEYS if name in VARIANTS else ()
    unused = [f"MODEL.CONTNET.{key}" for key in cfg.MODEL.CONTNET if key not in used]
    unused += [key for key, _ in flatten(cfg, cfg) if key.startswith(_DETECTOR_KEYS)]
    for key in unused:
        # None of its layers are frozen, whatever the default says.
        idle = 0 if key == "MODEL.BACKBONE.FREEZE_AT" else get_value(_defaults(), key)
        if (value := get_value(cfg, key)) != idle and key not in _BASE_KEYS:
            raise one_line(
                f"{key} is {value!r}, which does nothing to the classifier {name}: set it "
                f"{idle!r}{_INSTEAD.get(key, '')}"
            )


def _check_classifier(cfg: CfgNode) -> None:
    if cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        return
    node, images = cfg.MODEL.CLASSIFIER, cfg.INPUT.CLASSIFIER
    if not timm.is_model(node.NAME):
        raise one_line(
            f"MODEL.CLASSIFIER.NAME is {node.NAME!r}, which timm does not have, the nearest is "
            f"{nearest(node.NAME, timm.list_models())}"
        )
    if node.NAME in VARIANTS and (node.OPTIONS or node.DROP_PATH_RATE):
        raise one_line(
            "MODEL.CLASSIFIER.OPTIONS and DROP_PATH_RATE are for timm's models: "
            f"{node.NAME} takes its options from MODEL.CONTNET"
        )
    _check_unused(cfg)
    for entry in node.OPTIONS:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            raise one_line(
                f"MODEL.CLASSIFIER.OPTIONS has {entry!r}, it must be a list of [name, value], as "
                "[['dynamic_img_size', True]]"
            )
    if cfg.INPUT.FORMAT != "RGB":
        raise one_line(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, ImageClassifier takes RGB")
    if images.CROP_TEST > images.RESIZE_TEST:
        raise one_line(
            f"INPUT.CLASSIFIER.CROP_TEST {images.CROP_TEST} exceeds RESIZE_TEST "
            f"{images.RESIZE_TEST}: crops would have borders"
        )
    if images.AUTO_AUGMENT and images.COLOR_JITTER:
        raise one_line(
            f"INPUT.CLASSIFIER.COLOR_JITTER is {images.COLOR_JITTER}, which does nothing with "
            f'AUTO_AUGMENT {images.AUTO_AUGMENT!r}: set one of them 0.0 or ""'
        )
    for key in ("SCALE", "RATIO"):
        pair = images[key]
        if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 < pair[0] <= pair[1]:
            raise one_line(
                f"INPUT.CLASSIFIER.{key} is {pair!r}, it must be the least and the greatest"
            )
    try:
        build_classification_transform(cfg, is_train=True)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise one_line(
            f"INPUT.CLASSIFIER.AUTO_AUGMENT is {images.AUTO_AUGMENT!r}, which timm cannot read "
            f"({error}): write rand-m9-mstd0.5-inc1, original, or another of its policies"
        ) from error


def _check_solver(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE < 0 or (
        solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE
    ):
        raise one_line(
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE}, it must divide "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, or be 0"
        )
    if solver.IMS_PER_BATCH % solver.ACCUMULATE:
        raise one_line(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is no multiple of SOLVER.ACCUMULATE "
            f"{solver.ACCUMULATE}, it counts the images of all passes"
        )
    betas = solver.ADAMW_BETAS
    if len(betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise one_line(f"SOLVER.ADAMW_BETAS is {betas!r}, it must be two numbers in [0, 1)")
    steps = list(solver.STEPS)
    if not all(isinstance(step, int) for step in steps) or steps != sorted(set(steps)):
        raise one_line(f"SOLVER.STEPS is {solver.STEPS!r}, it must be rising iterations")
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and solver.MAX_ITER in steps:
        raise one_line(
            f"SOLVER.STEPS {solver.STEPS!r} has SOLVER.MAX_ITER {solver.MAX_ITER}: a step at the "
            "end does nothing, leave it out"
        )
    if solver.RESCALE_INTERVAL and not 0 < solver.WARMUP_ITERS < solver.MAX_ITER:
        raise one_line(
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, with SOLVER.RESCALE_INTERVAL it must "
            f"be from 1 to below SOLVER.MAX_ITER {solver.MAX_ITER}"
        )
    if solver.NESTEROV and solver.MOMENTUM == 0:
        raise one_line("SOLVER.NESTEROV needs a SOLVER.MOMENTUM above 0")
    if solver.BASE_LR_END > solver.BASE_LR:
        raise one_line(
            f"SOLVER.BASE_LR_END {solver.BASE_LR_END} is above SOLVER.BASE_LR {solver.BASE_LR}"
        )


def _check_register(cfg: CfgNode) -> None:
    names = []
    for entry in cfg.DATASETS.REGISTER:
        parts = list(entry) if isinstance(entry, (list, tuple)) else []
        if not all(isinstance(part, str) and part for part in parts):
            parts = []
        is_folder = len(parts) == 2 and not parts[1].lower().endswith((".json", *LABEL_ENDINGS))
        if len(parts) != 3 and not is_folder:
            raise one_line(
                f"DATASETS.REGISTER has {entry!r}, it must be a list of [name, annotation file, "
                "image folder], as [['mine', 'mine.json', 'images']], and for classification of "
                "[name, folder] or [name, label file .txt or .csv, folder]"
            )
        names.append(parts[0])
    if double := [name for name in names if names.count(name) > 1]:
        raise one_line(f"DATASETS.REGISTER has the name {double[0]!r} twice")


def _check_tta(cfg: CfgNode) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    architecture = cfg.MODEL.META_ARCHITECTURE
    if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS or tta_class(architecture) is None:
        raise one_line(
            f"TEST.AUG.ENABLED: there is no test-time augmentation for {architecture} (nor with "
            "MODEL.KEYPOINT_ON or MODEL.LOAD_PROPOSALS), set it False"
        )
    sizes = cfg.TEST.AUG.MIN_SIZES
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise one_line(f"TEST.AUG.MIN_SIZES is {sizes!r}, it must be whole numbers from 1")


def validate(cfg: CfgNode) -> None:
    """Checks values that types alone do not settle; may be called again after changes.

    Raises:
        UserError: for the first illegal value, naming its key and what is legal.
    """
    _check_choices(cfg)
    _check_numbers(cfg)
    _check_network(cfg)
    _check_sizes(cfg)
    _check_pyramid(cfg)
    _check_fcos(cfg)
    _check_segmentation(cfg)
    _check_classifier(cfg)
    _check_solver(cfg)
    _check_tta(cfg)
    _check_register(cfg)
