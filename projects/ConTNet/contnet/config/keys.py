"""Our config keys on top of Detectron2's, each with its legal values and its unit.

The comment right above a key is its help in ``tools/configs.py explain``.
"""

from __future__ import annotations

from detectron2.config import CfgNode, get_cfg

__all__ = ["MAX_PIXELS", "add_contnet_config", "default_config"]

# Twice Pillow's Image.MAX_IMAGE_PIXELS, from where on it warns.
MAX_PIXELS = 178_956_970


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
    # Activation checkpointing, what to compute again in the backward pass to save memory: "" for
    # nothing, "gelu" for the GELU of MLPs without dropout, "mlp" for whole MLPs, "block" for whole
    # blocks.
    cfg.MODEL.CONTNET.GRAD_CHECKPOINTING = ""
    # Kernels of attention on a GPU. "flash": flash attention, memory-efficient where there is a
    # mask; "efficient", "cudnn", "math" (the plain computation): that one; "math" also where the
    # chosen ones do not fit. "auto": PyTorch's own choice, which in half precision may be cuDNN,
    # whose first call for each size of image is slow.
    cfg.MODEL.CONTNET.SDPA = "flash"

    # Stride of res5 of build_dilated_resnet_backbone: 32, 16 or 8.
    cfg.MODEL.RESNETS.OUTPUT_STRIDE = 32

    # FCOS. The defaults are the improved form (Detectron2's); plain FCOS differs in four keys.
    cfg.MODEL.FCOS = CfgNode()
    # Classes, without background.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Levels of the pyramid that the head runs on, the finest first.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Number of 3x3 convolutions in each tower, which are MODEL.FPN.OUT_CHANNELS wide.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    # Norm of the convolutions in the towers.
    cfg.MODEL.FCOS.NORM = "GN"
    # A location is positive within this many strides of the object's centre; 0: anywhere in the
    # box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Distances to the box's sides in strides (True), or in pixels as exp(scale * x) with a learned
    # scale per level.
    cfg.MODEL.FCOS.NORMALIZE_BOX = True
    # giou, or iou: -log(IoU) weighted by centre-ness.
    cfg.MODEL.FCOS.BOX_LOSS = "giou"
    # The tower that predicts centre-ness: regression or classification.
    cfg.MODEL.FCOS.CENTERNESS_ON = "regression"
    # Alpha of the focal loss: weight of positive locations, negative ones have 1 - alpha.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    # Gamma of the focal loss: how much less easy locations count; 0: all alike.
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # The class score that all locations start training with.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Least score of a detection, which is sqrt(class score * centre-ness), in [0, 1].
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Most detections of each level that go into non-maximum suppression (NMS).
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    # IoU above which NMS drops the detection with the lower score.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # PSPHead, beside MODEL.SEM_SEG_HEAD: IN_FEATURES are the auxiliary and the main feature,
    # CONVS_DIM is the main classifier's width.
    cfg.MODEL.PSP_HEAD = CfgNode()
    # Sides of the pooled maps.
    cfg.MODEL.PSP_HEAD.BINS = [1, 2, 3, 6]
    # Dropout of whole channels before each classifier, in [0, 1).
    cfg.MODEL.PSP_HEAD.DROPOUT = 0.1
    # Width of the auxiliary classifier, in channels.
    cfg.MODEL.PSP_HEAD.AUX_CONVS_DIM = 256
    # Weight of the auxiliary classifier's loss; 0 leaves the classifier out.
    cfg.MODEL.PSP_HEAD.AUX_LOSS_WEIGHT = 0.4

    # ImageClassifier. A ConTNet takes its options from MODEL.CONTNET (RELATIVE to QKV_BIAS, the
    # drop rates and GRAD_CHECKPOINTING; the others are refused, they would do nothing); any other
    # model that timm can build has timm's defaults.
    cfg.MODEL.CLASSIFIER = CfgNode()
    # contnet_ti, contnet_s, contnet_m, contnet_b, or a model of timm, as resnet50.
    cfg.MODEL.CLASSIFIER.NAME = "contnet_m"
    # Classes that the classifier has a logit for.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # Stochastic depth of timm's models, in [0, 1).
    cfg.MODEL.CLASSIFIER.DROP_PATH_RATE = 0.0
    # Other arguments of timm.create_model for timm's models, as [[dynamic_img_size, True]].
    cfg.MODEL.CLASSIFIER.OPTIONS = []
    # Label smoothing: share of the target that goes to all classes alike, in [0, 1).
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Mixup blends pairs of images and of their labels: parameter of the Beta distribution that the
    # share is drawn from; 0: never.
    cfg.MODEL.CLASSIFIER.MIXUP_ALPHA = 0.0
    # CutMix pastes a box of one image into another, and mixes their labels: parameter of the Beta
    # distribution that the box's share is drawn from; 0: never.
    cfg.MODEL.CLASSIFIER.CUTMIX_ALPHA = 0.0
    # Share of batches that are mixed, in [0, 1].
    cfg.MODEL.CLASSIFIER.MIX_PROB = 1.0
    # Share of the mixed batches that CutMix mixes, in [0, 1], where mixup is on, too.
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
    # Gradient accumulation: forward and backward passes per optimiser step. SOLVER.IMS_PER_BATCH
    # stays the number of images per optimiser step, over all processes and passes.
    cfg.SOLVER.GRAD_ACCUM_STEPS = 1
    # Exponential moving average (EMA) of the weights.
    cfg.SOLVER.EMA = CfgNode()
    # Keep an EMA of the weights and evaluate it.
    cfg.SOLVER.EMA.ENABLED = False
    # What stays of the EMA at each optimiser step, in (0, 1).
    cfg.SOLVER.EMA.DECAY = 0.9999
    # float16 (with loss scaling) or bfloat16, where SOLVER.AMP.ENABLED.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # How a GPU computes products and convolutions of float32 tensors, in training and evaluation:
    # tf32 (faster, factors are rounded to 10 bits), ieee (not rounded), or "": PyTorch's own
    # setting, which so far is tf32 for convolutions and ieee for products.
    cfg.SOLVER.FLOAT32_PRECISION = ""
    # Compile a ConTNet's encoders for training (torch.compile), which takes minutes at the start;
    # not tried on a GPU yet.
    cfg.SOLVER.COMPILE = False
    # Share of what a forward pass would keep for the backward pass that compiled encoders keep, in
    # (0, 1]; the rest is computed again.
    cfg.SOLVER.COMPILE_MEMORY_BUDGET = 1.0
    # Checkpoints of the latest iterations that stay on disk, besides model_final and model_best.
    cfg.SOLVER.CHECKPOINTS_KEPT = 3
    # True: the training waits only until a checkpoint is copied in memory, and goes on while it is
    # written; the main process needs host memory of the file's size (with a GPU up to twice that).
    # False: the training waits until it is on the disk.
    cfg.SOLVER.CHECKPOINT_BACKGROUND = True

    # Epochs in the place of iterations, also fractions as 0.5. An epoch is all images that training
    # uses. When a run starts, they become iterations and these keys 0 (docs/training.md).

    # SOLVER.MAX_ITER in epochs; 0: not used.
    cfg.SOLVER.MAX_EPOCHS = 0.0
    # SOLVER.STEPS in epochs; (): not used.
    cfg.SOLVER.STEPS_EPOCHS = ()
    # SOLVER.WARMUP_ITERS in epochs; 0: not used.
    cfg.SOLVER.WARMUP_EPOCHS = 0.0
    # SOLVER.CHECKPOINT_PERIOD in epochs; 0: not used.
    cfg.SOLVER.CHECKPOINT_PERIOD_EPOCHS = 0.0
    # TEST.EVAL_PERIOD in epochs; 0: not used.
    cfg.TEST.EVAL_PERIOD_EPOCHS = 0.0

    # Power of WarmupPolyLR: the rate falls as (1 - iteration / MAX_ITER)^power.
    cfg.SOLVER.POLY_POWER = 0.9

    # Where DATALOADER.ASPECT_RATIO_GROUPING: images of one aspect, landscape or portrait, that stay
    # together in the order of training images, at least 1. Least is padded if it divides the images
    # per process and pass; another number is another order (docs/training.md).
    cfg.DATALOADER.GROUP_SIZE = 2

    # Seconds after which a batch that no worker of a data loader has made ends the run, in training
    # and evaluation: a worker is stopped, or the images' storage does not answer. 0: never.
    cfg.DATALOADER.TIMEOUT = 600

    # Images of ImageClassifier. Training crops a part of random share and aspect ratio and resizes
    # it.
    cfg.INPUT.CLASSIFIER = CfgNode()
    # Height and width of a training image after resizing, in pixels.
    cfg.INPUT.CLASSIFIER.SIZE = 224
    # Least and greatest share of the image's area that a training crop has.
    cfg.INPUT.CLASSIFIER.SCALE = [0.08, 1.0]
    # Least and greatest width by height of a training crop.
    cfg.INPUT.CLASSIFIER.RATIO = [0.75, 4 / 3]
    # How training images are resized: bilinear, bicubic, or random (one of them for each image).
    cfg.INPUT.CLASSIFIER.INTERPOLATION = "bilinear"
    # timm's policies: "" for none, rand-m9-mstd0.5-inc1 (RandAugment), original (AutoAugment), ...
    cfg.INPUT.CLASSIFIER.AUTO_AUGMENT = ""
    # Change of brightness, contrast and saturation, in [0, 1]; not together with AUTO_AUGMENT.
    cfg.INPUT.CLASSIFIER.COLOR_JITTER = 0.0
    # Share of images that lose a random box to noise, in [0, 1].
    cfg.INPUT.CLASSIFIER.RANDOM_ERASING = 0.0
    # Shorter side of a test image after resizing, in pixels.
    cfg.INPUT.CLASSIFIER.RESIZE_TEST = 256
    # Side of the centre crop of a test image, in pixels, at most RESIZE_TEST.
    cfg.INPUT.CLASSIFIER.CROP_TEST = 224
    # How test images are resized: bilinear or bicubic.
    cfg.INPUT.CLASSIFIER.INTERPOLATION_TEST = "bilinear"

    # Most pixels (width x height) of an image; a larger one is refused. 0: no limit. The default is
    # where Pillow refuses.
    cfg.INPUT.MAX_PIXELS = MAX_PIXELS

    # For semantic segmentation: largest share of a crop that one class may fill, in (0, 1]; other
    # crops are drawn again, up to ten times.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Sliding window of WindowSegmentor.
    cfg.TEST.SLIDING_WINDOW = CfgNode()
    # Average the logits of windows instead of looking at the whole image at once.
    cfg.TEST.SLIDING_WINDOW.ENABLED = False
    # Height and width of a window, in pixels of the network's input.
    cfg.TEST.SLIDING_WINDOW.SIZE = [512, 1024]
    # From window to window, vertically and horizontally, in pixels; at most SIZE.
    cfg.TEST.SLIDING_WINDOW.STRIDE = [341, 683]
    # Data sets of your own. In COCO's format: [name, annotation file, image folder]. To classify
    # images: [name, folder] for class folders or shards, and [name, label file, folder] for images
    # in one folder, where the label file ends with .txt or .csv. The names are then as good as
    # built-in ones in TRAIN and TEST. Relative paths start in the folder where the command is
    # typed. On the command line: DATASETS.REGISTER "[['mine', 'mine.json', 'images']]"
    # If the first set of a run is one of these, the model's number of classes is that of its
    # file or folder, unless the config file itself (not its _BASE_) or the command line sets it.
    cfg.DATASETS.REGISTER = []
    # Images that are opened before a run starts, and compared with their annotations: first (8 of
    # each set), all, or none.
    cfg.DATASETS.CHECK_IMAGES = "first"
    # Folder where annotations are kept once they have been read, for other processes and later
    # starts (docs/data.md). "auto": $XDG_CACHE_HOME/contnet, or ~/.cache/contnet. "": none, each
    # process reads them anew.
    cfg.DATASETS.CACHE_DIR = "auto"
    # How large that folder may grow, in GB (10^9 bytes); 0: without limit. What has not been used
    # for the longest time goes first, never what a run has open or was used within the last hour.
    cfg.DATASETS.CACHE_SIZE_GB = 10.0
    # The metric whose highest value marks model_best.pth, as metrics.json names it (bbox/AP50).
    # "": the main one of the first data set: segm/AP with masks, else bbox/AP, or the semantic IoU.
    cfg.TEST.BEST_METRIC = ""
    # The losses on DATASETS.TEST, without augmentation, after each so many iterations and at the
    # end, as validation/... in metrics.json. 0: never.
    cfg.TEST.LOSS_PERIOD = 0
    # TEST.LOSS_PERIOD in epochs; 0: not used.
    cfg.TEST.LOSS_PERIOD_EPOCHS = 0.0
    # Early stopping: a training ends after this many evaluations in a row without a better value
    # of that metric, and model_best.pth is evaluated at the end. 0: it never ends early.
    cfg.TEST.PATIENCE = 0

    # What becomes of an image of DATASETS.TEST that cannot be read. False: the evaluation ends, and
    # names it. True: it is left out, its objects, label or pixels count as missed, and results.json
    # tells how many such images there were.
    cfg.TEST.SKIP_UNREADABLE = False

    # Images per process and forward pass of ImageClassifier's evaluation.
    cfg.TEST.IMS_PER_PROCESS = 64

    # Experiment trackers that get the metrics and, after evaluations, pictures: wandb, mlflow, or
    # both; [] for none. Their addresses and keys are their own environment variables
    # (docs/training.md).
    cfg.TRACKERS = []

    # Iterations between two lines of progress.
    cfg.LOG_PERIOD = 20

    # The page of a run (docs/report.md).
    cfg.REPORT = CfgNode()
    # A training refreshes curves and tables in OUTPUT_DIR/report.html after each evaluation, as
    # long as that takes no more than 2 % of its time, and at the end.
    cfg.REPORT.ENABLED = False


def default_config() -> CfgNode:
    """All keys, Detectron2's and this project's, with their defaults; not frozen."""
    cfg = get_cfg()
    add_contnet_config(cfg)
    return cfg
