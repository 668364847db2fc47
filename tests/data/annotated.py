"""Registered data sets with all kinds of annotations, which are cached."""

import json
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from cityscapes import use_cityscapes
from conftest import REPOSITORY, SMALL
from detectron2.data import get_detection_dataset_dicts

from contnet.config import load_config
from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.records import Records

LEAF = str(REPOSITORY / "configs" / "mask_rcnn_contti.yaml")
SCENES = ("cityscapes_fine_instance_seg_train", "cityscapes_fine_sem_seg_train")
HEIGHT, WIDTH = 48, 64


def _polygon(rng: np.random.Generator, points: int = 5) -> list[float]:
    return np.round(rng.uniform(1, HEIGHT - 1, 2 * points), 2).tolist()


def _mask(rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    top, left = rng.integers(0, 20, 2)
    mask[top : top + 12, left : left + 17] = 1
    return np.asfortranarray(mask)


def _runs(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends.tolist(), flat.size]).tolist()
    return runs if flat[0] == 0 else [0, *runs]


def _segmentations(rng: np.random.Generator) -> dict[str, object]:
    compressed = mask_util.encode(_mask(rng))
    return {
        "one polygon": [_polygon(rng)],
        "two polygons": [_polygon(rng), _polygon(rng, 9)],
        "whole numbers": [[3, 4, 20, 5, 11, 30]],
        "some whole numbers": [[3, 4.5, 20, 5, 11.25, 30], _polygon(rng)],
        "a part too short": [[1.0, 2.0, 3.0, 4.0], _polygon(rng)],
        "an odd part": [_polygon(rng), [*_polygon(rng), 1.0]],
        "not finite": [[1.0, float("inf"), 2.0, 3.0, 4.0, 5.0]],
        "nothing left": [[1.0, 2.0, 3.0, 4.0]],
        "none": [],
        "compressed": {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
        "runs": {"size": [HEIGHT, WIDTH], "counts": _runs(_mask(rng))},
    }


def draw_content() -> dict:
    """Makes an annotation file with everything that Detectron2 reads or skips."""
    rng = np.random.default_rng(5)
    items = []
    for number, segmentation in enumerate(_segmentations(rng).values()):
        items.append({"image_id": 40 - 7 * (number % 3), "segmentation": segmentation})
    items += [{"image_id": 26} for _ in range(2)]
    items[3]["keypoints"] = [10, 11, 2, 12.5, 13, 1, 0, 0, 0]
    items[4]["keypoints"] = []
    items.append({"image_id": 7, "segmentation": items[10]["segmentation"], "iscrowd": 1})
    items.append({"image_id": 999})  # without an image
    for number, item in enumerate(items, 1):
        box = np.round(rng.uniform(1, 20, 4), 2).tolist()
        item.update({"id": 100 - number, "category_id": [3, 7, 20][number % 3], "bbox": box})
        item.setdefault("iscrowd", 0)
        item["area"] = 30.5
    items[0]["bbox"] = [1, 2, 30, 20]
    del items[1]["iscrowd"]
    sizes = {40: (WIDTH, HEIGHT), 33: (WIDTH, HEIGHT), 26: (HEIGHT, WIDTH), 7: (WIDTH, HEIGHT)}
    images = [
        {"id": key, "file_name": f"ümlaut/{key}.jpg", "width": width, "height": height}
        for key, (width, height) in sizes.items()
    ]
    images.append({"id": 8, "file_name": "empty.jpg", "width": WIDTH, "height": HEIGHT})
    categories = [{"id": key, "name": f"class {key}"} for key in (20, 3, 7)]
    return {"images": images, "annotations": items, "categories": categories}


def usable_content() -> dict:
    """Returns the same content without the annotations that the checks refuse."""
    content = draw_content()
    items = content["annotations"]
    refused = {"a part too short", "an odd part", "not finite", "nothing left", "none"}
    wrong = [
        i for i, kind in enumerate(_segmentations(np.random.default_rng(0))) if kind in refused
    ]
    content["annotations"] = [
        item
        for i, item in enumerate(items)
        if i not in wrong and item["image_id"] != 999 and "segmentation" in item
    ]
    content["annotations"][1]["iscrowd"] = 0
    return content


def described(value: object) -> object:
    """Returns a value with all its types and the order of its keys."""
    if isinstance(value, dict):
        return [(key, described(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [described(each) for each in value]
    return type(value), value


class Drawn:
    """A registered data set in COCO format, and a config that caches its annotations."""

    def __init__(self, folder: Path, content: dict, *options: str):
        self.file = folder / "drawn.json"
        self.cache = folder / "cache"
        self.write(content)
        for image in content["images"]:
            path = folder / "images" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        own = {
            "DATASETS.REGISTER": [["drawn", str(self.file), str(folder / "images")]],
            "DATASETS.TRAIN": ("drawn",),
            "DATASETS.TEST": (),
            "DATASETS.CACHE_DIR": str(self.cache),
            "INPUT.MASK_FORMAT": "bitmask",
            "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        }
        values = [str(each) for pair in own.items() for each in pair]
        values += ["DATASETS.CHECK_IMAGES", "none"]  # they are empty files
        self.cfg = load_config(LEAF, [*SMALL, *values, *options])
        register_datasets(self.cfg)

    def write(self, content: dict) -> None:
        self.file.write_text(json.dumps(content))

    def load(self, train: bool = False) -> Records | list:
        return load_dataset_dicts(self.cfg, ["drawn"], train)

    def kept(self, ending: str = "records") -> list[Path]:
        return sorted(self.cache.glob(f"*.{ending}"))


@pytest.fixture
def usable(tmp_path) -> Drawn:
    return Drawn(tmp_path, usable_content())


@pytest.fixture
def scenes(cityscapes_root, tmp_path):
    """Makes a copy of the drawn Cityscapes, and a config."""
    root = tmp_path / "scenes"
    shutil.copytree(cityscapes_root, root)
    use_cityscapes(root)
    options = ["DATASETS.CACHE_DIR", str(tmp_path / "cache")]
    config = str(REPOSITORY / "configs" / "cityscapes" / "mask_rcnn_contti.yaml")
    yield root / "cityscapes", load_config(config, options)
    use_cityscapes(cityscapes_root)


def scenes_of_detectron2(name: str) -> list[dict]:
    """Returns Detectron2's records sorted by name; their own order is that of the file system."""
    return sorted(get_detection_dataset_dicts(name), key=lambda record: record["file_name"])
