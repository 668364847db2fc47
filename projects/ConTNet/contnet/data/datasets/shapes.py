"""A small detection data set of drawn shapes in COCO's format, made from a seed.

It lets the whole pipeline (training, evaluation, pictures) run where no data set was downloaded.
Each image shows 4 to 8 rotated, textured shapes of 20 to 100 pixels that hide parts of each other,
over a background of gradients, blotches and distracting strokes, with noise.

Boxes, polygons and areas describe the VISIBLE part of an object, as in COCO, and agree exactly: the
polygons run along pixel edges, so that they rasterise to the very pixels that `area` counts and
`bbox` encloses. Every object shows at least `MIN_VISIBLE` of its pixels: no remains are unlabelled.

The set's folder holds::

    shapes.json                               the parameters it was made with
    annotations/instances_{train,val}.json
    {train,val}/000001.jpg ...
"""

import json
import math
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from contnet.utils.errors import UserError

__all__ = [
    "CLASS_NAMES",
    "MIN_VISIBLE",
    "ShapesConfig",
    "crop_shapes",
    "make_shapes",
    "shapes_datasets",
]

CLASS_NAMES = ("circle", "square", "triangle", "star")
MIN_VISIBLE = 0.6

_DRAWING = 2  # Goes up when the same parameters would draw other images.
_STAMP = "shapes.json"
_SPLITS = ("train", "val")
_SUPERSAMPLE = 4
_MIN_BOX = 20  # Of the longer side of the visible part, in pixels.
_DIAMETERS = (28.0, 98.0)  # Of the circle around an object; with anti-aliasing up to 100 pixels.
_PLACING_TRIES = 40
_MIN_CONTRAST = 120.0


@dataclass(frozen=True)
class ShapesConfig:
    """What a data set is made from.

    Attributes:
        num_train: number of training images.
        num_val: number of validation images; their random streams differ from the training images'.
        min_side: shortest side of an image, in pixels; at least 128.
        max_side: longest side of an image, in pixels. Height and width are drawn independently.
        seed: an image depends on the seed, its split and its number only, not on how many are made.
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


@dataclass(frozen=True)
class _Object:
    """One drawn object; `visible` is a boolean (H, W) map of its pixels that nothing hides."""

    class_index: int
    visible: np.ndarray
    full_area: int

    def without(self, cover: np.ndarray) -> "_Object":
        return _Object(self.class_index, self.visible & ~cover, self.full_area)

    def shows_enough(self) -> bool:
        if self.visible.sum() < MIN_VISIBLE * self.full_area:
            return False
        _, _, width, height = _box(self.visible)
        return max(width, height) >= _MIN_BOX


# ------------------------------------------------------------------------------
# Outlines: corners (N, 2) inside the unit circle
# ------------------------------------------------------------------------------


def _on_circle(radii: np.ndarray) -> np.ndarray:
    """Corners at equal angles, the first at the top."""
    angles = np.arange(len(radii)) * (2 * math.pi / len(radii)) - math.pi / 2
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


_OUTLINES: dict[str, np.ndarray] = {
    "circle": _on_circle(np.ones(72)),
    "square": _on_circle(np.ones(4)),
    "triangle": _on_circle(np.ones(3)),
    "star": _on_circle(np.tile([1.0, 0.45], 5)),
}


def _alpha(name: str, diameter: float, angle: float, offset: np.ndarray) -> np.ndarray:
    """Coverage of each pixel by a shape, anti-aliased.

    Args:
        name: one of `CLASS_NAMES`.
        diameter: of the circle around the shape, in pixels.
        angle: rotation in radians.
        offset: (2,) position of the centre against the patch's centre, below one pixel.

    Returns:
        Square (S, S) float array in 0..1.
    """
    side = math.ceil(diameter) + 4
    middle = side / 2 + offset
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    canvas = Image.new("L", (side * _SUPERSAMPLE,) * 2)
    pen = ImageDraw.Draw(canvas)
    corners = _OUTLINES[name] @ rotation * (diameter / 2)
    pen.polygon(((corners + middle) * _SUPERSAMPLE).ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float32) / 255


# ------------------------------------------------------------------------------
# Paint: backgrounds and textures, float (H, W, 3) in 0..255
# ------------------------------------------------------------------------------


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 255, 3).astype(np.float32)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A linear ramp from 0 to 1 in a random direction, shape (H, W, 1)."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ramp = x * math.cos(angle) + y * math.sin(angle)
    return ((ramp - ramp.min()) / (np.ptp(ramp) + 1e-6))[..., None]


def _blotches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colour clouds around zero."""
    cells = int(rng.integers(3, 10))
    coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
    cloud = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(cloud, dtype=np.float32) - 127.5) * rng.uniform(0.1, 0.45)


def _strokes(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draws lines, arcs and zigzags, which belong to no class, over an image."""
    height, width = image.shape[:2]
    canvas = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 10)):
        colour, thickness = tuple(_colour(rng).astype(int).tolist()), int(rng.integers(1, 5))
        at = rng.uniform((0, 0), (width, height))
        kind = rng.choice(["line", "arc", "zigzag"])
        if kind == "arc":
            start, reach = rng.uniform(0, 360), rng.uniform(15, 60, 2)
            box = [*(at - reach), *(at + reach)]
            pen.arc(box, start, start + rng.uniform(40, 160), fill=colour, width=thickness)
        else:
            steps = rng.uniform(-70, 70, (1 if kind == "line" else 4, 2))
            path = np.concatenate([at[None], at + np.cumsum(steps, axis=0)])
            pen.line(path.ravel().tolist(), fill=colour, width=thickness)
    return np.asarray(canvas, dtype=np.float32)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    ramp = _ramp(rng, height, width)
    image = _colour(rng) * (1 - ramp) + _colour(rng) * ramp
    return _strokes(rng, image + _blotches(rng, height, width))


def _texture(rng: np.random.Generator, side: int, under: np.ndarray) -> np.ndarray:
    """A square of paint for an object whose surroundings have the mean colour `under`."""
    colour = _colour(rng)
    while np.linalg.norm(colour - under) < _MIN_CONTRAST:
        colour = _colour(rng)
    other = np.clip(colour + rng.uniform(-40, 40, 3).astype(np.float32), 0, 255)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    period, angle = rng.uniform(6, 16), rng.uniform(0, math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    across = (y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period)
    kind = rng.choice(["plain", "ramp", "stripes", "checks", "blotches"])
    if kind == "plain":
        return np.broadcast_to(colour, (side, side, 3))
    if kind == "blotches":
        return colour + 0.7 * _blotches(rng, side, side)
    mix = {
        "ramp": lambda: _ramp(rng, side, side),
        "stripes": lambda: (np.sin(along) > 0)[..., None],
        "checks": lambda: (np.sin(along) * np.sin(across) > 0)[..., None],
    }[kind]()
    return colour * (1 - mix) + other * mix


# ------------------------------------------------------------------------------
# Annotations
# ------------------------------------------------------------------------------


def _box(mask: np.ndarray) -> list[int]:
    """The tight box (x, y, width, height) of a mask that is not empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _pixel_edges(mask: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Unit edges around a mask as {start corner: directions}, the mask at their right-hand side."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for neighbour, corner, step in (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),  # above: along the top edge, rightwards
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    ):
        rows, columns = np.nonzero(inside & ~neighbour)
        for x, y in zip((columns + corner[0]).tolist(), (rows + corner[1]).tolist(), strict=True):
            edges.setdefault((x, y), []).append(step)
    return edges


def _loops(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines (N, 2) of a mask: clockwise as seen around parts, the other way in holes."""
    edges = _pixel_edges(mask)
    loops = []
    while edges:
        start = at = next(iter(edges))
        step, corners = (0, 0), []
        while at != start or not corners:
            # Where two pixels touch at a corner only, either way on encloses the same pixels.
            taken = edges[at].pop()
            if not edges[at]:
                del edges[at]
            if taken != step:
                corners.append(at)
            at, step = (at[0] + taken[0], at[1] + taken[1]), taken
        loops.append(np.array(corners))
    return loops


def _signed_area(loop: np.ndarray) -> float:
    x, y = loop[:, 0], loop[:, 1]
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Polygons, (N, 2) corners each, that together cover exactly the mask's pixels.

    COCO's polygons have no holes: a mask with a hole is cut through the hole from top to bottom and
    its halves are outlined one by one.
    """
    loops = _loops(mask)
    hole = next((loop for loop in loops if _signed_area(loop) < 0), None)
    if hole is None:
        return loops
    cut = int(hole[:, 0].min() + hole[:, 0].max()) // 2
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return _polygons(left) + _polygons(right)


def _annotation(thing: _Object, image_id: int, annotation_id: int) -> dict:
    box = _box(thing.visible)
    x, y, width, height = box
    polygons = _polygons(thing.visible[y : y + height, x : x + width])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": thing.class_index + 1,
        "bbox": box,
        "area": int(thing.visible.sum()),
        "segmentation": [(corners + np.array([x, y])).ravel().tolist() for corners in polygons],
        "iscrowd": 0,
    }


# ------------------------------------------------------------------------------
# Images and the set
# ------------------------------------------------------------------------------


def _add_object(rng: np.random.Generator, image: np.ndarray, objects: list[_Object]) -> None:
    """Paints one more object over `image`, and appends it to `objects`, unless it finds no place.

    A place must leave enough of the new object inside the image and enough of the others visible.
    """
    height, width = image.shape[:2]
    class_index = int(rng.integers(len(CLASS_NAMES)))
    diameter = rng.uniform(*_DIAMETERS)
    angle = rng.uniform(0, 2 * math.pi)
    alpha = _alpha(CLASS_NAMES[class_index], diameter, angle, rng.uniform(-0.5, 0.5, 2))
    side, inner = len(alpha), alpha >= 0.5
    for _ in range(_PLACING_TRIES):
        x, y = rng.integers(-side // 3, (width - 2 * side // 3, height - 2 * side // 3)).tolist()
        ys, xs = slice(max(y, 0), min(y + side, height)), slice(max(x, 0), min(x + side, width))
        patch = np.s_[ys.start - y : ys.stop - y, xs.start - x : xs.stop - x]
        visible = np.zeros((height, width), dtype=bool)
        visible[ys, xs] = inner[patch]
        new = _Object(class_index, visible, int(inner.sum()))
        rest = [other.without(visible) for other in objects]
        if all(thing.shows_enough() for thing in [new, *rest]):
            break
    else:
        return
    paint = _texture(rng, side, image[visible].mean(axis=0))[patch]
    cover = alpha[patch][..., None]
    image[ys, xs] = image[ys, xs] * (1 - cover) + paint * cover
    objects[:] = [*rest, new]


def _draw(config: ShapesConfig, split: str, number: int) -> tuple[Image.Image, list[_Object]]:
    """Draws image `number` (from 0) of a split."""
    rng = np.random.default_rng([config.seed, _SPLITS.index(split), number])
    height, width = rng.integers(config.min_side, config.max_side, 2, endpoint=True).tolist()
    image = _background(rng, height, width)
    objects: list[_Object] = []
    wanted = int(rng.integers(4, 9))
    for _ in range(3 * wanted):
        if len(objects) < wanted:
            _add_object(rng, image, objects)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(2, 10)
    return Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)), objects


def _write_split(config: ShapesConfig, split: str, root: Path) -> None:
    """Writes a split's images and its annotation file."""
    (root / split).mkdir()
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(getattr(config, f"num_{split}")):
        picture, objects = _draw(config, split, number)
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
    """Whether `root` holds the whole set (True) or nothing; UserError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        stamp = json.loads((root / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{root} exists and is no shapes data set: give another folder") from None
    if stamp != _stamp(config):
        raise UserError(
            f"{root} holds shapes made with other parameters ({_describe(stamp)}; asked for: "
            f"{_describe(_stamp(config))}): give another folder or remove this one"
        )
    for split in _SPLITS:
        found = len(list((root / split).glob("*.jpg")))
        if found != stamp[f"num_{split}"] or not _annotation_file(root, split).is_file():
            raise UserError(f"{root} lacks files of its {split} split: remove it to make it anew")
    return True


def _stamp(config: ShapesConfig) -> dict:
    return {"drawing": _DRAWING, **asdict(config)}


def _describe(stamp: object) -> str:
    if not isinstance(stamp, dict):
        return "unreadable"
    return ", ".join(f"{key} {value}" for key, value in stamp.items())


def make_shapes(root: str | Path, config: ShapesConfig | None = None, **overrides: int) -> Path:
    """Makes the data set under `root`, unless it is there already.

    It is made in a hidden sibling folder that is renamed at the end, so that `root` never holds a
    part of a set; of two processes that make it at once, the first to finish wins and both return.
    The same parameters give the same bytes (under the same versions of NumPy and Pillow).

    Args:
        root: the set's folder; parents are made. An empty folder counts as none.
        config: the parameters; the defaults of `ShapesConfig` if None.
        overrides: fields of `ShapesConfig` to replace, e.g. ``num_train=40``.

    Returns:
        The absolute path of `root`.

    Raises:
        UserError: bad parameters, a place that can't be written, or `root` holds something else:
            other files, a set made with other parameters, or a set that has lost files. What it
            holds is left as it is.
        TypeError: an override that is no field of `ShapesConfig`.
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
            raise UserError(f"{root}: the shapes can't be written: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return root


def shapes_datasets(root: str | Path) -> list[list[str]]:
    """`shapes_train` and `shapes_val`, as DATASETS.REGISTER takes them.

    Args:
        root: a folder that `make_shapes` made.
    """
    root = Path(root).resolve()
    return [
        [f"shapes_{split}", str(_annotation_file(root, split)), str(root / split)]
        for split in _SPLITS
    ]


def crop_shapes(root: str | Path, folder: str | Path) -> None:
    """Cuts every object out of a data set, with a margin of an eighth, for classification.

    Args:
        root: a folder that `make_shapes` made.
        folder: becomes ``{train,val}/<class>/<object>.png``; what it held before is removed.
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
