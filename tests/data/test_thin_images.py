"""Tests images of a few pixels, or with extreme aspect ratios: at least one pixel stays."""

import itertools

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, PILToTensor, Resize

from contnet.config import load_config
from contnet.data.pipeline.mappers import (
    ClassificationMapper,
    FastMapper,
    Mapper,
    build_train_mapper,
)
from contnet.modeling.build import build_model
from contnet.modeling.thin_images import RandomCrop, ResizeShortestEdge, keep_a_pixel
from contnet.modeling.tta import tta_class
from contnet.utils.seed import seed_everything

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
SIZES = [(3000, 2), (2, 3000), (1, 1), (400, 1)]  # width and height

COMMON = "MODEL.CONTNET.NORM GN MODEL.SEM_SEG_HEAD.NUM_CLASSES 3 MODEL.FCOS.NORM ''"
TO_P7 = """MODEL.FPN.IN_FEATURES ['res3','res4','res5']
MODEL.BACKBONE.NAME build_retinanet_contnet_fpn_backbone"""
PSP = """MODEL.BACKBONE.NAME build_contnet_backbone MODEL.SEM_SEG_HEAD.NAME PSPHead
MODEL.SEM_SEG_HEAD.IN_FEATURES ['res4','res5'] MODEL.SEM_SEG_HEAD.NORM GN
MODEL.SEM_SEG_HEAD.CONVS_DIM 32 MODEL.PSP_HEAD.AUX_CONVS_DIM 32"""
WINDOW = """MODEL.META_ARCHITECTURE WindowSegmentor TEST.SLIDING_WINDOW.ENABLED True
TEST.SLIDING_WINDOW.SIZE [40,40] TEST.SLIDING_WINDOW.STRIDE [20,30]"""
CROP = "INPUT.CROP.ENABLED True INPUT.CROP.TYPE relative INPUT.CROP.SIZE [0.1,0.1]"
MODELS = {
    "boxes": "",
    "masks": f"MODEL.MASK_ON True {CROP}",
    "retinanet": f"MODEL.META_ARCHITECTURE RetinaNet {TO_P7}",
    "fcos": f"MODEL.META_ARCHITECTURE FCOS {TO_P7}",
    "semantic": "MODEL.META_ARCHITECTURE SemanticSegmentor",
    "psp": f"MODEL.META_ARCHITECTURE WindowSegmentor {PSP} {CROP}",
    "windows": f"{WINDOW} {PSP} {CROP} INPUT.CROP.SINGLE_CATEGORY_MAX_AREA 0.7",
}


def settings(kind):
    augmented = ["TEST.AUG.MIN_SIZES", "(40,64)", "TEST.AUG.MAX_SIZE", "90"]
    return load_config(LEAF, [*SMALL, *COMMON.split(), *MODELS[kind].split(), *augmented])


def draw(path, width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def draw_record(folder, kind, width, height):
    """Makes a record with one object that fills the image, and with labels for segmenters."""
    record = {
        "file_name": draw(folder / "image.png", width, height),
        "width": width,
        "height": height,
        "image_id": 1,
    }
    if kind in ("semantic", "psp", "windows"):
        labels = np.arange(width * height).reshape(height, width) % 3
        Image.fromarray(labels.astype(np.uint8)).save(folder / "labels.png")
        return {**record, "sem_seg_file_name": str(folder / "labels.png")}
    corners = [0, 0, width, 0, width, height, 0, height]
    item = {"bbox": [0, 0, width, height], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    return {**record, "annotations": [{**item, "segmentation": [corners]}]}


@pytest.mark.parametrize("kind", MODELS)
def test_they_are_trained_on_and_evaluated(tmp_path, kind):
    cfg = settings(kind)
    model = build_model(cfg)
    train, test = build_train_mapper(cfg), Mapper(cfg, is_train=False)
    views = Mapper(cfg, is_train=False, augmentations=[])
    augmented = tta_class(cfg.MODEL.META_ARCHITECTURE)(cfg, model).eval()
    for number, size in enumerate(SIZES):
        record = draw_record(tmp_path, kind, *size)
        seed_everything(number)
        with EventStorage():
            losses = model.train()([train(record)] * 2)
        assert all(torch.isfinite(loss) for loss in losses.values())
        model.eval()
        with torch.no_grad():
            outputs = [model([test(record)])[0], augmented([views(record)])[0]]
        for output in outputs:
            if "sem_seg" in output:
                assert output["sem_seg"].shape == (3, *reversed(size))
                assert torch.isfinite(output["sem_seg"]).all()
            else:
                assert output["instances"].image_size == tuple(reversed(size))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mapper", [Mapper, FastMapper])
def test_their_boxes_fill_them(tmp_path, mapper, size):
    made = mapper(settings("boxes"))(draw_record(tmp_path, "boxes", *size))
    height, width = made["image"].shape[1:]
    assert min(height, width) >= 1 and max(height, width) <= 96
    assert made["instances"].gt_boxes.tensor.tolist() == [[0, 0, width, height]]


def test_other_images_are_resized_and_cropped_as_by_detectron2():
    rng = np.random.default_rng(0)
    theirs = [
        T.ResizeShortestEdge([40, 64], 90, "choice"),
        T.ResizeShortestEdge([40, 64], 90, "range"),
        *(T.RandomCrop(kind, (0.3, 0.6)) for kind in ("relative", "relative_range")),
        *(T.RandomCrop(kind, (5, 30)) for kind in ("absolute", "absolute_range")),
    ]
    for their, our in zip(theirs, keep_a_pixel(theirs), strict=True):
        assert type(our) in (ResizeShortestEdge, RandomCrop) and repr(our) == repr(their)
        for seed in range(20):
            height, width = rng.integers(5, 400, 2)
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            made = []
            for augmentation in (our, their):
                np.random.seed(seed)
                made.append(augmentation.get_transform(image).apply_image(image))
            assert np.array_equal(*made)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("size", [*SIZES, (50000, 1), (2, 2)], ids=str)
def test_they_are_classified(tmp_path, size, is_train):
    cfg = load_config(str(REPOSITORY / "configs" / "imagenet" / "contti.yaml"))
    mapper = ClassificationMapper(cfg, is_train)
    record = {"file_name": draw(tmp_path / "image.png", *size), "label": 0}
    for _ in range(40 if is_train else 1):
        assert mapper(record)["image"].shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(160, 10), (10, 160), (170, 10), (11, 500), (64, 48)], ids=str)
def test_a_centre_crop_of_a_long_image_is_that_of_the_whole(tmp_path, size):
    """Below 16 to 1 it is bit for bit equal; above, the resized length is rounded differently."""
    cfg = load_config(str(REPOSITORY / "configs" / "imagenet" / "contti.yaml"))
    smooth = np.add(*np.mgrid[: size[1], : size[0]])[..., None] + [0, 40, 80]
    path = tmp_path / "image.png"
    Image.fromarray((128 + 100 * np.sin(smooth / 15)).astype(np.uint8)).save(path)
    made = ClassificationMapper(cfg, False)({"file_name": str(path)})["image"]
    node = cfg.INPUT.CLASSIFIER
    image = Resize(node.RESIZE_TEST, InterpolationMode(node.INTERPOLATION_TEST))(Image.open(path))
    expected = PILToTensor()(CenterCrop(node.CROP_TEST)(image))
    far = (made.int() - expected.int()).abs().max()
    assert far <= (0 if max(size) <= 16 * min(size) else 4)


@pytest.mark.parametrize(("height", "width"), [*itertools.product([1, 2, 33], repeat=2)])
def test_a_bare_backbone_takes_them(height, width):
    cfg = settings("psp")
    backbone = build_model(cfg).backbone.eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, height, width))
    assert all(min(each.shape[-2:]) >= 1 for each in features.values())
