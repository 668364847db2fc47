"""Draws the label files of Cityscapes from its polygons.

The download has polygons for every image, in ``gtFine/SPLIT/CITY/*_gtFine_polygons.json``. Training
and evaluation also need images beside these files, whose pixel values are classes or objects::

    *_gtFine_labelTrainIds.png   class as trained, 0 to 18, or 255: training of segmenters
    *_gtFine_labelIds.png        class as in Cityscapes' table: evaluation of segmenters
    *_gtFine_instanceIds.png     class x 1000 + number of the object: both evaluations

The classes and the drawing rules are those of cityscapesscripts.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import name2label
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from PIL import Image
from tqdm import tqdm

from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write, open_regular
from contnet.utils.pools import process_pool

__all__ = ["LABEL_MAPS", "default_root", "prepare_cityscapes"]

_POLYGONS = "_polygons.json"
# Errors that invalid polygons raise.
_DAMAGES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _draw_instances(annotation: Annotation) -> Image.Image:
    """Draws objects in 16 bits; cityscapesscripts uses 32, which Pillow 13 no longer writes."""
    return Image.fromarray(np.asarray(createInstanceImage(annotation, "ids")).astype(np.uint16))


LABEL_MAPS: dict[str, Callable[[Annotation], Image.Image]] = {
    "_labelTrainIds.png": partial(createLabelImage, encoding="trainIds"),
    "_labelIds.png": partial(createLabelImage, encoding="ids"),
    "_instanceIds.png": _draw_instances,
}


def default_root() -> Path:
    """Returns Detectron2's Cityscapes folder: ($DETECTRON2_DATASETS or ./datasets)/cityscapes."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "cityscapes"


def _read(file: Path) -> Annotation:
    """Reads the polygons of one image and checks them.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError: if the
            polygons are not valid.
    """
    annotation = Annotation()
    with open_regular(file, "r", encoding="utf-8") as text:
        annotation.fromJsonText(text.read())
    for item in annotation.objects:
        if item.deleted:
            continue
        if item.label not in name2label and item.label.removesuffix("group") not in name2label:
            raise ValueError(f"Cityscapes has no label {item.label!r}")
        if not np.isfinite(np.asarray(item.polygon, dtype=float)).all():
            raise ValueError(f"a polygon of label {item.label!r} is not finite")
    return annotation


def _prepare(file: Path) -> tuple[int, str]:
    """Draws the missing files of one polygon file; returns how many were written, and an error."""
    stem = str(file).removesuffix(_POLYGONS)
    missing = {Path(stem + end): draw for end, draw in LABEL_MAPS.items()}
    missing = {path: draw for path, draw in missing.items() if not path.exists()}
    if not missing:
        return 0, ""
    try:
        annotation = _read(file)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the errors that it raises
            images = {path: draw(annotation) for path, draw in missing.items()}
    except _DAMAGES as error:
        return 0, f"{file} is damaged ({type(error).__name__}: {error})"
    except OSError as error:
        return 0, f"{file} cannot be read ({error.strerror})"
    for path, image in images.items():
        try:
            with atomic_write(path) as target:
                image.save(target, format="PNG")
        except OSError as error:
            return 0, f"{path} cannot be written ({error.strerror})"
    return len(images), ""


def _find_polygons(root: Path) -> list[Path]:
    if not (root / "gtFine").is_dir():
        nested = root / "cityscapes"
        hint = f"; did you mean {nested}?" if (nested / "gtFine").is_dir() else ""
        raise UserError(
            f"{root.absolute()} has no folder gtFine: give the folder that contains gtFine and "
            f"leftImg8bit with --root, or its parent as DETECTRON2_DATASETS{hint}"
        )
    files = sorted(root.glob(f"gtFine/*/*/*_gtFine{_POLYGONS}"))
    if not files:
        raise UserError(
            f"{(root / 'gtFine').absolute()} has no SPLIT/CITY/*_gtFine{_POLYGONS}: unpack "
            "gtFine_trainvaltest.zip there"
        )
    return files


def prepare_cityscapes(root: Path, workers: int | None = None) -> tuple[int, int]:
    """Draws the label files that are missing; existing ones are kept.

    Args:
        root: folder that contains ``gtFine``.
        workers: number of processes; None for the number of cores.

    Returns:
        The number of files written, and of files that existed.

    Raises:
        UserError: if the folder has no polygons, or, after all others are drawn, if some polygon
            files cannot be used.
    """
    files = _find_polygons(root)
    written, errors = 0, []
    with process_pool(workers or available_cpus()) as pool:
        results = tqdm(pool.map(_prepare, files), total=len(files), unit="image", desc="labels")
        try:
            for count, error in results:
                written += count
                errors += [error] if error else []
        except BrokenProcessPool as error:
            raise UserError(
                "a process was killed, perhaps out of memory: run this again with fewer "
                "--workers, it continues where it stopped"
            ) from error
    if errors:
        raise UserError(
            f"{len(errors)} of {len(files)} images have no label files: {'; '.join(errors[:3])}"
            f"{'; ...' if errors[3:] else ''}. Unpack these files again, then run this again"
        )
    return written, len(files) * len(LABEL_MAPS) - written
