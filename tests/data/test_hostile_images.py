"""Tests untrusted images and shards: only intended files are opened, and none above the limits."""

import io
import os
import resource
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_folders import LEAF
from imagenet import make_imagenet
from PIL import Image

from contnet.commands.doctor import main
from contnet.data.datasets.classification import ClassificationSource, read_set
from contnet.data.datasets.shard_writer import make_shards
from contnet.data.datasets.shards import read_index
from contnet.data.findings import ERROR, Findings
from contnet.data.pipeline.images import read_image, read_labels, read_size, read_stored
from contnet.utils.errors import UserError

READERS = [
    lambda path: read_image({"file_name": str(path)}),
    lambda path: read_size({"file_name": str(path)}),
    lambda path: read_labels(str(path)),
    lambda path: read_stored(str(path)),
]


def _refused(path: Path, what: str) -> None:
    start = time.monotonic()
    for read in READERS:
        with pytest.raises(UserError, match=what):
            read(path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("ending", ["eps", "pdf", "pcx", "tga", "sgi", "ico", "jp2", "dds", "im"])
def test_other_formats_are_not_opened(tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    Image.new("RGB", (32, 32)).save(path)
    _refused(path.rename(tmp_path / "p.png"), "not one of those supported")


def test_ghostscript_is_not_run(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    Image.new("RGB", (32, 32)).save(path, "EPS")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("it was run"))
    _refused(path, "not one of those supported")


@pytest.mark.parametrize("kind", ["pipe", "circle", "device", "folder", "a null byte"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path, what = tmp_path / "p.png", f"it is a {kind}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path.name)
        what = "Too many levels of symbolic links"
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path, what = tmp_path / "p\0.png", "invalid file name"
    _refused(path, what)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(*chunks: bytes, size: tuple[int, int] = (8, 8)) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes((3 * 8 + 1) * 8))
    parts = [head, *chunks, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _tiff_of_large_tiles() -> bytes:
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 60_000, 323: 60_000}
    tags |= {324: 8, 325: 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 16
    head = struct.pack("<2sHI", b"II", 42, start).ljust(start, b"\0")
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


BOMB = zlib.compress(bytes(300 << 20), 9)
BOMBS = {
    "texts": lambda: _png(*[_chunk(b"zTXt", b"a\0\0" + BOMB)] * 20),
    "a profile of colours": lambda: _png(_chunk(b"iCCP", b"a\0\0" + BOMB)),
    "pixels": lambda: _png(size=(100_000, 100_000)),
    "tiles": _tiff_of_large_tiles,
    "a number of pixels": lambda: b"P6 1000000 1000000 255 " + bytes(100),
    "a screen": lambda: b"GIF89a" + b"\xff\xff\xff\xff" + bytes(20),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_take_no_memory(tmp_path, bomb):
    path = tmp_path / "p.png"
    path.write_bytes(bomb())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"p\.png"):
        read_image({"file_name": str(path)})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


# --- shards --------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> Path:
    source = make_imagenet(tmp_path, train=2, val=1) / "imagenet"
    make_shards(source / "train", tmp_path / "shards", workers=1)
    return tmp_path / "shards"


def _read(folder: Path) -> list:
    names = sorted(path.name for path in folder.glob("*.tar"))
    return [
        (shard.keys, shard.offsets.tolist(), shard.lengths.tolist(), shard.labels.tolist())
        for shard in read_index(str(folder), names)
    ]


def _forge(table: str, value: object):
    def change(file: Path) -> None:
        content = dict(np.load(file))
        content[table] = np.array(value) if isinstance(value, list) else value(content[table])
        np.savez(file, **content)

    return change


def _compress(file: Path) -> None:
    content = dict(np.load(file))
    np.savez_compressed(file, **content)


def _claim_much(file: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (10**13,)}
    )
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, data in parts.items():
            new.writestr(name, header.getvalue() if name == "labels.npy" else data)


FORGED = {
    "places outside": _forge("offsets", lambda old: old + 10**12),
    "places below 0": _forge("offsets", lambda old: -old - 1),
    "lengths without end": _forge("lengths", lambda old: old + 2**62),
    "labels without end": _forge("labels", lambda old: old + 2**62),
    "labels that are no numbers": _forge("labels", lambda old: old.astype(float)),
    "counts below 0": _forge("files", lambda old: -old),
    "no counts": _forge("files", [1, 2, 3]),
    "format": _forge("format", [1, 1]),
    "compressed": _compress,
    "more than there is": _claim_much,
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_forged_index_is_made_again(shards, forge):
    whole = _read(shards)
    forge(shards / "index.npz")
    assert _read(shards) == whole


def _member(name: str, data: bytes, **fields) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")


WRONG_SHARDS = {
    "a label beyond all": _member("1.jpg", b"x") + _member("1.cls", b"9" * 20),
    "a label below 0": _member("1.jpg", b"x") + _member("1.cls", b"-1"),
    "a size beyond all": _member("1.jpg", b"x", size=2**80),
    "names without end": _member("a", b"b" * 99, type=tarfile.GNUTYPE_LONGNAME) * 3000,
    "a head without end": _member("a", b"", type=tarfile.XHDTYPE, size=2**40),
}


@pytest.mark.parametrize("content", WRONG_SHARDS.values(), ids=WRONG_SHARDS)
def test_wrong_shards_are_named(tmp_path, content):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set-000000.tar").write_bytes(content + bytes(1024))
    findings = Findings()
    read_set(ClassificationSource(str(folder)), findings)
    (line,) = findings.lines(ERROR)
    assert "set-000000.tar" in line


# --- folders of classes --------------------------------------------------------------------------


@pytest.mark.parametrize("target", [".", "..", "loop"])
def test_links_in_a_circle_are_named(tmp_path, target):
    root = make_imagenet(tmp_path, train=1, val=1) / "imagenet" / "train"
    for folder in sorted(root.iterdir())[:2]:
        (folder / "loop").symlink_to(target)
        (folder / "loop2").symlink_to(target)
    findings = Findings()
    start = time.monotonic()
    read_set(ClassificationSource(str(root)), findings)
    assert time.monotonic() - start < 5
    if target != "loop":
        assert "Too many levels of symbolic links" in findings.lines(ERROR)[0]


def test_the_doctor_goes_on_after_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(make_imagenet(tmp_path, train=4, val=4)))
    first, second = sorted((tmp_path / "imagenet" / "train").glob("*/*"))[:2]
    first.unlink()
    os.mkfifo(first)
    second.write_bytes(BOMBS["texts"]())
    options = ["MODEL.CLASSIFIER.NUM_CLASSES", "3", "--workers", "2"]
    assert main(["--config-file", LEAF, *options]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert str(first) in line and str(second) in line
