"""Decoding of images, and what a run says of those that are broken."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from image_folders import KEY, LEAF
from PIL import Image

from contnet.data.pipeline.images import read_image
from contnet.launch.main import main
from contnet.utils.errors import UserError

pytest_plugins = ["image_folders"]
pytestmark = pytest.mark.usefixtures("forget_datasets")


# --- pixels --------------------------------------------------------------------------------------

ORIENTATIONS = range(1, 9)
# What undoes each orientation, by numpy.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.fixture
def picture() -> Image.Image:
    """Smooth, so that JPEG keeps it; no two corners alike."""
    y, x = np.mgrid[:48, :64]
    channels = [x * 3 + 20, y * 4 + 30, 220 - x - 2 * y]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def decode(path: Path) -> np.ndarray:
    image = read_image({"file_name": str(path)})
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def far(one: np.ndarray, other: object) -> int:
    other = np.asarray(other).astype(int)
    assert one.shape == other.shape
    return int(np.abs(one - other).max())


def grey(picture: Image.Image) -> np.ndarray:
    return np.repeat(np.asarray(picture.convert("L"))[..., None], 3, axis=2)


@pytest.mark.parametrize("number", ORIENTATIONS)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_turns(picture, tmp_path, number, ending):
    exif = Image.Exif()
    exif[0x0112] = number
    options = {"quality": 95} if ending != "webp" else {"lossless": True}
    picture.save(tmp_path / f"p.{ending}", exif=exif.tobytes(), **options)
    stored = np.asarray(picture)
    assert far(decode(tmp_path / f"p.{ending}"), UPRIGHT[number](stored)) <= 8


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


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_in_16_bits(picture, tmp_path, ending):
    values = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    if ending == "pgm":
        head = f"P5 {values.shape[1]} {values.shape[0]} 65535\n".encode()
        (tmp_path / "p.pgm").write_bytes(head + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / f"p.{ending}")
    assert far(decode(tmp_path / f"p.{ending}"), grey(picture)) == 0


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
        read_image({"file_name": str(file)})
    message = str(caught.value)
    assert message.startswith(f"the image {file} cannot be read (") and "\n" not in message
    assert ("no kind" in message) == (damage != "cut")
    assert "python tools/doctor.py" in message


def test_missing_and_strange_images_are_named(picture, tmp_path):
    with pytest.raises(UserError, match=r"gone.jpg cannot be read"):
        read_image({"file_name": str(tmp_path / "gone.jpg")})
    for values in (np.full((4, 4), 70000, np.int32), np.zeros((4, 4), np.float32)):
        Image.fromarray(values).save(tmp_path / "p.tif")
        with pytest.raises(UserError, match=r"p.tif .*its pixels"):
            read_image({"file_name": str(tmp_path / "p.tif")})


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def broken_run(root, tmp_path) -> list[str]:
    """The command line of a run, of whose images some are broken."""
    for folder in (root / "imagenet" / "train").iterdir():
        folder.joinpath("0.JPEG").write_bytes(b"broken")
    small = "MODEL.DEVICE cpu SOLVER.IMS_PER_BATCH 8 SOLVER.MAX_ITER 2 SOLVER.WARMUP_ITERS 1"
    more = f"INPUT.CLASSIFIER.SIZE 32 OUTPUT_DIR {tmp_path}/run"
    return ["--config-file", LEAF, KEY, "3", *small.split(), *more.split()]


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
