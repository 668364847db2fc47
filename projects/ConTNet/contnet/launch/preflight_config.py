"""Checks config values that depend on models: names of parts, and options of networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import timm
from detectron2.config import CfgNode
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

import contnet.modeling.build  # noqa: F401, fills the registries
from contnet.config import load_config, parse_config
from contnet.config.keys import default_config
from contnet.config.nodes import config_error, flatten, get_value
from contnet.config.values import check_choice, is_number
from contnet.data.pipeline.loader import TRAIN_SAMPLERS
from contnet.data.pipeline.transforms import build_classification_transform
from contnet.engine.optimizer import OPTIMIZERS
from contnet.engine.trackers import TRACKERS
from contnet.modeling.backbone import NORMS
from contnet.modeling.build import ATTENTION_KERNELS
from contnet.modeling.classifier import OPTION_KEYS, classifier_name
from contnet.modeling.contnet import (
    FEATURES,
    GRAD_CHECKPOINTING_MODES,
    OUTPUT_STRIDES,
    TAPS,
    VARIANTS,
)
from contnet.modeling.fcos import BOX_LOSSES, CENTERNESS_BRANCHES
from contnet.modeling.fpn import BOTTOM_UPS, bottom_up_name, requires_res5
from contnet.modeling.pspnet import SEGMENTORS
from contnet.modeling.tta import tta_class
from contnet.utils.text import nearest

__all__ = ["check_model_config", "load_checked_config", "parse_checked_config"]

CHOICES = {
    "MODEL.CONTNET.VARIANT": tuple(VARIANTS),
    "MODEL.CONTNET.GRAD_CHECKPOINTING": GRAD_CHECKPOINTING_MODES,
    "MODEL.CONTNET.SDPA": ("auto", *ATTENTION_KERNELS),
    "MODEL.CONTNET.TAPS": TAPS,
    "MODEL.CONTNET.NORM": NORMS,
    "MODEL.CONTNET.OUTPUT_STRIDE": OUTPUT_STRIDES,
    "MODEL.RESNETS.OUTPUT_STRIDE": OUTPUT_STRIDES,
    "MODEL.FCOS.BOX_LOSS": BOX_LOSSES,
    "MODEL.FCOS.CENTERNESS_ON": CENTERNESS_BRANCHES,
    "DATALOADER.SAMPLER_TRAIN": TRAIN_SAMPLERS,
    "SOLVER.OPTIMIZER": OPTIMIZERS,
}

# Registries in which builders look up the values of these keys.
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

# Names of norms in Detectron2, for all parts of a model except ConTNet.
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

# Prefixes of keys that an ImageClassifier does not use, besides some keys of MODEL.CONTNET.
_DETECTOR_KEYS = (
    "MODEL.BACKBONE.",
    "MODEL.MASK_ON",
    "MODEL.RESNETS.",
    "INPUT.CROP.",
    "INPUT.MAX_SIZE_",
    "INPUT.MIN_SIZE_",
)
# Unused keys that are allowed, because configs/Base.yaml sets them for all models.
_BASE_KEYS = ("MODEL.RESNETS.OUT_FEATURES", "MODEL.RESNETS.STRIDE_IN_1X1")
# Hints at the keys to use instead of some of these.
_INSTEAD = {
    "INPUT.MIN_SIZE_TEST": " (INPUT.CLASSIFIER.RESIZE_TEST and CROP_TEST are the sizes)",
    "INPUT.MIN_SIZE_TRAIN": " (INPUT.CLASSIFIER.SIZE is the size)",
    "MODEL.BACKBONE.NAME": " (MODEL.CLASSIFIER.NAME chooses the network)",
    "MODEL.CONTNET.VARIANT": " (MODEL.CLASSIFIER.NAME chooses the network)",
    "MODEL.RESNETS.DEPTH": " (MODEL.CLASSIFIER.NAME chooses the network)",
}


def _check_choices(cfg: CfgNode) -> None:
    for key, legal in CHOICES.items():
        check_choice(cfg, key, legal)
    for key, registry in PARTS.items():
        # Detectron2's default is an empty name, for models without a box head.
        if key != "MODEL.ROI_BOX_HEAD.NAME" or get_value(cfg, key):
            check_choice(cfg, key, (name for name, _ in registry))
    for key, _ in flatten(cfg, cfg):
        if key.endswith(".NORM") and key not in CHOICES:
            check_choice(cfg, key, PART_NORMS)


def _check_network(cfg: CfgNode) -> None:
    node = cfg.MODEL.CONTNET
    for key in ("DROP_RATE", "LAST_DROP_RATE"):
        if not is_number(node[key]) or not (node[key] == -1 or 0 <= node[key] < 1):
            raise config_error(
                f"MODEL.CONTNET.{key} is {node[key]!r}, it must be in [0, 1), or -1 for the "
                "variant's default"
            )
    if node.FREEZE_AT not in range(len(FEATURES) + 2):
        raise config_error(f"MODEL.CONTNET.FREEZE_AT is {node.FREEZE_AT!r}, it must be 0 to 5")
    names = node.OUT_FEATURES
    if not names or not set(names) <= set(FEATURES) or len(set(names)) < len(names):
        raise config_error(
            f"MODEL.CONTNET.OUT_FEATURES is {names!r}, it must be some of {', '.join(FEATURES)}"
        )


# Number of levels of a pyramid's top block, by the prefix of its name.
_ADDED_LEVELS = {"": 1, "retinanet_": 2, "fcos_": 2}
# The parts of a meta-architecture that read levels of the pyramid.
_USERS_OF_LEVELS = {
    "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
    "RetinaNet": ("RETINANET",),
    "FCOS": ("FCOS",),
}


def _check_pyramid(cfg: CfgNode) -> None:
    builder = cfg.MODEL.BACKBONE.NAME
    bottom_up = bottom_up_name(builder)
    if bottom_up not in BOTTOM_UPS or not builder.endswith("_fpn_backbone"):
        return
    key = BOTTOM_UPS[bottom_up].out_features_key
    given = list(get_value(cfg, key) if key else FEATURES)
    wanted = list(cfg.MODEL.FPN.IN_FEATURES)
    if not wanted or ", ".join(wanted) not in ", ".join(FEATURES):
        raise config_error(
            f"MODEL.FPN.IN_FEATURES is {wanted!r}, it must be one or several of "
            f"{', '.join(FEATURES)}, in this order and without gaps"
        )
    if wanted[-1] != "res5" and requires_res5(builder):
        raise config_error(f"MODEL.FPN.IN_FEATURES is {wanted!r}, {builder} requires res5")
    if missing := [name for name in wanted if name not in given]:
        raise config_error(
            f"MODEL.FPN.IN_FEATURES has {missing[0]!r}, which {key} {given!r} does not include"
        )
    prefix = builder.removeprefix("build_").removesuffix(f"{bottom_up}_fpn_backbone")
    if prefix in _ADDED_LEVELS:
        last = int(wanted[-1][-1]) + _ADDED_LEVELS[prefix]
        levels = [f"p{number}" for number in range(int(wanted[0][-1]), last + 1)]
        for user in _USERS_OF_LEVELS.get(cfg.MODEL.META_ARCHITECTURE, ()):
            if missing := [level for level in cfg.MODEL[user].IN_FEATURES if level not in levels]:
                raise config_error(
                    f"MODEL.{user}.IN_FEATURES has {missing[0]!r}, but with MODEL.FPN.IN_FEATURES "
                    f"{wanted!r} the pyramid has {', '.join(levels)}"
                )


def _check_fcos(cfg: CfgNode) -> None:
    width = cfg.MODEL.FPN.OUT_CHANNELS
    grouped = cfg.MODEL.META_ARCHITECTURE == "FCOS" and cfg.MODEL.FCOS.NORM == "GN"
    # With one channel per group, a map of one pixel has no variance.
    if grouped and (width % 32 or width < 64):
        raise config_error(
            f"MODEL.FPN.OUT_CHANNELS is {width}, with MODEL.FCOS.NORM GN it must be a multiple of "
            "32, at least 64"
        )


def _check_segmentation(cfg: CfgNode) -> None:
    if cfg.MODEL.META_ARCHITECTURE not in SEGMENTORS:
        return
    head = cfg.MODEL.SEM_SEG_HEAD
    if head.NAME == "PSPHead" and len(head.IN_FEATURES) != 2:
        raise config_error(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {head.IN_FEATURES!r}, PSPHead requires two: the "
            "auxiliary classifier's and the main one"
        )


# Options of timm.create_model that make it load or download weights.
_OPTIONS_OF_WEIGHTS = ("cache_dir", "checkpoint_path", "pretrained")


@lru_cache(maxsize=1)
def _defaults() -> CfgNode:
    return default_config()


def _check_unused(cfg: CfgNode) -> None:
    """Rejects settings of detectors in a classifier's config, where they have no effect."""
    name = cfg.MODEL.CLASSIFIER.NAME
    used = OPTION_KEYS if classifier_name(cfg) in VARIANTS else ()
    unused = [f"MODEL.CONTNET.{key}" for key in cfg.MODEL.CONTNET if key not in used]
    unused += [key for key, _ in flatten(cfg, cfg) if key.startswith(_DETECTOR_KEYS)]
    for key in unused:
        # A classifier freezes no layers, so FREEZE_AT must be 0, which is not the default.
        idle = 0 if key == "MODEL.BACKBONE.FREEZE_AT" else get_value(_defaults(), key)
        if (value := get_value(cfg, key)) != idle and key not in _BASE_KEYS:
            raise config_error(
                f"{key} is {value!r}, which has no effect on the classifier {name}: set it "
                f"{idle!r}{_INSTEAD.get(key, '')}"
            )


def _check_classifier(cfg: CfgNode) -> None:
    if cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        return
    node, images = cfg.MODEL.CLASSIFIER, cfg.INPUT.CLASSIFIER
    if not timm.is_model(node.NAME):
        raise config_error(
            f"MODEL.CLASSIFIER.NAME is {node.NAME!r}, which timm does not have; the nearest is "
            f"{nearest(node.NAME, timm.list_models())}"
        )
    if classifier_name(cfg) in VARIANTS and (node.OPTIONS or node.DROP_PATH_RATE):
        raise config_error(
            "MODEL.CLASSIFIER.OPTIONS and DROP_PATH_RATE are for timm's models: "
            f"{node.NAME} takes its options from MODEL.CONTNET"
        )
    _check_unused(cfg)
    for entry in node.OPTIONS:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            raise config_error(
                f"MODEL.CLASSIFIER.OPTIONS has {entry!r}, it must be a list of [name, value], such "
                "as [['dynamic_img_size', True]]"
            )
        if entry[0].startswith(_OPTIONS_OF_WEIGHTS):
            raise config_error(
                f"MODEL.CLASSIFIER.OPTIONS has {entry[0]}: weights are set by MODEL.WEIGHTS, "
                "for example MODEL.WEIGHTS timm://resnet50.tv_in1k"
            )
    if cfg.INPUT.FORMAT != "RGB":
        raise config_error(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, ImageClassifier requires RGB")
    if images.CROP_TEST > images.RESIZE_TEST:
        raise config_error(
            f"INPUT.CLASSIFIER.CROP_TEST {images.CROP_TEST} exceeds RESIZE_TEST "
            f"{images.RESIZE_TEST}: crops would have borders"
        )
    if images.AUTO_AUGMENT and images.COLOR_JITTER:
        raise config_error(
            f"INPUT.CLASSIFIER.COLOR_JITTER is {images.COLOR_JITTER}, which has no effect with "
            f'AUTO_AUGMENT {images.AUTO_AUGMENT!r}: set the one to 0.0 or the other to ""'
        )
    for key in ("SCALE", "RATIO"):
        pair = images[key]
        if len(pair) != 2 or not all(map(is_number, pair)) or not 0 < pair[0] <= pair[1]:
            raise config_error(f"INPUT.CLASSIFIER.{key} is {pair!r}, it must be [least, greatest]")
    try:
        build_classification_transform(cfg, is_train=True)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise config_error(
            f"INPUT.CLASSIFIER.AUTO_AUGMENT is {images.AUTO_AUGMENT!r}, which timm cannot read "
            f"({error}): use rand-m9-mstd0.5-inc1, original, or another of its policies"
        ) from error


def _check_tta(cfg: CfgNode) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    architecture = cfg.MODEL.META_ARCHITECTURE
    if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS or tta_class(architecture) is None:
        raise config_error(
            f"TEST.AUG.ENABLED: there is no test-time augmentation for {architecture} (nor with "
            "MODEL.KEYPOINT_ON or MODEL.LOAD_PROPOSALS), set it to False"
        )
    sizes = cfg.TEST.AUG.MIN_SIZES
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise config_error(f"TEST.AUG.MIN_SIZES is {sizes!r}, it must be whole numbers from 1")


def _check_proposals(cfg: CfgNode) -> None:
    for key in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        if cfg.DATASETS[key]:
            raise config_error(
                f"DATASETS.{key}: Detectron2 would run any code in these files, so they are not "
                "supported: register a data set whose records have proposal_boxes"
            )


def _check_trackers(cfg: CfgNode) -> None:
    names = list(cfg.TRACKERS)
    if not set(names) <= set(TRACKERS) or len(set(names)) < len(names):
        raise config_error(
            f"TRACKERS is {names!r}, it must be some of {', '.join(TRACKERS)}, or []"
        )


def check_model_config(cfg: CfgNode) -> None:
    """Checks values that depend on the available models and their options.

    Args:
        cfg: from :func:`contnet.config.load_config`.

    Raises:
        UserError: for the first illegal value, with its key and the legal values.
    """
    _check_choices(cfg)
    _check_network(cfg)
    _check_pyramid(cfg)
    _check_fcos(cfg)
    _check_segmentation(cfg)
    _check_classifier(cfg)
    _check_proposals(cfg)
    _check_tta(cfg)
    _check_trackers(cfg)


def load_checked_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config file and overrides, and checks everything that does not require data.

    The arguments and errors are those of :func:`contnet.config.load_config`.

    Returns:
        The config, not frozen.
    """
    cfg = load_config(config_file, opts)
    check_model_config(cfg)
    return cfg


def parse_checked_config(text: str, where: str) -> CfgNode:
    """Like :func:`load_checked_config`, for a config from a weight file.

    The arguments and errors are those of :func:`contnet.config.parse_config`.
    """
    cfg = parse_config(text, where)
    check_model_config(cfg)
    return cfg
