"""A drawn set in COCO format that tests can damage, and the doctor's output for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY
from PIL import Image

from contnet.commands.doctor import main
from contnet.data.datasets.shapes import make_shapes

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("drawn") / "set", num_train=4, num_val=2)


class Copy:
    """A copy of the drawn set whose training split tests can damage.

    Attributes:
        root: folder of the copy.
        content: content of the annotation file, written by :meth:`options`.
    """

    def __init__(self, root: Path):
        self.root = root
        self.content = json.loads(self.file.read_text())

    @property
    def file(self) -> Path:
        return self.root / "annotations" / "instances_train.json"

    @property
    def item(self) -> dict:
        return self.content["annotations"][0]

    def image(self, number: int = 0) -> Path:
        return self.root / "train" / self.content["images"][number]["file_name"]

    def options(self) -> list[str]:
        self.file.write_text(json.dumps(self.content))
        sets = [
            [
                split,
                str(self.root / "annotations" / f"instances_{split}.json"),
                str(self.root / split),
            ]
            for split in ("train", "val")
        ]
        return [
            *("DATASETS.REGISTER", str(sets)),
            *("DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"),
        ]


@pytest.fixture
def data(drawn, tmp_path) -> Copy:
    return Copy(Path(shutil.copytree(drawn, tmp_path / "set")))


def _doctor(capsys, *options: str) -> tuple[int, list[str]]:
    status = main(["--config-file", LEAF, "--workers", "2", *options])
    printed = capsys.readouterr()
    return status, (printed.out + printed.err).splitlines()


def _turned(orientation: int, turn_sizes: bool) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        image = Image.new("RGB", (150, 200))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(data.image(), exif=exif)
        width, height = (200, 150) if turn_sizes else (150, 200)
        data.content["images"][0] |= {"width": width, "height": height}
        data.content["annotations"] = [
            item for item in data.content["annotations"] if item["image_id"] != 1
        ]

    return change


def rename_images(old: Callable[[str], str], new: Callable[[str], str]) -> Callable[[Copy], None]:
    """Renames all images in the folder, and differently in the annotation file."""

    def change(data: Copy) -> None:
        for image in data.content["images"]:
            path = data.root / "train" / old(image["file_name"])
            path.parent.mkdir(exist_ok=True)
            (data.root / "train" / image["file_name"]).rename(path)
            image["file_name"] = new(image["file_name"])

    return change
