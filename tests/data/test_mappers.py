"""Tests our mapper against Detectron2's: same dict, same random draws, pixels within one level."""

import copy
import struct

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as rle
from torch.utils.data import DataLoader, Dataset

from contnet.config import add_contnet_config
from contnet.data.pipeline.mappers import (
    FastMapper,
    Mapper,
    NamedErrors,
    build_train_mapper,
)
from contnet.utils.errors import UserError, print_error
from contnet.utils.seed import seed_everything

HEIGHT, WIDTH = 90, 121
LARGE = ["INPUT.MIN_SIZE_TRAIN", "(150, 170)"]
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(40,)"]
MASKS = ["MODEL.MASK_ON", "True"]
BITMASKS = [*MASKS, "INPUT.MASK_FORMAT", "bitmask"]
CROP = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[0.5, 0.6]"]
KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "DATASETS.TRAIN", "('keypoints_coco_2017_train',)"]


def draw(path, mode="RGB", **options):
    """Draws smooth colours with some noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 11, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.BICUBIC)).astype(int)
    pixels = (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return str(path)


def draw_objects(number=5, whole=False, keypoints=False):
    rng = np.random.default_rng(1)
    objects = []
    for i in range(number):
        around = rng.uniform(-20, 20, (2, 9, 2)) + rng.uniform((10, 10), (WIDTH - 10, HEIGHT - 10))
        parts = around.clip(0, (WIDTH - 1, HEIGHT - 1)).round(0 if whole else 2)
        low, high = parts.min(axis=(0, 1)), parts.max(axis=(0, 1))
        kind = int if whole else float
        each = {
            "bbox": np.concatenate([low, high - low]).astype(kind).tolist(),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": i,
            "iscrowd": int(i == 1),
            "segmentation": parts[: 1 + i % 2].reshape(1 + i % 2, -1).astype(kind).tolist(),
        }
        if keypoints:
            # As in COCO's records: pixel centres and visibility.
            points = np.add(rng.uniform(0, 90, (17, 3)).astype(int), (0.5, 0.5, 0))
            each["keypoints"] = points.ravel().tolist()
        objects.append(each)
    return objects


@pytest.fixture
def record(tmp_path):
    path = draw(tmp_path / "image.jpg", quality=90)
    return {
        "file_name": path,
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 7,
        "annotations": draw_objects(),
    }


def settings(*options):
    cfg = get_cfg()
    add_contnet_config(cfg)
    cfg.merge_from_list(["INPUT.MAX_SIZE_TRAIN", 300, *options])
    return cfg


def assert_same_values(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.is_contiguous() and torch.equal(ours, theirs)
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_values(one, other)
    else:
        assert ours == theirs


def assert_same_instances(ours, theirs):
    assert ours.image_size == theirs.image_size
    assert ours.get_fields().keys() == theirs.get_fields().keys()
    for name, theirs_field in theirs.get_fields().items():
        ours_field = ours.get(name)
        for part in ("tensor", "polygons"):
            if hasattr(theirs_field, part):
                assert_same_values(getattr(ours_field, part), getattr(theirs_field, part))
                break
        else:
            assert_same_values(ours_field, theirs_field)


def compare(ours, theirs, record, seeds=8, exact=False):
    """Maps a record with both mappers and the same seeds; returns the last results."""
    before = copy.deepcopy(record)
    for seed in range(seeds):
        seed_everything(seed)
        one = ours(record)
        state = np.random.get_state()[1:3]
        assert_equal_records(record, before)
        seed_everything(seed)
        other = theirs(record)
        assert_same_values(list(state), list(np.random.get_state()[1:3]))
        assert one.keys() == other.keys()
        for key in one.keys() - {"image", "instances", "proposals"}:
            assert_same_values(one[key], other[key])
        for key in one.keys() & {"instances", "proposals"}:
            assert_same_instances(one[key], other[key])
        assert one["image"].dtype == other["image"].dtype and one["image"].is_contiguous()
        assert one["image"].shape == other["image"].shape
        difference = (one["image"].double() - other["image"].double()).abs()
        assert difference.max() <= (0 if exact else 1)
        assert (difference > 0).double().mean() < 0.1
    return one, other


def assert_equal_records(one, other):
    assert one.keys() == other.keys()
    for key in one.keys() - {"annotations"}:
        assert_same_values(one[key], other[key])
    for ours, theirs in zip(one.get("annotations", []), other.get("annotations", []), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same_values(ours[key], theirs[key])


def both(*options, **arguments):
    cfg = settings(*options)
    return FastMapper(cfg, **arguments), DatasetMapper(cfg, **arguments)


@pytest.mark.parametrize(
    "options",
    [
        LARGE,
        SMALL,
        [*LARGE, "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.FORMAT", "RGB"],
        [*SMALL, "INPUT.RANDOM_FLIP", "vertical"],
        [*LARGE, *MASKS],
        [*SMALL, *MASKS, *CROP],
        [*LARGE, *BITMASKS],
        [*LARGE, *BITMASKS, *CROP],
        [*LARGE, "INPUT.FORMAT", "L"],
        [*LARGE, "INPUT.FORMAT", "YUV-BT.601"],
        ["INPUT.MIN_SIZE_TRAIN", "(0,)", *MASKS],
    ],
    ids=lambda options: " ".join(options[1::2]),
)
def test_equals_detectron2(record, options):
    compare(*both(*options), record)


@pytest.mark.parametrize(
    ("options", "annotations"),
    [
        (MASKS, [{**a, "iscrowd": 1} for a in draw_objects()]),
        (MASKS, []),
        ([], [{k: v for k, v in a.items() if k != "segmentation"} for a in draw_objects()]),
        (MASKS, [{k: v for k, v in a.items() if k != "segmentation"} for a in draw_objects()]),
        ([], [{**a, "bbox_mode": BoxMode.XYXY_ABS} for a in draw_objects()]),
        (KEYPOINTS, draw_objects(keypoints=True)),
        ([*MASKS, *KEYPOINTS], draw_objects(keypoints=True)),
    ],
    ids=[
        "crowds alone",
        "nothing",
        "boxes alone",
        "boxes where masks are on",
        "corners",
        "keypoints",
        "keypoints and masks",
    ],
)
def test_equals_detectron2_on_other_annotations(record, options, annotations):
    compare(*both(*LARGE, *options), {**record, "annotations": annotations})


AUGMENTATIONS = {
    "resize": lambda: [T.ResizeShortestEdge(61, 300)],
    "flip": lambda: [T.RandomFlip(prob=1.0)],
    "vertical flip": lambda: [T.RandomFlip(prob=1.0, horizontal=False, vertical=True)],
    "rotation": lambda: [T.RandomRotation((-30, 30))],
    "crop": lambda: [T.RandomCrop("relative_range", (0.5, 0.6)), T.ResizeShortestEdge(61, 300)],
    "jitter": lambda: [T.ResizeScale(0.5, 1.5, 128, 128), T.FixedSizeCrop((128, 128))],
    "extent": lambda: [T.RandomExtent((0.6, 1.2), (0.2, 0.2))],
}
KINDS = {"boxes": [], "polygons": MASKS, "bitmasks": BITMASKS, "keypoints": KEYPOINTS}


def boxes_as(annotations, form):
    """Yields the same annotations with boxes in another format."""
    for each in annotations:
        x, y, width, height = each["bbox"]
        box, mode = {
            "XYWH": (each["bbox"], BoxMode.XYWH_ABS),
            "XYXY": ([x, y, x + width, y + height], BoxMode.XYXY_ABS),
            "rotated": ([x + width, y + height, width, height, 30], BoxMode.XYWHA_ABS),
            "array": (np.array(each["bbox"]), BoxMode.XYWH_ABS),
        }[form]
        yield {**each, "bbox": box, "bbox_mode": mode}


def as_floats(annotations):
    """Yields the same annotations with all numbers as floats."""
    for each in annotations:
        floats = {**each, "bbox": [float(number) for number in each["bbox"]]}
        if "segmentation" in each:
            floats["segmentation"] = [[float(n) for n in part] for part in each["segmentation"]]
        if "keypoints" in each:
            floats["keypoints"] = [float(number) for number in each["keypoints"]]
        yield floats


@pytest.mark.parametrize("form", ["XYWH", "XYXY", "rotated", "array"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapper", [Mapper, FastMapper])
def test_whole_numbers_are_coordinates_like_any(record, mapper, kind, augmentation, form):
    """Detectron2 would truncate their transformed coordinates to integers, by almost a pixel."""
    whole = draw_objects(whole=True, keypoints=kind == "keypoints")
    if kind == "keypoints":
        for each in whole:
            each["keypoints"] = [int(number) for number in each["keypoints"]]
    some = [*whole[:2], *draw_objects(keypoints=kind == "keypoints")[2:]]
    mapper = mapper(settings(*KINDS[kind]), augmentations=AUGMENTATIONS[augmentation]())
    for given in (whole, some):
        annotations = list(boxes_as(given, form))
        for seed in range(2):
            made = []
            for each in (annotations, list(as_floats(annotations))):
                seed_everything(seed)
                made.append(mapper({**record, "annotations": each})["instances"])
            assert len(made[0]) and made[0].get_fields().keys() == made[1].get_fields().keys()
            assert_same_instances(*made)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("mapper", [Mapper, FastMapper])
def test_proposals_of_whole_numbers(record, mapper, is_train, augmentation):
    cfg = settings("MODEL.LOAD_PROPOSALS", "True")
    augmentations = AUGMENTATIONS[augmentation]()
    mapper = mapper(cfg, is_train=is_train, augmentations=augmentations)
    record["proposal_objectness_logits"] = np.array([3, 1])
    for mode in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        made = []
        for kind in (int, float):
            boxes = np.array([[21, 12, 70, 43], [10, 20, 95, 70]], kind)
            seed_everything(0)
            given = {**record, "proposal_boxes": boxes, "proposal_bbox_mode": mode}
            made.append(mapper(given)["proposals"])
        assert len(made[0])
        assert_same_instances(*made)


def test_arrays_in_a_record_stay_as_they_are(record):
    for each in record["annotations"]:
        each["segmentation"] = [np.array(polygon) for polygon in each["segmentation"]]
    compare(*both(*LARGE, *MASKS), record)
    compare(*both(*LARGE, *MASKS, *CROP), record)


def test_run_lengths(record):
    for each in record["annotations"]:
        each["segmentation"] = rle.merge(rle.frPyObjects(each["segmentation"], HEIGHT, WIDTH))
    compare(*both(*LARGE, *BITMASKS), record)


def test_large_scale_jitter(record):
    augmentations = [
        T.ResizeScale(0.1, 2.0, 128, 128),
        T.FixedSizeCrop((128, 128), pad_value=0),
        T.RandomFlip(),
    ]
    compare(*both(*MASKS, augmentations=augmentations), record)


def test_label_maps(record, tmp_path):
    labels = np.random.default_rng(2).integers(0, 19, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    ours, _ = compare(*both(*LARGE, *MASKS), record)
    assert ours["sem_seg"].shape == ours["image"].shape[1:]


def test_proposals(record):
    record["proposal_boxes"] = np.array([[1.0, 2, 30, 40], [5, 5, 5, 5], [10, 20, 110, 80]])
    record["proposal_objectness_logits"] = np.array([3.0, 2, 1])
    record["proposal_bbox_mode"] = BoxMode.XYXY_ABS
    ours, _ = compare(*both(*LARGE, "MODEL.LOAD_PROPOSALS", "True"), record)
    assert len(ours["proposals"]) == 2


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_evaluation_is_detectron2s_to_the_bit(record, image_format):
    cfg = settings("INPUT.FORMAT", image_format, "INPUT.MIN_SIZE_TEST", "57")
    for augmentations in ({}, {"augmentations": []}):
        mappers = [kind(cfg, is_train=False, **augmentations) for kind in (Mapper, DatasetMapper)]
        compare(*mappers, record, seeds=1, exact=True)


@pytest.mark.parametrize("options", [LARGE, [*SMALL, *MASKS, *CROP]], ids=str)
def test_the_mapper_of_evaluation_trains_as_detectron2s(record, options):
    cfg = settings(*options)
    compare(Mapper(cfg), DatasetMapper(cfg), record, exact=True)


def test_for_testing(record):
    ours, _ = compare(*both(is_train=False), record)
    assert "annotations" not in ours and "instances" not in ours


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images(record, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    record["file_name"] = draw(tmp_path / "turned.jpg", exif=exif)
    if orientation > 4:
        record["height"], record["width"] = WIDTH, HEIGHT
    compare(*both(*LARGE), record, seeds=2)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "P"), ("a.png", "RGBA")]
)
def test_other_kinds_of_images_to_the_bit_where_nothing_is_resized(record, tmp_path, name, mode):
    record["file_name"] = draw(tmp_path / name, mode)
    mappers = both(augmentations=[T.RandomFlip(), T.RandomCrop("absolute", (50, 60))])
    compare(*mappers, record, exact=True)


class Failing:
    """A mapper that fails for one image with the given error."""

    def __init__(self, error):
        self.error = error

    def __call__(self, record):
        if record["file_name"] == "bad.jpg":
            raise self.error
        return record


class Listed(Dataset):
    """Maps records as the loaders do."""

    def __init__(self, mapper):
        self.mapper = NamedErrors(mapper)

    def __len__(self):
        return 3

    def __getitem__(self, number):
        return self.mapper({"file_name": ["a.jpg", "bad.jpg", "c.jpg"][number]})


ERRORS = [
    OSError("broken"),
    ValueError("two\nlines"),
    KeyError("bbox"),
    IndexError(),
    cv2.error("resize failed"),
    ZeroDivisionError("by zero"),
    AssertionError(),
    RuntimeError("no memory"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "reason"),
    struct.error("unpack"),
    SizeMismatchError("other size"),
]


# A loader takes 5 s to end a worker that has raised an error.
@pytest.mark.parametrize(
    ("error", "workers"),
    [*((error, 0) for error in ERRORS), (ERRORS[2], 1), (ERRORS[8], 1)],
    ids=lambda value: type(value).__name__,
)
def test_whatever_goes_wrong_names_the_image_in_one_line(capsys, error, workers):
    loader = DataLoader(Listed(Failing(error)), num_workers=workers, collate_fn=list)
    with pytest.raises(UserError) as caught:
        list(loader)
    print_error(caught.value)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: bad.jpg cannot be loaded ({type(error).__name__}")


def test_annotations_that_cannot_be_taken_name_the_image_and_the_place(record):
    record["annotations"][2]["segmentation"] = [["x", "y"]]
    mapper = NamedErrors(FastMapper(settings(*MASKS)))
    with pytest.raises(UserError, match=rf"{record['file_name']} .*ValueError.*\.py line \d+"):
        mapper(record)


def test_a_broken_label_map_is_named(record, tmp_path):
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    (tmp_path / "labels.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"the label map .*labels.png cannot be read"):
        NamedErrors(FastMapper(settings()))(record)


def test_an_image_of_another_size(record):
    record["height"] += 1
    with pytest.raises(SizeMismatchError):
        FastMapper(settings())(record)


@pytest.mark.parametrize("model", ["GeneralizedRCNN", "RetinaNet", "FCOS", "SemanticSegmentor"])
def test_training_uses_it(model):
    assert type(build_train_mapper(settings("MODEL.META_ARCHITECTURE", model))) is FastMapper
