"""Reads the JSON of annotation files, and recognises formats other than COCO instances."""

from __future__ import annotations

import codecs
import contextlib
import gc
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable
from typing import NamedTuple

from contnet.utils.errors import UserError
from contnet.utils.files import open_regular

__all__ = ["LISTS", "check_form", "read_json"]

LISTS = ("images", "annotations", "categories")
_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Limit of unpacked gzip: bytes that are always allowed, plus this multiple of the stored size.
_SMALL, _EXPANSION = 1 << 24, 100
_START = 1 << 20  # characters in which a file's format is looked for
_CONVERT = "export it as COCO JSON, or as VOC or YOLO for tools/convert_dataset.py"
_FIX = "tools/doctor.py --fix writes a fixed copy"


def _encoding(head: bytes) -> tuple[str, str]:
    """Returns a file's encoding by its first bytes, and why pycocotools refuses it, or "".

    Every other byte of ASCII is 0 in UTF-16.
    """
    for marks, encoding in ((_UTF_32, "utf-32"), (_UTF_16, "utf-16")):
        if head.startswith(marks):
            return encoding, f"is {encoding.upper()}, not UTF-8"
    if head.count(0) == 2:
        return f"utf-16-{'be' if head[0] == 0 else 'le'}", "is UTF-16, not UTF-8"
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig", "begins with a byte order mark"
    return "utf-8", ""


def _explain(start: str) -> str:
    """Returns why a text with this beginning is not one JSON value; "" if unknown."""
    start = start.lstrip()
    if not start:
        return "it is empty"
    if start.startswith("<"):
        return (
            "it is XML: convert a folder of VOC files with tools/convert_dataset.py, export others "
            "as COCO JSON"
        )
    if start.startswith("version https://git-lfs"):
        return "it is a Git LFS pointer: run git lfs pull"
    try:
        _, end = json.JSONDecoder().raw_decode(start)
    except ValueError:
        return ""
    if start[end:].lstrip().startswith("{"):
        return f"it has several JSON values, such as one per line: {_CONVERT}"
    return ""


def _load(file: str, lenient: bool) -> tuple[object, list[str]]:
    wrong = []
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_regular(file))
        head = stream.read(4)
        if head.startswith(_ZIP):
            raise UserError(f"the annotation file {file} is a zip archive: unpack it")
        stream.seek(0)
        if head.startswith(_GZIP):
            wrong.append("is compressed by gzip")
            limit = _SMALL + _EXPANSION * os.fstat(stream.fileno()).st_size
            unpacked = stack.enter_context(gzip.open(stream)).read(limit + 1) if lenient else b""
            if len(unpacked) > limit:
                raise UserError(
                    f"the annotation file {file} expands to more than {_EXPANSION} times "
                    "its size when unpacked, unlike annotations: check where it comes from"
                )
            stream = io.BytesIO(unpacked)
            head = unpacked[:4]
        encoding, reason = _encoding(head)
        if reason:
            wrong.append(reason)
        text = stack.enter_context(io.TextIOWrapper(stream, encoding=encoding))
        if wrong and not lenient:
            raise UserError(
                f"the annotation file {file} {' and '.join(wrong)}, which pycocotools cannot read: "
                f"save it as plain UTF-8; {_FIX}"
            )
        try:
            return json.load(text), wrong
        except json.JSONDecodeError as error:
            reason = _explain(error.doc[:_START]) or error
            raise UserError(f"the annotation file {file} is not valid JSON ({reason})") from error


def read_json(file: str, lenient: bool = False) -> tuple[object, list[str]]:
    """Reads a JSON file.

    Args:
        file: path of the file.
        lenient: whether to accept what pycocotools and Detectron2 refuse: gzip, UTF-16, a byte
            order mark.

    Returns:
        The content, and what was accepted.

    Raises:
        UserError: if the file is missing or not valid.
    """
    collecting = gc.isenabled()
    gc.disable()  # it would traverse COCO's millions of new objects again and again
    try:
        return _load(file, lenient)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the annotation file {file} cannot be read ({reason})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the annotation file {file} is not valid JSON ({error})") from error
    finally:
        if collecting:
            gc.enable()


class _Form(NamedTuple):
    """A format other than COCO's.

    Attributes:
        name: name of the format, for messages.
        has: whether a dict (of a list, the first one) has this format.
        listed: whether the file is a list.
        advice: what to do.
    """

    name: str
    has: Callable[[dict], bool]
    listed: bool
    advice: str = _CONVERT


def _keys(*names: str) -> Callable[[dict], bool]:
    return set(names).issubset


# The first match is used.
_FORMS = (
    _Form(
        "detections (results), not annotations",
        _keys("image_id", "category_id", "score"),
        True,
        "use the file with the ground truth",
    ),
    _Form("only the list 'annotations'", _keys("image_id", "category_id"), True),
    _Form("an export of Label Studio", lambda x: "data" in x and "annotations" in x, True),
    _Form("an export of Label Studio (JSON-MIN)", _keys("annotator", "lead_time"), True),
    _Form("in CreateML's format", _keys("image", "annotations"), True),
    _Form("in BDD100K's format", _keys("name", "labels"), True),
    _Form("a list of Detectron2's records", _keys("file_name", "annotations"), True),
    _Form("an export of Labelbox", lambda x: "data_row" in x or "Labeled Data" in x, True),
    _Form("a file of LabelMe, for one image", _keys("shapes", "imagePath"), False),
    _Form("a project of VIA", lambda x: "_via_img_metadata" in x, False),
    _Form("annotations of Datumaro", _keys("items", "categories"), False),
    _Form("a file of Supervisely, for one image", _keys("objects", "size"), False),
    _Form("polygons of Cityscapes, for one image", _keys("imgWidth", "objects"), False),
    _Form("GeoJSON", _keys("type", "features"), False),
    _Form(
        "an export of VIA",
        lambda x: any(isinstance(each, dict) and "regions" in each for each in x.values()),
        False,
    ),
)


def _find_form(content: object) -> _Form | None:
    listed = isinstance(content, list)
    first = content[0] if listed and content else content
    if not isinstance(first, dict):
        return None
    return next((form for form in _FORMS if form.listed == listed and form.has(first)), None)


def _is_list_of_dicts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def check_form(content: object, file: str) -> None:
    """Checks that a file's content has the lists of COCO instances; "annotations" may be missing.

    Raises:
        UserError: if a list is missing or not valid; the message names the format if it is known.
    """
    here = content if isinstance(content, dict) else {}
    wrong = [
        key
        for key in LISTS
        if not _is_list_of_dicts(here.get(key)) and (key != "annotations" or key in here)
    ]
    if not wrong:
        return
    if form := _find_form(content):
        raise UserError(
            f"the annotation file {file} is not in COCO format, it is {form.name}: {form.advice}"
        )
    raise UserError(
        f"the annotation file {file} is not in COCO format: {wrong[0]!r} must be a list of {{...}}"
    )
