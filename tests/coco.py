"""A tiny data set of drawn shapes with the names and categories of COCO 2017.

With it, the shipped configs run unchanged in tests, without COCO.
"""

import json
import shutil
from pathlib import Path

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from contnet.data.datasets.shapes import make_shapes

__all__ = ["make_coco"]

_THINGS = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]


def _with_coco_categories(file: Path) -> dict:
    content = json.loads(file.read_text())
    pairs = zip(content["categories"], _THINGS, strict=False)
    ids = {category["id"]: thing["id"] for category, thing in pairs}
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    content["categories"] = _THINGS
    return content


def make_coco(root: Path, num_train: int = 12, num_val: int = 4) -> Path:
    """Makes ``root/coco`` in COCO's layout; returns ``root``, a DETECTRON2_DATASETS."""
    shapes = make_shapes(root / "shapes", num_train=num_train, num_val=num_val)
    for split in ("train", "val"):
        shutil.copytree(shapes / split, root / "coco" / f"{split}2017")
        target = root / "coco" / "annotations" / f"instances_{split}2017.json"
        target.parent.mkdir(exist_ok=True)
        source = shapes / "annotations" / f"instances_{split}.json"
        target.write_text(json.dumps(_with_coco_categories(source)))
    return root
