"""A tiny data set for classification in ImageFolder's layout, drawn with a seed.

Each class is a shape in its own colour, at a random place on a dull background with noise, so that
the classes are easy to tell apart, even when cropped.
"""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["class_name", "draw_picture", "make_imagenet"]

_SHAPES = ("ellipse", "rectangle", "triangle")


def class_name(label: int) -> str:
    """Returns a name like a WordNet id; names sort like labels."""
    return f"n{label + 1:08d}"


def draw_picture(label: int, classes: int, size: int, rng: np.random.Generator) -> Image.Image:
    """Draws an image of a class, ``size`` pixels high and a third wider."""
    width = size * 4 // 3
    picture = Image.fromarray(rng.integers(90, 130, (size, width, 3)).astype(np.uint8))
    red, green, blue = colorsys.hsv_to_rgb(label / classes, 1, rng.uniform(0.8, 1))
    colour = round(255 * red), round(255 * green), round(255 * blue)
    side = round(size * rng.uniform(0.6, 0.8))
    left, top = int(rng.integers(width - side)), int(rng.integers(size - side))
    box = [left, top, left + side, top + side]
    pen = ImageDraw.Draw(picture)
    shape = _SHAPES[label % len(_SHAPES)]
    if shape == "triangle":
        pen.polygon([(left, top + side), (left + side, top + side), (left, top)], fill=colour)
    else:
        getattr(pen, shape)(box, fill=colour)
    return picture


def make_imagenet(
    folder: Path, classes: int = 3, train: int = 8, val: int = 4, size: int = 48, seed: int = 0
) -> Path:
    """Makes ``folder/imagenet/{train,val}/CLASS/N.JPEG``; returns ``folder``.

    Args:
        folder: folder for DETECTRON2_DATASETS.
        classes: number of classes.
        train: number of training images per class.
        val: number of validation images per class.
        size: height of the images in pixels; they are a third wider.
        seed: seed of all random values.
    """
    folder = Path(folder)
    for split, (name, count) in enumerate({"train": train, "val": val}.items()):
        for label in range(classes):
            target = folder / "imagenet" / name / class_name(label)
            target.mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([seed, split, label, number])
                picture = draw_picture(label, classes, size, rng)
                picture.save(target / f"{number}.JPEG", format="JPEG", quality=92)
    return folder
