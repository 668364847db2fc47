"""The shipped configs, options that make their models tiny, and a random batch for each."""

import numpy as np
import torch
from conftest import REPOSITORY
from detectron2.structures import Boxes, Instances, PolygonMasks

CONFIGS = REPOSITORY / "configs"
LEAVES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("Base")
)
TINY = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("MODEL.FCOS.NORM", ""),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "16"),
    *("MODEL.PSP_HEAD.AUX_CONVS_DIM", "16"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    # ImageNet recipes start with a learning rate of 0.
    *("SOLVER.WARMUP_FACTOR", "0.001"),
]

# In bfloat16 on a CPU, the gradient of a convolution at stride 2 on one pixel is garbage.
_LARGER = "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MAX_SIZE_TRAIN 128"
_WINDOWS = """
INPUT.CROP.SIZE [64,64] INPUT.MIN_SIZE_TRAIN (64,96) TEST.SLIDING_WINDOW.ENABLED True
TEST.SLIDING_WINDOW.SIZE [64,64] TEST.SLIDING_WINDOW.STRIDE [64,64]
"""
_PICTURES = """
INPUT.CLASSIFIER.SIZE 56 INPUT.CLASSIFIER.CROP_TEST 56 TEST.AUG.ENABLED False
"""
# A config of each system, options that make it small, and the tasks that it is evaluated on.
SYSTEMS = {
    "faster_rcnn_contti": ("", "bbox"),
    "mask_rcnn_contti": ("", "bbox segm"),
    "retinanet_contti": (_LARGER, "bbox"),
    "fcos_contti": (_LARGER, "bbox"),
    "cityscapes/mask_rcnn_contti": ("", "bbox cityscapes segm"),
    "cityscapes/pspnet_contti": (_WINDOWS, "sem_seg"),
    "imagenet/contti_strong": (_PICTURES, "classification"),
}


def random_batch(cfg):
    """Returns a batch that the config's model can train on."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        return [{"image": image, "label": i} for i, image in enumerate(images)]
    batch = []
    for height, width in ((61, 80), (48, 75)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 5.0, 40.0, 41.0], [20.0, 8.0, 70.0, 30.0]]))
        instances.gt_classes = torch.tensor([3, 1])
        corners = [[4.0, 5.0, 40.0, 5.0, 40.0, 41.0], [20.0, 8.0, 70.0, 30.0, 20.0, 30.0]]
        instances.gt_masks = PolygonMasks([[np.array(polygon)] for polygon in corners])
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        labels = torch.randint(0, 19, (height, width))
        batch.append({"image": image, "instances": instances, "sem_seg": labels})
    return batch
