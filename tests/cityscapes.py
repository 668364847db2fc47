"""Drawn street scenes in Cityscapes' layout, small and seeded.

Each scene covers the rules of Cityscapes' labels: objects that hide parts of others, a group, a
region that does not count, a deleted polygon, and a label that is not drawn.
"""

import json
from pathlib import Path

import numpy as np
from cityscapesscripts.helpers.labels import id2label
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_cityscapes
from PIL import Image

from contnet.data.datasets.cityscapes_labels import prepare_cityscapes

__all__ = ["draw_scene", "make_cityscapes", "use_cityscapes", "write_polygons"]

CITIES = ("drawnham", "paintstadt")


def _box(left: float, top: float, width: float, height: float) -> list[list[int]]:
    right, bottom = left + width, top + height
    corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return [[round(x), round(y)] for x, y in corners]


def _car(left: float, bottom: float, size: float) -> list[list[int]]:
    outline = [(0, 0), (0, -0.3), (0.2, -0.35), (0.35, -0.6), (0.7, -0.6), (0.85, -0.3), (1, 0)]
    return [[round(left + size * x), round(bottom + size * y)] for x, y in outline]


def draw_scene(rng: np.random.Generator, height: int = 64, width: int = 128) -> list[dict]:
    """Returns the objects of a scene in drawing order, as in ``*_polygons.json``."""
    horizon = height * rng.uniform(0.35, 0.45)
    scene = [
        ("sky", _box(0, 0, width, horizon)),
        ("building", _box(rng.integers(0, 20), 4, width * 0.4, horizon)),
        ("vegetation", _box(width * 0.6, horizon * 0.4, width * 0.3, horizon)),
        ("road", _box(0, horizon, width, height - horizon)),
        ("sidewalk", [[0, round(horizon)], [width // 4, round(horizon)], [0, height - 1]]),
        ("pole", _box(width * rng.uniform(0.4, 0.6), 2, 3, horizon)),
        ("traffic sign", _box(width * 0.55, 2, 9, 8)),
    ]
    for _ in range(3):  # they sometimes overlap
        size = rng.uniform(20, 36)
        left, bottom = rng.uniform(-8, width - 20), rng.uniform(horizon + 12, height - 2)
        scene.append(("car", _car(left, bottom, size)))
        scene.append(("license plate", _box(left + 4, bottom - 5, 5, 3)))
    for label in ("person", "person", "rider"):
        left, bottom = rng.uniform(2, width - 12), rng.uniform(horizon + 14, height - 1)
        scene.append((label, _box(left, bottom - 26, 9, 26)))
    scene.append(("cargroup", _box(width - 26, horizon - 4, 24, 10)))
    scene.append(("bicycle", _box(rng.uniform(0, width - 20), height - 16, 18, 9)))
    objects = [{"label": label, "polygon": polygon} for label, polygon in scene]
    objects.append({"label": "bus", "polygon": _box(0, 0, width, height), "deleted": 1})
    return [*objects, {"label": "out of roi", "polygon": _box(0, height - 5, width, 5)}]


def write_polygons(file: Path, objects: list[dict], height: int = 64, width: int = 128) -> None:
    """Writes a scene as Cityscapes' polygon file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"imgHeight": height, "imgWidth": width, "objects": objects}
    file.write_text(json.dumps(content))


def _paint(rng: np.random.Generator, instance_ids: np.ndarray) -> Image.Image:
    """Paints an image in the colours of the classes, each object in its own shade, with noise."""
    picture = np.zeros((*instance_ids.shape, 3))
    for value in np.unique(instance_ids):
        colour = np.array(id2label[value if value < 1000 else value // 1000].color)
        picture[instance_ids == value] = colour * rng.uniform(0.5, 1)
    picture += rng.normal(0, 8, picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def make_cityscapes(
    root: Path, num_train: int = 4, num_val: int = 2, height: int = 64, width: int = 128
) -> Path:
    """Makes ``root/cityscapes`` with label files; returns ``root``, a DETECTRON2_DATASETS."""
    rng = np.random.default_rng(0)
    folder = root / "cityscapes"
    for split, count in {"train": num_train, "val": num_val}.items():
        for number in range(count):
            city = CITIES[number % 2]
            stem = Path(split, city, f"{city}_{number:06d}_000019")
            polygons = folder / "gtFine" / f"{stem}_gtFine_polygons.json"
            write_polygons(polygons, draw_scene(rng, height, width), height, width)
    prepare_cityscapes(folder, workers=1)
    for file in sorted(folder.glob("gtFine/*/*/*_instanceIds.png")):
        name = file.name.replace("gtFine_instanceIds", "leftImg8bit")
        picture = folder / "leftImg8bit" / file.parent.relative_to(folder / "gtFine") / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        _paint(rng, np.asarray(Image.open(file))).save(picture)
    return root


def use_cityscapes(root: Path) -> None:
    """Points Detectron2's names, such as cityscapes_fine_sem_seg_val, to ``root/cityscapes``.

    This is only for this process; a process with DETECTRON2_DATASETS=root does not need it.
    """
    for name in DatasetCatalog.list():
        if name.startswith(("cityscapes_fine_instance_seg_", "cityscapes_fine_sem_seg_")):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    register_all_cityscapes(str(root))
