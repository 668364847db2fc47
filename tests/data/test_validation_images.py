"""Tests image files that are damaged or do not match their annotations."""

import numpy as np
import pytest
from drawn_set import LEAF, Copy, _doctor, _turned
from PIL import Image

from contnet.data.datasets.shapes import make_shapes
from contnet.data.validation.dataset import check_datasets
from contnet.data.validation.images import FIRST
from contnet.launch.arguments import configure
from contnet.utils.errors import UserError

pytest_plugins = ["drawn_set"]


def _remove(data: Copy) -> None:
    data.image().unlink()


def _truncate(data: Copy) -> None:
    data.image().write_bytes(data.image().read_bytes()[:900])


def _no_image(data: Copy) -> None:
    data.image().write_text("<html>not found</html>")


def _other_size(data: Copy) -> None:
    Image.open(data.image()).resize((130, 140)).save(data.image())


def _dangling(data: Copy) -> None:
    data.image().unlink()
    data.image().symlink_to(data.root / "elsewhere.jpg")


def _folder(data: Copy) -> None:
    data.image().unlink()
    data.image().mkdir()


def _huge(data: Copy) -> None:
    Image.new("RGB", (1000, 2000)).save(data.image())


def _floats(data: Copy) -> None:
    Image.new("F", (150, 200)).save(data.image(), "TIFF")


PIXELS = {
    "missing": (_remove, "missing images"),
    "link to nowhere": (_dangling, "missing images"),
    "folder": (_folder, "path is not a file"),
    "huge": (_huge, "more than INPUT.MAX_PIXELS 1500000"),
    "floats": (_floats, "not integers"),
    "truncated": (_truncate, "cannot be read"),
    "no image": (_no_image, "cannot be read"),
    "other size": (_other_size, "size differs"),
    "turned by EXIF": (_turned(6, False), "EXIF orientation"),
}


@pytest.mark.parametrize("damage", PIXELS)
def test_damaged_images(data, capsys, damage):
    change, said = PIXELS[damage]
    change(data)
    status, lines = _doctor(capsys, *data.options(), "INPUT.MAX_PIXELS", "1500000")
    assert status == 1
    (line,) = [line for line in lines if line.startswith("  ERROR")]
    assert said in line
    assert data.image().name in line


# --- valid images, and those that only change results ---------------------------------------------


def _replace(data: Copy, image: Image.Image, width: int, height: int, **options: object) -> None:
    """Replaces the first image, annotated as (width, height)."""
    image.save(data.image(), **options)
    data.content["images"][0] |= {"width": width, "height": height}
    items = data.content["annotations"]
    data.content["annotations"] = [item for item in items if item["image_id"] != 1]


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_right_annotations_of_turned_images_are_not_blamed(data, capsys, kind, number):
    exif = Image.Exif()
    exif[0x0112] = number
    size = (200, 150) if number > 4 else (150, 200)
    _replace(data, Image.new("RGB", (150, 200)), *size, format=kind, exif=exif)
    status, lines = _doctor(capsys, *data.options())
    assert status == 0, lines
    turned = [line for line in lines if "by their EXIF orientation" in line]
    assert len(turned) == (number != 1)


def test_thin_images_are_named(data, capsys):
    _replace(data, Image.new("RGB", (3000, 2)), 3000, 2)
    status, lines = _doctor(capsys, *data.options())
    assert status == 0, lines
    (line,) = [line for line in lines if "a single row or column" in line]
    assert line.startswith("  NOTE") and f"{data.image()} (3000x2)" in line


# --- before a run --------------------------------------------------------------------------------


def _check(data: Copy, which: str, *options: str) -> list[str]:
    cfg, _ = configure(LEAF, [*data.options(), "DATASETS.CHECK_IMAGES", which, *options])
    return check_datasets(cfg, ["train", "val"]).warnings


@pytest.mark.parametrize("damage", ["other size", "floats", "truncated", "turned by EXIF"])
def test_the_first_images_are_opened_before_a_run(data, damage):
    change, said = PIXELS[damage]
    change(data)
    with pytest.raises(UserError, match=rf"^data set train: .*{data.image()} ") as caught:
        _check(data, "first")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError):  # again, from the cached annotations
        _check(data, "first")
    assert _check(data, "none") == []


@pytest.mark.parametrize(("number", "which"), [(FIRST - 1, "first"), (FIRST, "all")])
def test_all_images_are_opened_if_wanted(drawn, tmp_path, number, which):
    folder = make_shapes(tmp_path / "set", num_train=FIRST + 1, num_val=1)
    data = Copy(folder)
    data.image(number).write_bytes(b"broken")
    assert _check(data, "none") == []
    if which == "all":
        assert _check(data, "first") == []
    with pytest.raises(UserError, match=str(data.image(number))):
        _check(data, which)


def test_damaged_images_that_an_evaluation_skips_do_not_stop_it(drawn, tmp_path):
    data = Copy(make_shapes(tmp_path / "set", num_train=1, num_val=1))
    image = next((tmp_path / "set" / "val").glob("*.jpg"))
    image.write_bytes(b"broken")
    with pytest.raises(UserError, match=str(image)):
        _check(data, "first")
    assert _check(data, "first", "TEST.SKIP_UNREADABLE", "True") == []


def test_dark_images_of_16_bits_are_warned_about(data):
    image = data.content["images"][0]
    pixels = np.full((image["height"], image["width"]), 3000, np.uint16)
    Image.fromarray(pixels).save(data.image(), format="PNG")
    (warning,) = _check(data, "first")
    assert warning.startswith("data set train: ") and "largest value 3000" in warning
