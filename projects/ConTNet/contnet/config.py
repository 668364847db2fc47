"""The configuration: our keys on top of Detectron2's, strict loading, and checks of the values."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import timm
import yaml
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

from contnet.data.augmentation import build_classification_transform
from contnet.data.imagenet_labels import LABEL_ENDINGS
from contnet.engine.tta import tta_class
from contnet.errors import UserError
from contnet.modeling.backbone import BOTTOM_UPS, NORMS, TOP_BLOCKS
from contnet.modeling.classifier import OPTION_KEYS
from contnet.modeling.contnet import FEATURES, OUTPUT_STRIDES, TAPS, VARIANTS
from contnet.modeling.fcos import BOX_LOSSES, CENTERNESS_BRANCHES
from contnet.modeling.pspnet import SEGMENTORS

__all__ = ["add_contnet_config", "is_set", "load_config", "validate"]

CHOICES = {
    "MODEL.CONTNET.VARIANT": tuple(VARIANTS),
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


def add_contnet_config(cfg: CfgNode) -> None:
    """Adds this project's keys, with defaults that leave Detectron2's behaviour as it is."""
    # The network. Options are those of the published code; False and "stage" are what it ships.
    cfg.MODEL.CONTNET = CfgNode()
    # contnet_ti, contnet_s, contnet_m or contnet_b.
    cfg.MODEL.CONTNET.VARIANT = "contnet_m"
    # Relative position biases (True) or absolute position tables.
    cfg.MODEL.CONTNET.RELATIVE = False
    # Normalise before attention and MLP (True) or after their residual sums.
    cfg.MODEL.CONTNET.PRE_NORM = False
    # Average-pool in the down-sampling shortcuts.
    cfg.MODEL.CONTNET.USE_AVGDOWN = False
    # Give the query, key and value projections a bias.
    cfg.MODEL.CONTNET.QKV_BIAS = True
    # Where res2 to res4 are taken. "stage": the last block at stride 1, twice the stage's channels;
    # "pre": before the down-sampling convolution, the stage's channels.
    cfg.MODEL.CONTNET.TAPS = "stage"
    # Some of res2, res3, res4, res5. Stages after the last one are not built.
    cfg.MODEL.CONTNET.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Norm of the blocks: BN, FrozenBN, SyncBN or GN.
    cfg.MODEL.CONTNET.NORM = "FrozenBN"
    # Freeze the first parts: 0 none, 1 the stem, 2 the stem and stage 1, up to 5 all of it.
    cfg.MODEL.CONTNET.FREEZE_AT = 0
    # Stride of res5: 32, 16 or 8. Below 32 the last stages keep their resolution and dilate.
    cfg.MODEL.CONTNET.OUTPUT_STRIDE = 32
    # Dilate patches as convolutions, so that weights keep their meaning (docs/network.md).
    cfg.MODEL.CONTNET.DILATED_PATCHES = True
    # Dropout in the encoders of stages 3 and 4, in [0, 1); -1: the variant's own (B 0.1, others 0).
    cfg.MODEL.CONTNET.DROP_RATE = -1.0
    # Dropout after the very last block, in [0, 1); -1: the variant's own (B 0.2, others 0).
    cfg.MODEL.CONTNET.LAST_DROP_RATE = -1.0
    # Stochastic depth of the last block, in [0, 1), rising linearly from 0 at the first.
    cfg.MODEL.CONTNET.DROP_PATH_RATE = 0.0
    # Activation checkpointing: compute each block again in the backward pass, to save memory.
    cfg.MODEL.CONTNET.CHECKPOINT = False

    # Stride of res5 of build_dilated_resnet_backbone: 32, 16 or 8.
    cfg.MODEL.RESNETS.OUTPUT_STRIDE = 32

    # FCOS. The defaults are the improved form (Detectron2's); plain FCOS differs in four keys.
    cfg.MODEL.FCOS = CfgNode()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions in each tower, MODEL.FPN.OUT_CHANNELS wide, and their norm.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # A place is positive within this many strides of the object's centre; 0: anywhere in its box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Distances to the box's sides in strides (True), or in pixels as exp(scale * x) with a learned
    # scale per level.
    cfg.MODEL.FCOS.NORMALIZE_BOX = True
    # giou, or iou: -log(IoU) weighted by centre-ness.
    cfg.MODEL.FCOS.BOX_LOSS = "giou"
    # The tower that predicts centre-ness: regression or classification.
    cfg.MODEL.FCOS.CENTERNESS_ON = "regression"
    # Focal loss; and the score that all places start from.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Of sqrt(class score * centre-ness), in [0, 1].
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Per level, before suppression at this IoU.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # PSPHead, beside MODEL.SEM_SEG_HEAD: IN_FEATURES are the auxiliary and the main feature,
    # CONVS_DIM is the main classifier's width. Sides of the pooled maps.
    cfg.MODEL.PSP_HEAD = CfgNode()
    cfg.MODEL.PSP_HEAD.BINS = [1, 2, 3, 6]
    # Of whole channels before each classifier, in [0, 1).
    cfg.MODEL.PSP_HEAD.DROPOUT = 0.1
    # Of the auxiliary classifier; a weight of 0 leaves it out.
    cfg.MODEL.PSP_HEAD.AUX_CONVS_DIM = 256
    cfg.MODEL.PSP_HEAD.AUX_LOSS_WEIGHT = 0.4

    # ImageClassifier. A ConTNet takes its options from MODEL.CONTNET (RELATIVE to QKV_BIAS, the
    # drop rates and CHECKPOINT; the others are refused, they would do nothing); any other model
    # that timm can build has timm's defaults.
    cfg.MODEL.CLASSIFIER = CfgNode()
    # contnet_ti, contnet_s, contnet_m, contnet_b, or a model of timm, as resnet50.
    cfg.MODEL.CLASSIFIER.NAME = "contnet_m"
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # For timm's models: stochastic depth, in [0, 1), and other arguments of timm.create_model, as
    # [[dynamic_img_size, True]].
    cfg.MODEL.CLASSIFIER.DROP_PATH_RATE = 0.0
    cfg.MODEL.CLASSIFIER.OPTIONS = []
    # Of the target that goes to all classes alike, in [0, 1).
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Mix pairs of images and of their labels, by blending (mixup) or by pasting a box (CutMix):
    # parameter of the Beta distribution that the share is drawn from; 0: never.
    cfg.MODEL.CLASSIFIER.MIXUP_ALPHA = 0.0
    cfg.MODEL.CLASSIFIER.CUTMIX_ALPHA = 0.0
    # Share of batches that are mixed; and of those, where both are on, by CutMix. In [0, 1].
    cfg.MODEL.CLASSIFIER.MIX_PROB = 1.0
    cfg.MODEL.CLASSIFIER.CUTMIX_PROB = 0.5
    # Keep images and convolutions in channels-last order, which GPUs with tensor cores prefer.
    cfg.MODEL.CLASSIFIER.CHANNELS_LAST = False

    # False: loading MODEL.WEIGHTS must give every tensor of the backbone. True: it need not.
    cfg.MODEL.ALLOW_MISSING_WEIGHTS = False

    # SGD (MOMENTUM, NESTEROV) or AdamW (ADAMW_BETAS).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Decay of AdamW's two running means, each in [0, 1).
    cfg.SOLVER.ADAMW_BETAS = (0.9, 0.999)
    # Factor of the learning rate from each layer group of the backbone to the one before it, in
    # (0, 1]; the last group and everything outside the backbone have the full rate.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Factor of the learning rate of the whole bottom-up network, above 0.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # value or norm: Detectron2's, each parameter's gradient on its own. full_model: scale all
    # gradients so that their common norm (of NORM_TYPE) is at most CLIP_VALUE.
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    # Forward and backward passes per optimiser step. SOLVER.IMS_PER_BATCH stays the number of
    # images per optimiser step, over all processes and passes.
    cfg.SOLVER.ACCUMULATE = 1
    # Keep an exponential moving average of the weights and evaluate it.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    # What stays of the average at each optimiser step, in (0, 1).
    cfg.SOLVER.EMA.DECAY = 0.9999
    # float16 (with loss scaling) or bfloat16, where SOLVER.AMP.ENABLED.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Most recent checkpoints that stay on disk, besides model_final.
    cfg.SOLVER.CHECKPOINTS_KEPT = 3
    # True: the training waits only until a checkpoint is copied in memory, and goes on while it is
    # written; the main process needs host memory of the file's size (with a GPU up to twice that).
    # False: the training waits until it is on the disk.
    cfg.SOLVER.CHECKPOINT_BACKGROUND = True

    # Power of WarmupPolyLR: the rate falls as (1 - iteration / MAX_ITER)^power.
    cfg.SOLVER.POLY_POWER = 0.9

    # Images of ImageClassifier. Training crops a part of this share and aspect ratio, SIZE x SIZE
    # pixels after resizing.
    cfg.INPUT.CLASSIFIER = CfgNode()
    cfg.INPUT.CLASSIFIER.SIZE = 224
    cfg.INPUT.CLASSIFIER.SCALE = [0.08, 1.0]
    cfg.INPUT.CLASSIFIER.RATIO = [0.75, 4 / 3]
    # How training images are resized: bilinear, bicubic, or random (one of them for each image).
    cfg.INPUT.CLASSIFIER.INTERPOLATION = "bicubic"
    # timm's policies: "" for none, rand-m9-mstd0.5-inc1 (RandAugment), original (AutoAugment), ...
    cfg.INPUT.CLASSIFIER.AUTO_AUGMENT = ""
    # Change of brightness, contrast and saturation, in [0, 1]; not together with AUTO_AUGMENT.
    cfg.INPUT.CLASSIFIER.COLOR_JITTER = 0.0
    # Share of images that lose a random box to noise, in [0, 1].
    cfg.INPUT.CLASSIFIER.RANDOM_ERASING = 0.0
    # Test: shorter side after resizing, and side of the centre crop, in pixels.
    cfg.INPUT.CLASSIFIER.RESIZE_TEST = 256
    cfg.INPUT.CLASSIFIER.CROP_TEST = 224
    # bilinear or bicubic.
    cfg.INPUT.CLASSIFIER.INTERPOLATION_TEST = "bicubic"

    # For semantic segmentation: largest share of a crop that one class may fill, in (0, 1]; other
    # crops are drawn again, up to ten times.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # WindowSegmentor: average the logits of windows instead of looking at the whole image at once.
    # SIZE and STRIDE are height and width in pixels of the network's input.
    cfg.TEST.SLIDING_WINDOW = CfgNode()
    cfg.TEST.SLIDING_WINDOW.ENABLED = False
    cfg.TEST.SLIDING_WINDOW.SIZE = [512, 1024]
    cfg.TEST.SLIDING_WINDOW.STRIDE = [341, 683]
    # Data sets of your own. In COCO's format: [name, annotation file, image folder]. To classify
    # images: [name, folder] for class folders or shards, and [name, label file, folder] for images
    # in one folder, where the label file ends with .txt or .csv. The names are then as good as
    # built-in ones in TRAIN and TEST. Relative paths start in the folder where the command is
    # typed. On the command line: DATASETS.REGISTER "[['mine', 'mine.json', 'images']]"
    # If the first set of a run is one of these, the model's number of classes is that of its
    # file or folder, unless the config file itself (not its _BASE_) or the command line sets it.
    cfg.DATASETS.REGISTER = []
    # Folder where annotations are kept once they have been read, for other processes and later
    # starts (docs/data.md). "auto": $XDG_CACHE_HOME/contnet, or ~/.cache/contnet. "": none, each
    # process reads them anew.
    cfg.DATASETS.CACHE_DIR = "auto"
    # The metric whose highest value marks model_best.pth, as metrics.json names it (bbox/AP50).
    # "": the main one of the first data set: segm/AP with masks, else bbox/AP, or the semantic IoU.
    cfg.TEST.BEST_METRIC = ""

    # Images per process and forward pass of ImageClassifier's evaluation.
    cfg.TEST.IMS_PER_PROCESS = 64

    # Iterations between two lines of progress.
    cfg.LOG_PERIOD = 20


def _flatten(node: Mapping, like: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Keys with dots and values of nested mappings, as deep as ``like`` goes."""
    for key, value in node.items():
        below = like.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            yield from _flatten(value, below, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _get(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _user_error(message: str) -> UserError:
    return UserError(" ".join(message.split()))


def _nearest(word: str, words: Sequence[str]) -> str:
    """The word that is most like it; among keys, the last part counts most."""
    upper = {name.upper(): name for name in words}
    if near := difflib.get_close_matches(word.upper(), upper, n=1, cutoff=0.0):
        return upper[near[0]]
    return words[0]


def _read_yaml(config_file: str) -> dict:
    """The content of a config file merged over its ``_BASE_``."""
    if not config_file:
        raise UserError("no config file is given, give one of configs/ with --config-file")
    if not os.path.isfile(config_file):
        raise _user_error(f"the config file {config_file} does not exist")
    try:
        content = CfgNode.load_yaml_with_base(config_file, allow_unsafe=False)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else config_file
        problem = getattr(error, "problem", None) or str(error)
        hint = "write plain values" if "tag:" in problem else "mend the yaml there"
        raise _user_error(f"{place}: {problem}; {hint}") from error
    except RecursionError as error:
        raise _user_error(f"{config_file}: its _BASE_ includes itself") from error
    except UnicodeDecodeError as error:
        raise _user_error(f"{config_file} or its _BASE_ is no UTF-8 text") from error
    except OSError as error:
        name = error.filename or error
        raise _user_error(
            f"{config_file}: cannot read its _BASE_ {name}: {error.strerror or 'no such file'}"
        ) from error
    except (AssertionError, AttributeError, TypeError) as error:
        reason = str(error) if isinstance(error, AssertionError) else "must hold KEY: value lines"
        raise _user_error(f"{config_file}, with its _BASE_: {reason}") from error
    if not isinstance(content, dict):
        raise _user_error(f"{config_file} holds {content!r}, it must hold KEY: value lines")
    if content.get("VERSION", 2) != 2:
        raise _user_error(f"{config_file} has VERSION {content['VERSION']!r}, only 2 can be read")
    return content


def _assign(cfg: CfgNode, key: str, value: object, where: str) -> None:
    """Sets one key, its value decoded as Detectron2 does it, or raises UserError."""
    known = dict(_flatten(cfg, cfg))
    if key not in known:
        parents = {name.rpartition(".")[0] for name in known}
        if key in parents:
            raise _user_error(f"{where}: {key} is a group of keys, it has no value of its own")
        raise _user_error(
            f"{where}: there is no key {key}, the nearest is {_nearest(key, list(known))}"
        )
    default = known[key]
    attempts = [value]
    if isinstance(default, float) and not isinstance(value, bool):
        attempts.append(_as_float(value))
    if isinstance(default, str) and isinstance(value, str):
        attempts.append(repr(value))
    for attempt in attempts:
        try:
            cfg.merge_from_list([key, attempt])
        except (ValueError, TypeError, SyntaxError, AssertionError, MemoryError, RecursionError):
            continue
        # yacs takes None for anything; among keys with a default it means something for floats
        # alone (SOLVER.WEIGHT_DECAY_NORM), and the others have their ranges.
        if _get(cfg, key) is not None or default is None or isinstance(default, float):
            return
    kind = type(default).__name__
    raise _user_error(f"{where}: {key} is {value!r}, it must be of type {kind}, as {default!r}")


def _as_float(value: object) -> object:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return value


def _pairs(opts: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Keys and values of an override list.

    Raises:
        UserError: for one that is not KEY VALUE KEY VALUE.
    """
    form = "write KEY VALUE pairs, as SOLVER.BASE_LR 0.01"
    for key in opts[::2]:
        if "=" in str(key):
            raise _user_error(f"overrides: {key!r} is one word, {form}")
        if not isinstance(key, str) or key.startswith("-"):
            raise _user_error(f"overrides: {key!r} stands where a key should, {form}")
    if len(opts) % 2:
        raise _user_error(f"overrides: {opts[-1]!r} has no value, {form}")
    return zip(opts[::2], opts[1::2], strict=True)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _check_choices(cfg: CfgNode) -> None:
    choices = {
        **CHOICES,
        **{key: [name for name, _ in registry] for key, registry in PARTS.items()},
    }
    for key, _ in _flatten(cfg, cfg):
        if key.endswith(".NORM"):
            choices.setdefault(key, PART_NORMS)
    if not cfg.MODEL.ROI_BOX_HEAD.NAME:  # Detectron2's default, for heads that need none
        del choices["MODEL.ROI_BOX_HEAD.NAME"]
    for key, legal in choices.items():
        if (value := _get(cfg, key)) not in legal:
            names = ", ".join(str(each) or "''" for each in legal)
            raise _user_error(f"{key} is {value!r}, it must be one of {names}")


def _check_numbers(cfg: CfgNode) -> None:
    for key, least in COUNTS.items():
        value = _get(cfg, key)
        if not isinstance(value, int) or value < least:
            raise _user_error(f"{key} is {value!r}, it must be a whole number from {least}")
    for key, interval in RANGES.items():
        value = _get(cfg, key)
        low, high = map(float, interval[1:-1].split(","))
        inside = _is_number(value) and (
            low < value < high
            or (value == low and interval[0] == "[")
            or (value == high and interval[-1] == "]")
        )
        if not inside:
            raise _user_error(f"{key} is {value!r}, it must be in {interval}")


def _check_network(cfg: CfgNode) -> None:
    node = cfg.MODEL.CONTNET
    for key in ("DROP_RATE", "LAST_DROP_RATE"):
        if not _is_number(node[key]) or not (node[key] == -1 or 0 <= node[key] < 1):
            raise _user_error(
                f"MODEL.CONTNET.{key} is {node[key]!r}, it must be in [0, 1), or -1 for the "
                "variant's own"
            )
    if node.FREEZE_AT not in range(len(FEATURES) + 2):
        raise _user_error(f"MODEL.CONTNET.FREEZE_AT is {node.FREEZE_AT!r}, it must be 0 to 5")
    names = node.OUT_FEATURES
    if not names or not set(names) <= set(FEATURES) or len(set(names)) < len(names):
        raise _user_error(
            f"MODEL.CONTNET.OUT_FEATURES is {names!r}, it must be some of {', '.join(FEATURES)}"
        )
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        raise _user_error(
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be of one length, they have "
            f"{len(cfg.MODEL.PIXEL_MEAN)} and {len(cfg.MODEL.PIXEL_STD)} values"
        )


def _check_sizes(cfg: CfgNode) -> None:
    node = cfg.INPUT
    sizes = node.MIN_SIZE_TRAIN
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise _user_error(f"INPUT.MIN_SIZE_TRAIN is {sizes!r}, it must be whole numbers from 1")
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        raise _user_error(
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
    given = list(_get(cfg, key))
    wanted = list(cfg.MODEL.FPN.IN_FEATURES)
    if not wanted or wanted != list(FEATURES[-len(wanted) :]):
        raise _user_error(
            f"MODEL.FPN.IN_FEATURES is {wanted!r}, it must be the last of {', '.join(FEATURES)}, "
            "in this order"
        )
    if missing := [name for name in wanted if name not in given]:
        raise _user_error(
            f"MODEL.FPN.IN_FEATURES has {missing[0]!r}, which {key} {given!r} does not give"
        )


def _check_fcos(cfg: CfgNode) -> None:
    width = cfg.MODEL.FPN.OUT_CHANNELS
    grouped = cfg.MODEL.META_ARCHITECTURE == "FCOS" and cfg.MODEL.FCOS.NORM == "GN"
    # With one channel a group, a map of one pixel has no variance.
    if grouped and (width % 32 or width < 64):
        raise _user_error(
            f"MODEL.FPN.OUT_CHANNELS is {width}, with MODEL.FCOS.NORM GN it must be a multiple of "
            "32 from 64"
        )


def _check_segmentation(cfg: CfgNode) -> None:
    window = cfg.TEST.SLIDING_WINDOW
    for key in ("SIZE", "STRIDE"):
        if len(window[key]) != 2 or not all(isinstance(n, int) and n > 0 for n in window[key]):
            raise _user_error(
                f"TEST.SLIDING_WINDOW.{key} is {window[key]!r}, it must be a height and a width"
            )
    if any(step > side for step, side in zip(window.STRIDE, window.SIZE, strict=True)):
        raise _user_error(
            f"TEST.SLIDING_WINDOW.STRIDE {window.STRIDE!r} exceeds SIZE {window.SIZE!r}: windows "
            "would leave gaps"
        )
    if cfg.MODEL.META_ARCHITECTURE not in SEGMENTORS:
        return
    head = cfg.MODEL.SEM_SEG_HEAD
    if head.NAME == "PSPHead" and len(head.IN_FEATURES) != 2:
        raise _user_error(
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
    unused += [key for key, _ in _flatten(cfg, cfg) if key.startswith(_DETECTOR_KEYS)]
    for key in unused:
        # None of its layers are frozen, whatever the default says.
        idle = 0 if key == "MODEL.BACKBONE.FREEZE_AT" else _get(_defaults(), key)
        if (value := _get(cfg, key)) != idle and key not in _BASE_KEYS:
            raise _user_error(
                f"{key} is {value!r}, which does nothing to the classifier {name}: set it "
                f"{idle!r}{_INSTEAD.get(key, '')}"
            )


def _check_classifier(cfg: CfgNode) -> None:
    if cfg.MODEL.META_ARCHITECTURE != "ImageClassifier":
        return
    node, images = cfg.MODEL.CLASSIFIER, cfg.INPUT.CLASSIFIER
    if not timm.is_model(node.NAME):
        raise _user_error(
            f"MODEL.CLASSIFIER.NAME is {node.NAME!r}, which timm does not have, the nearest is "
            f"{_nearest(node.NAME, timm.list_models())}"
        )
    if node.NAME in VARIANTS and (node.OPTIONS or node.DROP_PATH_RATE):
        raise _user_error(
            "MODEL.CLASSIFIER.OPTIONS and DROP_PATH_RATE are for timm's models: "
            f"{node.NAME} takes its options from MODEL.CONTNET"
        )
    _check_unused(cfg)
    for entry in node.OPTIONS:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            raise _user_error(
                f"MODEL.CLASSIFIER.OPTIONS has {entry!r}, it must be a list of [name, value], as "
                "[['dynamic_img_size', True]]"
            )
    if cfg.INPUT.FORMAT != "RGB":
        raise _user_error(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, ImageClassifier takes RGB")
    if images.CROP_TEST > images.RESIZE_TEST:
        raise _user_error(
            f"INPUT.CLASSIFIER.CROP_TEST {images.CROP_TEST} exceeds RESIZE_TEST "
            f"{images.RESIZE_TEST}: crops would have borders"
        )
    if images.AUTO_AUGMENT and images.COLOR_JITTER:
        raise _user_error(
            f"INPUT.CLASSIFIER.COLOR_JITTER is {images.COLOR_JITTER}, which does nothing with "
            f'AUTO_AUGMENT {images.AUTO_AUGMENT!r}: set one of them 0.0 or ""'
        )
    for key in ("SCALE", "RATIO"):
        pair = images[key]
        if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 < pair[0] <= pair[1]:
            raise _user_error(
                f"INPUT.CLASSIFIER.{key} is {pair!r}, it must be the least and the greatest"
            )
    try:
        build_classification_transform(cfg, is_train=True)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise _user_error(
            f"INPUT.CLASSIFIER.AUTO_AUGMENT is {images.AUTO_AUGMENT!r}, which timm cannot read "
            f"({error}): write rand-m9-mstd0.5-inc1, original, or another of its policies"
        ) from error


def _check_solver(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE < 0 or (
        solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE
    ):
        raise _user_error(
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE}, it must divide "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, or be 0"
        )
    if solver.IMS_PER_BATCH % solver.ACCUMULATE:
        raise _user_error(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is no multiple of SOLVER.ACCUMULATE "
            f"{solver.ACCUMULATE}, it counts the images of all passes"
        )
    betas = solver.ADAMW_BETAS
    if len(betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise _user_error(f"SOLVER.ADAMW_BETAS is {betas!r}, it must be two numbers in [0, 1)")
    steps = list(solver.STEPS)
    if not all(isinstance(step, int) for step in steps) or steps != sorted(set(steps)):
        raise _user_error(f"SOLVER.STEPS is {solver.STEPS!r}, it must be rising iterations")
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and solver.MAX_ITER in steps:
        raise _user_error(
            f"SOLVER.STEPS {solver.STEPS!r} has SOLVER.MAX_ITER {solver.MAX_ITER}: a step at the "
            "end does nothing, leave it out"
        )
    if solver.RESCALE_INTERVAL and not 0 < solver.WARMUP_ITERS < solver.MAX_ITER:
        raise _user_error(
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, with SOLVER.RESCALE_INTERVAL it must "
            f"be from 1 to below SOLVER.MAX_ITER {solver.MAX_ITER}"
        )
    if solver.NESTEROV and solver.MOMENTUM == 0:
        raise _user_error("SOLVER.NESTEROV needs a SOLVER.MOMENTUM above 0")
    if solver.BASE_LR_END > solver.BASE_LR:
        raise _user_error(
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
            raise _user_error(
                f"DATASETS.REGISTER has {entry!r}, it must be a list of [name, annotation file, "
                "image folder], as [['mine', 'mine.json', 'images']], and for classification of "
                "[name, folder] or [name, label file .txt or .csv, folder]"
            )
        names.append(parts[0])
    if double := [name for name in names if names.count(name) > 1]:
        raise _user_error(f"DATASETS.REGISTER has the name {double[0]!r} twice")


def _check_tta(cfg: CfgNode) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    architecture = cfg.MODEL.META_ARCHITECTURE
    if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS or tta_class(architecture) is None:
        raise _user_error(
            f"TEST.AUG.ENABLED: there is no test-time augmentation for {architecture} (nor with "
            "MODEL.KEYPOINT_ON or MODEL.LOAD_PROPOSALS), set it False"
        )
    sizes = cfg.TEST.AUG.MIN_SIZES
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise _user_error(f"TEST.AUG.MIN_SIZES is {sizes!r}, it must be whole numbers from 1")


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


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def is_set(key: str, config_file: str, opts: Sequence[str]) -> bool:
    """Whether a config file itself, not its ``_BASE_``, or the overrides give a key.

    Args:
        key: with dots.
        config_file: one that :func:`load_config` has read.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``.
    """
    if key in opts[::2]:
        return True
    with open(config_file, encoding="utf-8") as file:
        node = yaml.safe_load(file)
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _substitute_sync_bn(cfg: CfgNode) -> None:
    """SyncBN needs GPUs; on the CPU Detectron2's slower one takes its place, with equal keys."""
    if cfg.MODEL.DEVICE != "cpu":
        return
    for key, value in list(_flatten(cfg, cfg)):
        if key.endswith(".NORM") and value == "SyncBN":
            cfg.merge_from_list([key, "naiveSyncBN"])


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config file and overrides into a full config, checked and not frozen.

    On the CPU, SyncBN becomes "naiveSyncBN", which any backend can run.

    Args:
        config_file: a yaml file, with ``_BASE_`` to build on another; read without Python tags.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]``.

    Returns:
        The config, with absolute paths in DATASETS.REGISTER.

    Raises:
        UserError: for a file that cannot be read, an unknown key, a value of a wrong type or an
            illegal one, and overrides that are no pairs.
    """
    cfg = get_cfg()
    add_contnet_config(cfg)
    for key, value in _flatten(_read_yaml(config_file), cfg):
        _assign(cfg, key, value, config_file)
    for key, value in _pairs(list(opts)):
        _assign(cfg, key, value, "overrides")
    validate(cfg)
    cfg.DATASETS.REGISTER = [
        [name, *map(_absolute, paths)] for name, *paths in cfg.DATASETS.REGISTER
    ]
    _substitute_sync_bn(cfg)
    return cfg
