"""Tests decoding of images, and how a run reports broken images."""

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import read_image as detectron2_labels
from image_folders import KEY, LEAF
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from contnet.config import add_contnet_config
from contnet.data.findings import ERROR, WARNING
from contnet.data.pipeline.images import read_image, read_labels, read_pixels
from contnet.data.pipeline.mappers import ClassificationMapper, FastMapper, Mapper, NamedErrors
from contnet.data.validation.images import ImageRules, inspect_image, inspect_pixels
from contnet.launch.main import main
from contnet.utils.errors import UserError

pytest_plugins = ["image_folders"]


# --- pixels --------------------------------------------------------------------------------------


@pytest.fixture
def picture() -> Image.Image:
    """Makes a smooth image, which JPEG preserves; no two corners are equal."""
    y, x = np.mgrid[:48, :64]
    channels = [x * 3 + 20, y * 4 + 30, 220 - x - 2 * y]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def decode(path: Path) -> np.ndarray:
    image = read_image({"file_name": str(path)})
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def far(one: object, other: object) -> int:
    one, other = (np.asarray(each).astype(int) for each in (one, other))
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


def grey(picture: Image.Image) -> np.ndarray:
    return np.repeat(np.asarray(picture.convert("L"))[..., None], 3, axis=2)


def settings(*options: str) -> CfgNode:
    cfg = get_cfg()
    add_contnet_config(cfg)
    cfg.merge_from_list(["INPUT.FORMAT", "RGB", *options])
    return cfg


def by_shard(path: Path) -> np.ndarray:
    shard = path.with_suffix(".tar")
    shard.write_bytes(b"before" + path.read_bytes())
    place = {"offset": 6, "size": path.stat().st_size}
    return read_image({"file_name": str(shard), "image_id": path.stem, **place})


def by_mapper(mapper: Callable, **record: object) -> Callable[[Path], np.ndarray]:
    def read(path: Path) -> np.ndarray:
        image = mapper({"file_name": str(path), **record})["image"]
        return image.permute(1, 2, 0).numpy()

    return read


def by_doctor(path: Path) -> Image.Image:
    decoded, _ = inspect_pixels({"file_name": str(path)}, RULES)
    return decoded.image.convert("RGB")


# All functions that read an image, in RGB. Nothing is resized.
READERS = {
    "files": lambda path: read_image({"file_name": str(path)}),
    "shards": by_shard,
    "arrays": lambda path: read_pixels({"file_name": str(path)}, "RGB"),
    "BGR": lambda path: read_pixels({"file_name": str(path)}, "BGR")[..., ::-1],
    "training": by_mapper(FastMapper(settings(), augmentations=[]), annotations=[]),
    "evaluation": by_mapper(Mapper(settings(), is_train=False, augmentations=[])),
    "the doctor": lambda path: inspect_pixels({"file_name": str(path)}, RULES)[0].image.convert(
        "RGB"
    ),
}
RULES = ImageRules.from_config(settings())
FILES = {
    "jpg": {"quality": 95},
    "png": {},
    "webp": {"lossless": True},
    "tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "deflate.tif": {"compression": "tiff_adobe_deflate"},
    "jpeg.tif": {"compression": "jpeg"},
}


def assert_all_read(path: Path, expected: object) -> None:
    assert [name for name, read in READERS.items() if far(read(path), expected)] == []


def reference(path: Path) -> Image.Image:
    """Returns the image as Pillow rotates it."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@pytest.mark.parametrize(
    ("ending", "number"),
    [
        *itertools.product(FILES, range(1, 9)),
        *itertools.product(["jpg", "png", "webp", "tif"], [0, 9]),  # orientations without a meaning
    ],
)
def test_exif_turns(picture, tmp_path, ending, number):
    exif = Image.Exif()
    exif[0x0112] = number
    path = tmp_path / f"p.{ending}"
    picture.save(path, exif=exif, **FILES[ending])
    assert_all_read(path, reference(path))


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "lzw.tif", "deflate.tif"])
def test_exif_turns_16_bits(picture, tmp_path, number, ending):
    exif = Image.Exif()
    exif[0x0112] = number
    turned, whole = tmp_path / f"p.{ending}", tmp_path / "whole.png"
    shallow = picture.convert("L")
    deep = Image.fromarray(np.asarray(shallow).astype(np.uint16) * 257)
    deep.save(turned, exif=exif, **FILES[ending])
    shallow.save(whole, exif=exif)
    assert_all_read(turned, reference(whole))


def test_orientation_in_the_xmp_of_a_png(picture, tmp_path):
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    picture.save(tmp_path / "p.png", pnginfo=info)
    assert reference(tmp_path / "p.png").size == picture.size[::-1]
    assert far(decode(tmp_path / "p.png"), reference(tmp_path / "p.png")) == 0


@pytest.mark.parametrize("first", [1, 6])
def test_exif_that_is_there_twice(picture, tmp_path, first):
    """Editors write their own EXIF data in addition to the camera's."""
    parts = []
    for number in (first, 8):
        exif = Image.Exif()
        exif[0x0112] = number
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95, exif=exif)
        data = file.getvalue()
        start = data.index(b"\xff\xe1")
        length = int.from_bytes(data[start + 2 : start + 4], "big") + 2
        parts.append(data[start : start + length])
    picture.save(file := io.BytesIO(), "JPEG", quality=95)
    path = tmp_path / "p.jpg"
    path.write_bytes(file.getvalue()[:2] + b"".join(parts) + file.getvalue()[2:])
    assert far(decode(path), reference(path)) == 0


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif", "mpo"])
def test_the_first_frame_is_taken_and_the_doctor_says_so(picture, tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    other = picture.transpose(Image.Transpose.ROTATE_180)
    picture.save(path, save_all=True, append_images=[other])
    assert_all_read(path, reference(path))
    notes = [finding.kind for finding in inspect_image({"file_name": str(path)}, RULES)]
    # The second view of a camera is not a frame.
    assert any("frames or pages" in note for note in notes) == (ending != "mpo")


COLOURS = {
    "1": "png tif",
    "L": "png tif jpg",
    "LA": "png tif",
    "P": "png gif tif",
    "PA": "tif",
    "RGBA": "png tif webp",
    "CMYK": "jpg tif",
    "YCbCr": "tif jpg",
    "LAB": "tif",
}


@pytest.mark.parametrize(
    ("mode", "ending"), [(mode, e) for mode, endings in COLOURS.items() for e in endings.split()]
)
def test_colours_are_pillows(picture, tmp_path, mode, ending):
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    source = picture if mode in ("LA", "RGBA", "PA") else picture.convert("RGB")
    if mode == "PA":
        source = source.convert("P")
    path = tmp_path / f"p.{ending}"
    source.convert(mode).save(path)
    assert_all_read(path, reference(path))


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"])
def test_damaged_exif_does_not_matter(picture, tmp_path, exif):
    picture.save(tmp_path / "p.jpg", quality=95, exif=exif)
    assert far(decode(tmp_path / "p.jpg"), picture) <= 8


def test_cmyk(picture, tmp_path):
    picture.convert("CMYK").save(tmp_path / "p.jpg", quality=98)
    with Image.open(tmp_path / "p.jpg") as image:
        assert image.mode == "CMYK"
    assert far(decode(tmp_path / "p.jpg"), picture) <= 8


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey(picture, tmp_path, mode):
    stored = picture.convert("1" if mode == "1" else "L")
    stored.convert(mode).save(tmp_path / "p.png")
    assert far(decode(tmp_path / "p.png"), grey(stored)) == 0
    if mode == "L":
        stored.save(tmp_path / "p.jpg", quality=95)
        assert far(decode(tmp_path / "p.jpg"), grey(stored)) <= 8


def save_deep(values: np.ndarray, path: Path) -> None:
    """Writes grey values with 16 bits."""
    if path.suffix == ".pgm":
        head = f"P5 {values.shape[1]} {values.shape[0]} 65535\n".encode()
        path.write_bytes(head + values.astype(">u2").tobytes())
    elif "I;16B" in path.name:
        Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()).save(path)
    else:
        kind = np.int32 if "32" in path.name else np.uint16
        Image.fromarray(values.astype(kind)).save(path)


@pytest.mark.parametrize("name", ["p.png", "p.tif", "p.pgm", "I;16B.tif", "32.tif"])
def test_grey_in_16_bits(picture, tmp_path, name):
    grey = np.asarray(picture.convert("L")).astype(np.uint16)
    for values in (grey * 257, grey * 256, grey * 256 + 255):
        save_deep(values, tmp_path / name)
        assert_all_read(tmp_path / name, np.repeat(grey[..., None], 3, 2))


def test_colours_in_16_bits(picture, tmp_path):
    values = np.asarray(picture).astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "p.png"), values[..., ::-1])
    assert_all_read(tmp_path / "p.png", picture)


@pytest.mark.parametrize(
    ("peak", "dark"), [(4095, True), (4096, False), (65535, False), (0, False)]
)
def test_12_bits_in_16_are_warned_about(tmp_path, peak, dark):
    save_deep(np.linspace(0, peak, 48, dtype=np.uint16).reshape(6, 8), tmp_path / "p.png")
    found = inspect_image({"file_name": str(tmp_path / "p.png")}, RULES)
    warned = [finding.example for finding in found if finding.severity == WARNING]
    assert warned == [f"{tmp_path / 'p.png'} (largest value {peak})"] * dark


def test_label_maps_stay_as_they_are(tmp_path):
    values = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for number, image in enumerate((Image.fromarray(values), Image.fromarray(values.astype("u2")))):
        path = tmp_path / f"{number}.png"
        image.save(path)
        assert np.array_equal(read_labels(str(path)), values)
        assert np.array_equal(read_labels(str(path)), detectron2_labels(str(path), "L")[..., 0])


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [0, 63, 64, 65])
def test_the_limit_of_pixels_is_that_of_the_config(tmp_path, monkeypatch, limit):
    """The limit does not depend on Pillow's own limit."""
    path = tmp_path / "p.png"
    Image.new("RGB", (8, 8)).save(path)
    record = {"file_name": str(path)}
    cfg = settings("INPUT.MAX_PIXELS", str(limit), "INPUT.CLASSIFIER.SCALE", "[1.0, 1.0]")
    readers = [
        lambda: FastMapper(cfg, augmentations=[])(record),
        lambda: Mapper(cfg, is_train=False, augmentations=[])(record),
        lambda: ClassificationMapper(cfg, is_train=True)(record),
        lambda: ClassificationMapper(cfg, is_train=False)(record),
        lambda: read_labels(str(path), limit),
    ]
    for pillows in (1, 40):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        for read in readers:
            if limit == 63:
                said = rf"{path}.*it has 8x8 pixels, more than INPUT.MAX_PIXELS 63"
                with pytest.raises(UserError, match=said):
                    read()
            else:
                read()
            assert pillows == Image.MAX_IMAGE_PIXELS
        found = inspect_image(record, ImageRules.from_config(cfg))
        assert [finding.severity for finding in found] == [ERROR] * (limit == 63)


def test_the_limit_is_pillows_by_default(tmp_path):
    assert settings().INPUT.MAX_PIXELS in (
        2 * Image.MAX_IMAGE_PIXELS,
        2 * Image.MAX_IMAGE_PIXELS + 1,
    )
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.filterwarnings("error::UserWarning")
def test_palette(picture, tmp_path, transparent):
    stored = picture.quantize(64)
    colours = stored.convert("RGB")
    options = {"transparency": bytes([0, 128, 255])} if transparent else {}
    stored.save(tmp_path / "p.png", **options)
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "P"
    assert far(decode(tmp_path / "p.png"), colours) == 0


def test_transparency_is_dropped(picture, tmp_path):
    stored = picture.copy()
    stored.putalpha(Image.linear_gradient("L").resize(picture.size))
    stored.save(tmp_path / "p.png")
    assert far(decode(tmp_path / "p.png"), picture) == 0


BROKEN = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no image": lambda data: b"<html>404</html>" * 20,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_images_are_named(picture, tmp_path, damage):
    file = tmp_path / "p.JPEG"
    picture.save(file, quality=95)
    file.write_bytes(BROKEN[damage](file.read_bytes()))
    with pytest.raises(UserError) as caught:
        NamedErrors(read_image)({"file_name": str(file)})
    message = str(caught.value)
    assert message.startswith(f"the image {file} cannot be read (") and "\n" not in message
    assert ("not one of those supported" in message) == (damage != "cut")
    assert "python tools/doctor.py" in message


def test_missing_and_strange_images_are_named(picture, tmp_path):
    with pytest.raises(UserError, match=r"gone.jpg cannot be read"):
        read_image({"file_name": str(tmp_path / "gone.jpg")})
    for values in (np.full((4, 4), 70000, np.int32), np.zeros((4, 4), np.float32)):
        Image.fromarray(values).save(tmp_path / "p.tif")
        with pytest.raises(UserError, match=r"p.tif .*its pixel values"):
            read_image({"file_name": str(tmp_path / "p.tif")})


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def broken_run(root, tmp_path) -> list[str]:
    """Returns the command line of a run in which some images are broken."""
    for folder in (root / "imagenet" / "train").iterdir():
        folder.joinpath("0.JPEG").write_bytes(b"broken")
    unseen = "DATASETS.CHECK_IMAGES none"
    small = "MODEL.DEVICE cpu SOLVER.IMS_PER_BATCH 8 SOLVER.MAX_ITER 2 SOLVER.WARMUP_ITERS 1"
    more = f"INPUT.CLASSIFIER.SIZE 32 OUTPUT_DIR {tmp_path}/run"
    return ["--config-file", LEAF, KEY, "3", *f"{unseen} {small} {more}".split()]


def assert_broken_image_is_told(root: Path, errors: str) -> None:
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in errors, errors
    assert said[0].startswith(f"error: the image {root}/imagenet/train/n0000000")


def test_a_broken_image_is_told(root, broken_run, capsys):
    assert main([*broken_run, "DATALOADER.NUM_WORKERS", "0"]) == 1
    assert_broken_image_is_told(root, capsys.readouterr().err)


@pytest.mark.slow
def test_a_broken_image_in_a_worker_ends_the_process_in_one_line(root, broken_run):
    command = [sys.executable, str(REPOSITORY / "train_net.py"), *broken_run]
    command += ["DATALOADER.NUM_WORKERS", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert_broken_image_is_told(root, done.stderr)
