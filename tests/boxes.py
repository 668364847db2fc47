"""A small set in COCO format with one error of each kind, and runs with these predictions."""

import json
from pathlib import Path

import yaml
from PIL import Image

from contnet.config.keys import default_config

__all__ = ["CLASSES", "KINDS_BY_IMAGE", "make_boxes", "make_run"]

CLASSES = {3: "cat", 7: "dog"}
_FULL = [10, 10, 100, 100]
_LOW = [10, 10, 100, 40]  # IoU 0.4 with the full box
_CORNER = [150, 150, 20, 20]  # no overlap with the full box

# By image: objects as (category, box) and detections as (category, box, score).
_OBJECTS = {
    1: [(3, _FULL)],
    2: [(3, _FULL)],
    3: [(3, _FULL)],
    4: [(3, _FULL), (7, _CORNER)],
    5: [(3, _FULL)],
    6: [(7, _FULL)],
}
_DETECTIONS = [
    (1, 3, _FULL, 0.9),
    (1, 3, _FULL, 0.8),  # duplicate
    (2, 7, _FULL, 0.9),  # class
    (3, 3, _LOW, 0.7),  # location
    (4, 7, _LOW, 0.6),  # both; the cat is missed
    (4, 7, _CORNER, 0.95),
    (5, 3, _FULL, 0.95),
    (5, 3, _CORNER, 0.55),  # background
    (5, 7, _CORNER, 0.2),  # background, below the minimum score
    (6, 7, _FULL, 0.97),
]
KINDS_BY_IMAGE = {
    1: "duplicate",
    2: "class",
    3: "location",
    4: "both missed",
    5: "background",
    6: "no error",
}


def make_boxes(root: Path) -> Path:
    """Writes the annotation file and the images; returns the file's path."""
    images, annotations = [], []
    for number, objects in _OBJECTS.items():
        name = f"{number}.png"
        Image.new("RGB", (200, 200), (40 * number, 90, 120)).save(root / name)
        images.append({"id": number, "file_name": name, "width": 200, "height": 200})
        for category, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": key, "name": name} for key, name in CLASSES.items()]
    file = root / "truth.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return file


def make_run(folder: Path, truth: Path, detections=None, **settings) -> Path:
    """Writes the files of a training run, except weights; returns the folder."""
    rows = _DETECTIONS if detections is None else detections
    rows = [
        dict(zip(("image_id", "category_id", "bbox", "score"), each, strict=True)) for each in rows
    ]
    inference = folder / "inference" / "boxes"
    inference.mkdir(parents=True)
    (inference / "coco_instances_results.json").write_text(json.dumps(rows))
    metrics = [
        {"iteration": i, "total_loss": 2 - i / 50, "loss_cls": 1 - i / 200, "lr": 0.01, "time": 0.5}
        for i in range(19, 100, 20)
    ]
    metrics[-1] |= {"bbox/AP": 30.0, "bbox/AP-cat": 20.0, "bbox/AP-dog": 40.0}
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    ap = {"AP": 30.0, "APl": None, "AP-cat": 20.0, "AP-dog": 40.0, "AR@1": 50.0}
    results = [
        {"iteration": i, "dataset": "boxes", "weights": None, "metrics": {"bbox": values}}
        for i, values in ((49, {**ap, "AP": 35.0}), (99, ap))
    ]
    (folder / "results.json").write_text(json.dumps(results))
    cfg = default_config()
    cfg.merge_from_list(
        [
            *("DATASETS.REGISTER", [["boxes", str(truth), str(truth.parent)]]),
            *("DATASETS.TRAIN", ("boxes",), "DATASETS.TEST", ("boxes",), "MODEL.DEVICE", "cpu"),
            *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 2),
            *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
            *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "OUTPUT_DIR", str(folder)),
            *(value for pair in settings.items() for value in pair),
        ]
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(cfg.dump())))
    return folder
