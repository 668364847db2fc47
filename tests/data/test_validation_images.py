"""Image files that are damaged, or not as annotated."""

import numpy as np
import pytest
from drawn_set import Copy, _doctor, _turned
from PIL import Image

pytest_plugins = ["drawn_set"]
pytestmark = pytest.mark.usefixtures("forget_datasets")


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


def _deep(data: Copy) -> None:
    image = data.content["images"][0]
    pixels = np.full((image["height"], image["width"]), 3000, np.uint16)
    Image.fromarray(pixels).save(data.image(), format="PNG")


PIXELS = {
    "missing": (_remove, "images that are missing"),
    "link to nowhere": (_dangling, "images that are missing"),
    "folder": (_folder, "images that are missing"),
    "16 bits": (_deep, "more than 8 bits"),
    "truncated": (_truncate, "cannot be read"),
    "no image": (_no_image, "cannot be read"),
    "other size": (_other_size, "another size"),
    "turned by EXIF": (_turned(6, False), "EXIF orientation"),
}


@pytest.mark.parametrize("damage", PIXELS)
def test_damaged_images(data, capsys, damage):
    change, said = PIXELS[damage]
    change(data)
    status, lines = _doctor(capsys, *data.options())
    assert status == 1
    (line,) = [line for line in lines if line.startswith("  ERROR")]
    assert said in line
    assert data.image().name in line
