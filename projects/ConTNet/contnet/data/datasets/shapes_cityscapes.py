"""The drawn shapes as street scenes in Cityscapes' layout.

Each shape has a class of Cityscapes with instances, and the background is road. With them, Mask
R-CNN and PSPNet on Cityscapes run without the download.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from contnet.data.datasets.cityscapes_labels import prepare_cityscapes
from contnet.utils.errors import UserError

__all__ = ["SHAPE_LABELS", "shapes_to_cityscapes"]

# Labels of circle, square, triangle and star.
SHAPE_LABELS = ("car", "truck", "person", "bicycle")
_CITY = "shapes"


def _scene(image: dict, annotations: list[dict]) -> dict:
    """Returns the content of an image's ``*_polygons.json``, in drawing order."""
    height, width = image["height"], image["width"]
    ground = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    objects = [{"label": "road", "polygon": ground}]
    for each in annotations:
        # Cityscapes' objects have one polygon each: an object in pieces becomes several objects.
        for corners in each["segmentation"]:
            polygon = [list(corner) for corner in zip(corners[::2], corners[1::2], strict=True)]
            objects.append({"label": SHAPE_LABELS[each["category_id"] - 1], "polygon": polygon})
    return {"imgHeight": height, "imgWidth": width, "objects": objects}


def shapes_to_cityscapes(root: str | Path, folder: str | Path) -> None:
    """Converts a set of shapes to Cityscapes' layout with all its label files.

    Args:
        root: a folder that `contnet.data.datasets.shapes.make_shapes` created.
        folder: folder for DETECTRON2_DATASETS; gets ``cityscapes/{leftImg8bit,gtFine}``.

    Raises:
        UserError: if ``folder/cityscapes`` exists; its content is kept.
    """
    target = Path(folder, "cityscapes")
    if target.exists():
        raise UserError(
            f"{target} already exists: give another folder for the shapes in Cityscapes' layout"
        )
    for split in ("train", "val"):
        file = Path(root, "annotations", f"instances_{split}.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        pictures, labels = (target / kind / split / _CITY for kind in ("leftImg8bit", "gtFine"))
        pictures.mkdir(parents=True)
        labels.mkdir(parents=True)
        for image in content["images"]:
            stem = f"{_CITY}_{image['id']:06d}_000019"
            with Image.open(Path(root, split, image["file_name"])) as picture:
                picture.save(pictures / f"{stem}_leftImg8bit.png")
            inside = [each for each in content["annotations"] if each["image_id"] == image["id"]]
            scene = json.dumps(_scene(image, inside))
            (labels / f"{stem}_gtFine_polygons.json").write_text(scene, encoding="utf-8")
    prepare_cityscapes(target)
