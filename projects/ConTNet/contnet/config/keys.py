"""The config keys that this project adds to Detectron2's, with their legal values and units.

``tools/configs.py explain`` prints the comment right above a key.
"""

from __future__ import annotations

from detectron2.config import CfgNode, get_cfg

__all__ = ["MAX_PIXELS", "add_contnet_config", "default_config"]

# Twice Pillow's Image.MAX_IMAGE_PIXELS: above this, Pillow raises an error.
MAX_PIXELS = 178_956_970


def add_contnet_config(cfg: CfgNode) -> None:
    """Adds this project's keys. Their defaults do not change Detectron2's behaviour."""
    # The network. The options are those of the published code, which ships with False and "stage".
    cfg.MODEL.CONTNET = CfgNode()
    # contnet_ti, contnet_s, contnet_m or contnet_b.
    cfg.MODEL.CONTNET.VARIANT = "contnet_m"
    # True: relative position biases. False: absolute position embeddings.
    cfg.MODEL.CONTNET.RELATIVE = False
    # True: normalise before attention and MLP. False: after their residual sums.
    cfg.MODEL.CONTNET.PRE_NORM = False
    # Use average pooling in the down-sampling shortcuts.
    cfg.MODEL.CONTNET.USE_AVGDOWN = False
    # Give the query, key and value projections a bias.
    cfg.MODEL.CONTNET.QKV_BIAS = True
    # Where res2 to res4 are taken. "stage": the output of the stage's last block, computed at
    # stride 1, with twice the stage's channels. "pre": the input of the down-sampling convolution,
    # with the stage's channels.
    cfg.MODEL.CONTNET.TAPS = "stage"
    # Any of res2, res3, res4, res5. Stages after the last one are not built.
    cfg.MODEL.CONTNET.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Normalisation layer of the blocks: BN, FrozenBN, SyncBN or GN.
    cfg.MODEL.CONTNET.NORM = "FrozenBN"
    # Freeze the first layers: 0 none, 1 the stem, 2 the stem and stage 1, up to 5 the whole
    # backbone.
    cfg.MODEL.CONTNET.FREEZE_AT = 0
    # Stride of res5: 32, 16 or 8. Below 32, the last stages keep their resolution and use dilation.
    cfg.MODEL.CONTNET.OUTPUT_STRIDE = 32
    # Dilate the attention patches like the convolutions, so that pretrained weights still fit
    # (docs/network.md).
    cfg.MODEL.CONTNET.DILATED_PATCHES = True
    # Dropout in the encoders of stages 3 and 4, in [0, 1); -1: the variant's default (B 0.1, others
    # 0).
    cfg.MODEL.CONTNET.DROP_RATE = -1.0
    # Dropout after the last block, in [0, 1); -1: the variant's default (B 0.2, others 0).
    cfg.MODEL.CONTNET.LAST_DROP_RATE = -1.0
    # Stochastic depth rate of the last block, in [0, 1); it rises linearly from 0 at the first
    # block.
    cfg.MODEL.CONTNET.DROP_PATH_RATE = 0.0
    # Activation checkpointing: what is recomputed in the backward pass to save memory. "": nothing;
    # "gelu": the GELU of MLPs without dropout; "mlp": whole MLPs; "block": whole blocks.
    cfg.MODEL.CONTNET.GRAD_CHECKPOINTING = ""
    # Attention kernel on a GPU. "flash": flash attention, or memory-efficient attention where there
    # is a mask. "efficient", "cudnn", "math" (the plain computation): that kernel. "math" is used
    # where the chosen kernel does not support the inputs. "auto": PyTorch chooses; in half
    # precision this may be cuDNN, whose first call for each image size is slow.
    cfg.MODEL.CONTNET.SDPA = "flash"

    # Stride of res5 of build_dilated_resnet_backbone: 32, 16 or 8.
    cfg.MODEL.RESNETS.OUTPUT_STRIDE = 32

    # FCOS. The defaults are the improved version, as in Detectron2; plain FCOS differs in four
    # keys.
    cfg.MODEL.FCOS = CfgNode()
    # Number of classes, without background.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Pyramid levels that the head runs on, the finest first.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Number of 3x3 convolutions in each tower; they have MODEL.FPN.OUT_CHANNELS channels.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    # Normalisation layer of the convolutions in the towers.
    cfg.MODEL.FCOS.NORM = "GN"
    # A location is positive if it is within this many strides of the object's centre; 0: anywhere
    # in the box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # True: distances to the box's sides are predicted in strides. False: in pixels, as exp(scale *
    # x) with a learned scale per level.
    cfg.MODEL.FCOS.NORMALIZE_BOX = True
    # Box loss: giou, or iou (-log(IoU), weighted by centre-ness).
    cfg.MODEL.FCOS.BOX_LOSS = "giou"
    # The tower that predicts centre-ness: regression or classification.
    cfg.MODEL.FCOS.CENTERNESS_ON = "regression"
    # Alpha of the focal loss: the weight of positive locations; negative ones have 1 - alpha.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    # Gamma of the focal loss: how much less easy locations count; 0: all count the same.
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Class score of all locations at the start of training.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Detections with a lower score are dropped, in [0, 1]. The score is sqrt(class score *
    # centre-ness).
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Maximum number of detections per level before non-maximum suppression (NMS).
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    # IoU above which NMS drops the detection with the lower score.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # PSPHead. It also uses MODEL.SEM_SEG_HEAD: IN_FEATURES are the auxiliary and the main feature,
    # CONVS_DIM is the main classifier's width.
    cfg.MODEL.PSP_HEAD = CfgNode()
    # Side lengths of the pooled maps.
    cfg.MODEL.PSP_HEAD.BINS = [1, 2, 3, 6]
    # Dropout of whole channels before each classifier, in [0, 1).
    cfg.MODEL.PSP_HEAD.DROPOUT = 0.1
    # Width of the auxiliary classifier, in channels.
    cfg.MODEL.PSP_HEAD.AUX_CONVS_DIM = 256
    # Weight of the auxiliary classifier's loss; 0: no auxiliary classifier is built.
    cfg.MODEL.PSP_HEAD.AUX_LOSS_WEIGHT = 0.4

    # ImageClassifier. A ConTNet uses the options in MODEL.CONTNET (RELATIVE to QKV_BIAS, the drop
    # rates and GRAD_CHECKPOINTING; changing the others is an error, since they have no effect
    # here). Other models are built by timm, with its defaults.
    cfg.MODEL.CLASSIFIER = CfgNode()
    # contnet_ti, contnet_s, contnet_m, contnet_b, or a timm model such as resnet50.
    cfg.MODEL.CLASSIFIER.NAME = "contnet_m"
    # Number of classes.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # Stochastic depth rate of timm models, in [0, 1).
    cfg.MODEL.CLASSIFIER.DROP_PATH_RATE = 0.0
    # More arguments of timm.create_model for timm models, for example [[dynamic_img_size, True]].
    cfg.MODEL.CLASSIFIER.OPTIONS = []
    # Label smoothing, in [0, 1): the share of the target that is spread evenly over all classes.
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Mixup blends pairs of images and their labels. Parameter of the Beta distribution from which
    # the blending factor is drawn; 0: no mixup.
    cfg.MODEL.CLASSIFIER.MIXUP_ALPHA = 0.0
    # CutMix pastes a box of one image into another and mixes their labels. Parameter of the Beta
    # distribution from which the box's share of the area is drawn; 0: no CutMix.
    cfg.MODEL.CLASSIFIER.CUTMIX_ALPHA = 0.0
    # Probability that a batch is mixed, in [0, 1].
    cfg.MODEL.CLASSIFIER.MIX_PROB = 1.0
    # Where both are enabled: probability that a mixed batch uses CutMix instead of mixup, in [0,
    # 1].
    cfg.MODEL.CLASSIFIER.CUTMIX_PROB = 0.5
    # Use the channels-last memory format, which is faster on GPUs with tensor cores.
    cfg.MODEL.CLASSIFIER.CHANNELS_LAST = False

    # False: MODEL.WEIGHTS must hold every tensor of the backbone. True: tensors may be missing.
    cfg.MODEL.ALLOW_MISSING_WEIGHTS = False

    # SGD (MOMENTUM, NESTEROV) or AdamW (ADAMW_BETAS).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # AdamW's betas, each in [0, 1).
    cfg.SOLVER.ADAMW_BETAS = (0.9, 0.999)
    # Layer-wise learning rate decay, in (0, 1]: factor from each layer group of the backbone to the
    # one before it. The last group and everything outside the backbone have the full rate.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Factor of the learning rate for the whole bottom-up network, above 0.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # value or norm: clip each parameter's gradient separately, as in Detectron2. full_model: scale
    # all gradients so that their total norm (of NORM_TYPE) is at most CLIP_VALUE.
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    # Gradient accumulation: number of forward and backward passes per optimiser step.
    # SOLVER.IMS_PER_BATCH is still the number of images per optimiser step, over all processes and
    # passes.
    cfg.SOLVER.GRAD_ACCUM_STEPS = 1
    # Exponential moving average (EMA) of the weights.
    cfg.SOLVER.EMA = CfgNode()
    # Keep an EMA of the weights and evaluate it.
    cfg.SOLVER.EMA.ENABLED = False
    # Decay of the EMA at each optimiser step, in (0, 1).
    cfg.SOLVER.EMA.DECAY = 0.9999
    # With SOLVER.AMP.ENABLED: float16 (with loss scaling) or bfloat16.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Precision of float32 matrix products and convolutions on a GPU, in training and evaluation.
    # tf32: faster, inputs are rounded to 10 bits. ieee: full precision. "": PyTorch's default,
    # currently tf32 for convolutions and ieee for matrix products.
    cfg.SOLVER.FLOAT32_PRECISION = ""
    # Compile a ConTNet's encoders for training with torch.compile. This takes minutes at the start,
    # and has not been tested on a GPU yet.
    cfg.SOLVER.COMPILE = False
    # Activation memory budget of compiled encoders, in (0, 1]: the share of the activations that is
    # kept for the backward pass. The rest is recomputed.
    cfg.SOLVER.COMPILE_MEMORY_BUDGET = 1.0
    # Number of latest checkpoints that are kept, besides model_final and model_best.
    cfg.SOLVER.CHECKPOINTS_KEPT = 3
    # True: write checkpoints in the background. The training only waits for a copy in memory; the
    # main process needs host memory of the file's size (with a GPU, up to twice that). False: the
    # training waits until the file is on the disk.
    cfg.SOLVER.CHECKPOINT_BACKGROUND = True

    # Epochs instead of iterations; fractions such as 0.5 are allowed. An epoch is one pass over all
    # training images. When a run starts, epochs are converted into iterations and these keys are
    # set to 0 (docs/training.md).

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

    # Power of WarmupPolyLR: the learning rate falls as (1 - iteration / MAX_ITER)^power.
    cfg.SOLVER.POLY_POWER = 0.9

    # With DATALOADER.ASPECT_RATIO_GROUPING: how many images of one orientation (landscape or
    # portrait) stay together in the order of training images, at least 1. Padding is least if this
    # divides the images per process and pass. Changing it changes the order (docs/training.md).
    cfg.DATALOADER.GROUP_SIZE = 2

    # The run fails if the data loader's workers deliver no batch for this many seconds, in training
    # and evaluation: a worker is stuck, or the storage does not respond. 0: no limit.
    cfg.DATALOADER.TIMEOUT = 600

    # Images of ImageClassifier. In training, a crop of random area and aspect ratio is resized.
    cfg.INPUT.CLASSIFIER = CfgNode()
    # Height and width of a training image after resizing, in pixels.
    cfg.INPUT.CLASSIFIER.SIZE = 224
    # Range of a training crop's area, as a share of the image's area.
    cfg.INPUT.CLASSIFIER.SCALE = [0.08, 1.0]
    # Range of a training crop's aspect ratio, width / height.
    cfg.INPUT.CLASSIFIER.RATIO = [0.75, 4 / 3]
    # Interpolation for training images: bilinear, bicubic, or random (one of the two per image).
    cfg.INPUT.CLASSIFIER.INTERPOLATION = "bilinear"
    # One of timm's policies, such as rand-m9-mstd0.5-inc1 (RandAugment) or original (AutoAugment);
    # "": none.
    cfg.INPUT.CLASSIFIER.AUTO_AUGMENT = ""
    # Strength of brightness, contrast and saturation jitter, in [0, 1]; must be 0 with
    # AUTO_AUGMENT.
    cfg.INPUT.CLASSIFIER.COLOR_JITTER = 0.0
    # Random erasing: probability that a random box of an image is replaced with noise, in [0, 1].
    cfg.INPUT.CLASSIFIER.RANDOM_ERASING = 0.0
    # Shorter side of a test image after resizing, in pixels.
    cfg.INPUT.CLASSIFIER.RESIZE_TEST = 256
    # Side of the centre crop of a test image, in pixels, at most RESIZE_TEST.
    cfg.INPUT.CLASSIFIER.CROP_TEST = 224
    # Interpolation for test images: bilinear or bicubic.
    cfg.INPUT.CLASSIFIER.INTERPOLATION_TEST = "bilinear"

    # Maximum number of pixels (width x height) of an image; reading a larger one is an error. 0: no
    # limit. The default is Pillow's limit.
    cfg.INPUT.MAX_PIXELS = MAX_PIXELS

    # For semantic segmentation: largest share of a crop that one class may fill, in (0, 1]. Crops
    # that exceed it are drawn again, up to ten times.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0

    # Sliding window of WindowSegmentor.
    cfg.TEST.SLIDING_WINDOW = CfgNode()
    # Run on overlapping windows and average their logits, instead of on the whole image.
    cfg.TEST.SLIDING_WINDOW.ENABLED = False
    # Height and width of a window, in pixels of the network's input.
    cfg.TEST.SLIDING_WINDOW.SIZE = [512, 1024]
    # Vertical and horizontal stride of the windows, in pixels; at most SIZE.
    cfg.TEST.SLIDING_WINDOW.STRIDE = [341, 683]

    # Your own data sets. In COCO format: [name, annotation file, image folder]. For classification:
    # [name, folder] for class folders or shards, and [name, label file, folder] for images in one
    # folder, where the label file is a .txt or .csv file. Use the names in DATASETS.TRAIN and TEST.
    # Relative paths are relative to the current directory. If the first data set of a run is one of
    # these, the model's number of classes is taken from its file or folder, unless the config file
    # itself (not its _BASE_) or the command line sets it. On the command line: DATASETS.REGISTER
    # "[['mine', 'mine.json', 'images']]"
    cfg.DATASETS.REGISTER = []
    # Images that are opened and compared with their annotations before a run starts: first (8 of
    # each data set), all, or none.
    cfg.DATASETS.CHECK_IMAGES = "first"
    # Cache folder for parsed annotations, shared by processes and later runs (docs/data.md).
    # "auto": $XDG_CACHE_HOME/contnet, or ~/.cache/contnet. "": no cache, each process parses the
    # annotations.
    cfg.DATASETS.CACHE_DIR = "auto"
    # Maximum size of the cache folder, in GB (10^9 bytes); 0: no limit. The least recently used
    # files are deleted first, but none that a run has open or that was used within the last hour.
    cfg.DATASETS.CACHE_SIZE_GB = 10.0
    # The metric that selects model_best.pth (the highest value wins), named as in metrics.json, for
    # example bbox/AP50. "": the main metric of the first data set: segm/AP with masks, else
    # bbox/AP, or the semantic IoU.
    cfg.TEST.BEST_METRIC = ""
    # Compute the losses on DATASETS.TEST, without augmentation, every so many iterations and at the
    # end. metrics.json has them as validation/... 0: never.
    cfg.TEST.LOSS_PERIOD = 0
    # TEST.LOSS_PERIOD in epochs; 0: not used.
    cfg.TEST.LOSS_PERIOD_EPOCHS = 0.0
    # Early stopping: the training ends after this many consecutive evaluations without a better
    # value of TEST.BEST_METRIC, and model_best.pth is evaluated at the end. 0: no early stopping.
    cfg.TEST.PATIENCE = 0

    # What to do with an image of DATASETS.TEST that cannot be read. False: the evaluation fails and
    # names the image. True: the image is skipped, its objects, label or pixels count as missed, and
    # results.json has the number of skipped images.
    cfg.TEST.SKIP_UNREADABLE = False

    # Images per process and forward pass of ImageClassifier's evaluation.
    cfg.TEST.IMS_PER_PROCESS = 64

    # Experiment trackers that get the metrics and, after evaluations, images: wandb, mlflow, or
    # both; []: none. Set their addresses and keys with their environment variables
    # (docs/training.md).
    cfg.TRACKERS = []

    # Iterations between two progress lines in the log.
    cfg.LOG_PERIOD = 20

    # The report page of a run (docs/report.md).
    cfg.REPORT = CfgNode()
    # Update the curves and tables in OUTPUT_DIR/report.html after each evaluation, as long as this
    # takes at most 2 % of the training time, and at the end.
    cfg.REPORT.ENABLED = False


def default_config() -> CfgNode:
    """Returns the defaults of all keys, Detectron2's and this project's; not frozen."""
    cfg = get_cfg()
    add_contnet_config(cfg)
    return cfg
