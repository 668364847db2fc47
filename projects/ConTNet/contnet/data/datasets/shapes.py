"""A small detection data set of drawn shapes in COCO format, generated from a seed.

With it, the whole pipeline (training, evaluation, pictures) runs without a downloaded data set.
Each image shows 4 to 8 rotated, textured shapes of 20 to 100 pixels that partly hide each other, on
a background of gradients, blotches and distracting strokes, with noise.

Boxes, polygons and areas describe the VISIBLE part of an object, as in COCO, and agree exactly: the
polygons run along pixel edges, so that they rasterise to exactly the pixels that `area` counts and
`bbox` encloses. Every object shows at least `shapes_drawing.MIN_VISIBLE` of its pixels.

The folder of the data set contains::

    shapes.json                               its parameters
    annotations/instances_{train,val}.json
    {train,val}/000001.jpg ...
"""

import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from contnet.data.datasets.shapes_drawing import (
    CLASS_NAMES,
    ShapeObject,
    draw_picture,
    mask_box,
    mask_polygons,
)
from contnet.utils.errors import UserError
from contnet.utils.files import explain_os_error

__all__ = ["ShapesConfig", "crop_shapes", "make_shapes", "shapes_datasets"]

_DRAWING = 2  # Increased when the same parameters would draw other images.
_STAMP = "shapes.json"
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShapesConfig:
    """The parameters of a data set.

    Attributes:
        num_train: number of training images.
        num_val: number of validation images; their random streams differ from the training images'.
        min_side: shortest side of an image, in pixels; at least 128.
        max_side: longest side of an image, in pixels. Height and width are drawn independently.
        seed: random seed; an image depends only on it, the split and the image's number, not on the
            number of images.
    """

    num_train: int = 400
    num_val: int = 60
    min_side: int = 192
    max_side: int = 288
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_train < 1 or self.num_val < 1:
            raise UserError(f"shapes: num_train and num_val must be at least 1, not {self}")
        if not 128 <= self.min_side <= self.max_side:
            raise UserError(f"shapes: sides must satisfy 128 <= min_side <= max_side, not {self}")
        if self.seed < 0:
            raise UserError(f"shapes: the seed must not be negative, not {self.seed}")


def _annotation(thing: ShapeObject, image_id: int, annotation_id: int) -> dict:
    box = mask_box(thing.visible)
    x, y, width, height = box
    polygons = mask_polygons(thing.visible[y : y + height, x : x + width])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": thing.class_index + 1,
        "bbox": box,
        "area": int(thing.visible.sum()),
        "segmentation": [(corners + np.array([x, y])).ravel().tolist() for corners in polygons],
        "iscrowd": 0,
    }


def _write_split(config: ShapesConfig, split: str, root: Path) -> None:
    """Writes a split's images and its annotation file."""
    (root / split).mkdir()
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(getattr(config, f"num_{split}")):
        rng = np.random.default_rng([config.seed, _SPLITS.index(split), number])
        picture, objects = draw_picture(rng, config.min_side, config.max_side)
        image_id, name = number + 1, f"{number + 1:06d}.jpg"
        picture.save(root / split / name, quality=92)
        images.append(
            {"id": image_id, "file_name": name, "height": picture.height, "width": picture.width}
        )
        for thing in objects:
            annotations.append(_annotation(thing, image_id, len(annotations) + 1))
    content = {
        "info": {"description": f"drawn shapes, {split}", "seed": config.seed},
        "licenses": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)],
        "images": images,
        "annotations": annotations,
    }
    _annotation_file(root, split).write_text(json.dumps(content), encoding="utf-8")


def _annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _is_made(root: Path, config: ShapesConfig) -> bool:
    """Whether `root` has the whole data set; False if it is empty, UserError for anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        stamp = json.loads((root / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{root} exists and is not a shapes data set: use another folder") from None
    if stamp != _stamp(config):
        raise UserError(
            f"{root} contains shapes with other parameters ({_describe(stamp)}; requested: "
            f"{_describe(_stamp(config))}): use another folder or remove this one"
        )
    for split in _SPLITS:
        found = len(list((root / split).glob("*.jpg")))
        if found != stamp[f"num_{split}"] or not _annotation_file(root, split).is_file():
            raise UserError(
                f"{root} lacks files of its {split} split: remove it to create it again"
            )
    return True


def _stamp(config: ShapesConfig) -> dict:
    return {"drawing": _DRAWING, **asdict(config)}


def _describe(stamp: object) -> str:
    if not isinstance(stamp, dict):
        return "unreadable"
    return ", ".join(f"{key} {value}" for key, value in stamp.items())


def make_shapes(root: str | Path, config: ShapesConfig | None = None, **overrides: int) -> Path:
    """Creates the data set in `root`, unless it exists.

    It is created in a hidden sibling folder that is renamed at the end, so that `root` never has a
    part of a data set. If two processes create it at once, the first to finish wins and both
    return. The same parameters give the same bytes (with the same versions of NumPy and Pillow).

    Args:
        root: folder of the data set; parents are created. It may be an empty folder.
        config: the parameters; the defaults of `ShapesConfig` if None.
        overrides: fields of `ShapesConfig` to replace, e.g. ``num_train=40``.

    Returns:
        The absolute path of `root`.

    Raises:
        UserError: if parameters are not valid, the folder cannot be written, or `root` has other
            files, a data set with other parameters, or an incomplete one. Its content is kept.
        TypeError: if an override is not a field of `ShapesConfig`.
    """
    root = Path(root).resolve()
    config = ShapesConfig(**{**asdict(config or ShapesConfig()), **overrides})
    if _is_made(root, config):
        return root
    making = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        (making / "annotations").mkdir(parents=True)
        for split in _SPLITS:
            _write_split(config, split, making)
        (making / _STAMP).write_text(json.dumps(_stamp(config)) + "\n", encoding="utf-8")
        os.rename(making, root)
    except OSError as error:
        # Another process may have been faster: its set is the same as ours.
        if not _is_made(root, config):
            reason = explain_os_error(error, root)
            raise UserError(f"{root}: the shapes cannot be written: {reason}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return root


def shapes_datasets(root: str | Path) -> list[list[str]]:
    """Returns `shapes_train` and `shapes_val` as entries of DATASETS.REGISTER.

    Args:
        root: a folder that `make_shapes` created.
    """
    root = Path(root).resolve()
    return [
        [f"shapes_{split}", str(_annotation_file(root, split)), str(root / split)]
        for split in _SPLITS
    ]


def crop_shapes(root: str | Path, folder: str | Path) -> None:
    """Crops every object of a data set, with a margin of an eighth, for classification.

    Args:
        root: a folder that `make_shapes` created.
        folder: gets ``{train,val}/<class>/<object>.png``; its previous content is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for split in _SPLITS:
        content = json.loads(_annotation_file(Path(root), split).read_text(encoding="utf-8"))
        for name in CLASS_NAMES:
            Path(folder, split, name).mkdir(parents=True)
        files = {image["id"]: Path(root, split, image["file_name"]) for image in content["images"]}
        for thing in content["annotations"]:
            x, y, width, height = thing["bbox"]
            margin = max(width, height) / 8
            corners = (x - margin, y - margin, x + width + margin, y + height + margin)
            target = Path(
                folder, split, CLASS_NAMES[thing["category_id"] - 1], f"{thing['id']}.png"
            )
            with Image.open(files[thing["image_id"]]) as image:
                bounds = (0, 0, image.width, image.height)
                low = [max(a, b) for a, b in zip(corners[:2], bounds[:2], strict=True)]
                high = [min(a, b) for a, b in zip(corners[2:], bounds[2:], strict=True)]
                image.crop((*low, *high)).save(target)
