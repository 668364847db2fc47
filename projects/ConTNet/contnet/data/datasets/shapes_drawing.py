"""Draws the images of the shapes data set: outlines, textures, objects that hide each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "CLASS_NAMES",
    "MIN_VISIBLE",
    "ShapeObject",
    "draw_outline",
    "draw_picture",
    "mask_box",
    "mask_polygons",
]

CLASS_NAMES = ("circle", "square", "triangle", "star")
MIN_VISIBLE = 0.6
_SUPERSAMPLE = 4
_MIN_BOX = 20  # Minimum of the longer side of the visible part, in pixels.
_DIAMETERS = (28.0, 98.0)  # Of the circle around an object; with anti-aliasing, up to 100 pixels.
_PLACING_TRIES = 40
_MIN_CONTRAST = 120.0


@dataclass(frozen=True)
class ShapeObject:
    """A drawn object; `visible` is a boolean (H, W) map of its pixels that are not hidden."""

    class_index: int
    visible: np.ndarray
    full_area: int

    def without(self, cover: np.ndarray) -> ShapeObject:
        return ShapeObject(self.class_index, self.visible & ~cover, self.full_area)

    def shows_enough(self) -> bool:
        if self.visible.sum() < MIN_VISIBLE * self.full_area:
            return False
        _, _, width, height = mask_box(self.visible)
        return max(width, height) >= _MIN_BOX


def _on_circle(radii: np.ndarray) -> np.ndarray:
    """Returns corners at equal angles, the first one at the top."""
    angles = np.arange(len(radii)) * (2 * math.pi / len(radii)) - math.pi / 2
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


_OUTLINES: dict[str, np.ndarray] = {
    "circle": _on_circle(np.ones(72)),
    "square": _on_circle(np.ones(4)),
    "triangle": _on_circle(np.ones(3)),
    "star": _on_circle(np.tile([1.0, 0.45], 5)),
}


def draw_outline(name: str, diameter: float, angle: float, offset: np.ndarray) -> np.ndarray:
    """Returns the coverage of each pixel by a shape, anti-aliased.

    Args:
        name: one of `CLASS_NAMES`.
        diameter: diameter of the circle around the shape, in pixels.
        angle: rotation in radians.
        offset: (2,) offset of the centre from the patch's centre, below one pixel.

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


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 255, 3).astype(np.float32)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a linear ramp from 0 to 1 in a random direction, (H, W, 1)."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ramp = x * math.cos(angle) + y * math.sin(angle)
    return ((ramp - ramp.min()) / (np.ptp(ramp) + 1e-6))[..., None]


def _blotches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns smooth colour clouds around zero."""
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
    """Returns a square texture for an object on surroundings of mean colour `under`."""
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


def mask_box(mask: np.ndarray) -> list[int]:
    """Returns the tight box (x, y, width, height) of a mask that is not empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _pixel_edges(mask: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Returns unit edges around a mask as {start: directions}, with the mask on their right."""
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
    """Returns closed outlines (N, 2) of a mask: clockwise around parts, the other way in holes."""
    edges = _pixel_edges(mask)
    loops = []
    while edges:
        start = at = next(iter(edges))
        step, corners = (0, 0), []
        while at != start or not corners:
            # If two pixels touch only at a corner, both continuations enclose the same pixels.
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


def mask_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Returns polygons, (N, 2) corners each, that together cover exactly the mask's pixels.

    COCO's polygons have no holes: a mask with a hole is cut through the hole from top to bottom,
    and its halves are outlined separately.
    """
    loops = _loops(mask)
    hole = next((loop for loop in loops if _signed_area(loop) < 0), None)
    if hole is None:
        return loops
    cut = int(hole[:, 0].min() + hole[:, 0].max()) // 2
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return mask_polygons(left) + mask_polygons(right)


def _add_object(rng: np.random.Generator, image: np.ndarray, objects: list[ShapeObject]) -> None:
    """Paints another object over `image` and appends it to `objects`, unless there is no place.

    A place leaves enough of the new object inside the image and enough of the others visible.
    """
    height, width = image.shape[:2]
    class_index = int(rng.integers(len(CLASS_NAMES)))
    diameter = rng.uniform(*_DIAMETERS)
    angle = rng.uniform(0, 2 * math.pi)
    alpha = draw_outline(CLASS_NAMES[class_index], diameter, angle, rng.uniform(-0.5, 0.5, 2))
    side, inner = len(alpha), alpha >= 0.5
    for _ in range(_PLACING_TRIES):
        x, y = rng.integers(-side // 3, (width - 2 * side // 3, height - 2 * side // 3)).tolist()
        ys, xs = slice(max(y, 0), min(y + side, height)), slice(max(x, 0), min(x + side, width))
        patch = np.s_[ys.start - y : ys.stop - y, xs.start - x : xs.stop - x]
        visible = np.zeros((height, width), dtype=bool)
        visible[ys, xs] = inner[patch]
        new = ShapeObject(class_index, visible, int(inner.sum()))
        rest = [other.without(visible) for other in objects]
        if all(thing.shows_enough() for thing in [new, *rest]):
            break
    else:
        return
    paint = _texture(rng, side, image[visible].mean(axis=0))[patch]
    cover = alpha[patch][..., None]
    image[ys, xs] = image[ys, xs] * (1 - cover) + paint * cover
    objects[:] = [*rest, new]


def draw_picture(
    rng: np.random.Generator, min_side: int, max_side: int
) -> tuple[Image.Image, list[ShapeObject]]:
    """Draws a picture with sides from `min_side` to `max_side` pixels; also returns its objects."""
    height, width = rng.integers(min_side, max_side, 2, endpoint=True).tolist()
    image = _background(rng, height, width)
    objects: list[ShapeObject] = []
    wanted = int(rng.integers(4, 9))
    for _ in range(3 * wanted):
        if len(objects) < wanted:
            _add_object(rng, image, objects)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(2, 10)
    return Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)), objects
