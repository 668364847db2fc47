"""Tests shards: webdataset as the reference, the converter, restarts, the index, damage."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import REPOSITORY
from imagenet import class_name, make_imagenet
from PIL import Image

from contnet.commands.make_shards import main
from contnet.data.datasets import shards
from contnet.data.datasets.classification import ClassificationSource, read_set
from contnet.data.datasets.shard_writer import make_shards
from contnet.data.datasets.shards import (
    index_shard,
    read_classes,
    read_index,
    read_sample,
    shard_records,
)
from contnet.data.findings import ERROR, NOTE, Findings
from contnet.data.pipeline.images import read_image
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Makes class folders with 24 images."""
    root = make_imagenet(tmp_path_factory.mktemp("drawn"), val=1)
    return root / "imagenet" / "train"


@pytest.fixture
def made(source, tmp_path) -> Path:
    make_shards(source, tmp_path / "train", samples_per_shard=7, workers=1)
    return tmp_path / "train"


def records_of(folder: Path) -> list[dict]:
    names = sorted(path.name for path in folder.glob("*.tar"))
    return shard_records(str(folder), read_index(str(folder), names, workers=1))


def read_all(folder: Path) -> tuple[list[dict], list[str], list[str]]:
    findings = Findings()
    content = read_set(ClassificationSource(str(folder)), findings)
    return content.records, findings.lines(ERROR), findings.lines(NOTE)


def write_tar(path: Path, members: dict[str, bytes], file_format: int = tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=file_format) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def some_image(colour: str = "red", file_format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, format=file_format)
    return file.getvalue()


# --- against webdataset --------------------------------------------------------------------------


def test_webdataset_reads_what_we_write(source, made):
    files = [str(path) for path in sorted(made.glob("*.tar"))]
    assert [os.path.basename(file) for file in files] == [f"train-{i:06d}.tar" for i in range(4)]
    theirs = list(webdataset.WebDataset(files, shardshuffle=False))
    ours = records_of(made)
    assert len(ours) == len(theirs) == 24
    classes = (made / "classes.txt").read_text().split()
    for record, sample in zip(ours, theirs, strict=True):
        assert sample["__key__"] == record["image_id"]
        assert int(sample["cls"]) == record["label"]
        assert sample["jpeg"] == read_sample(record)
        name = f"{record['image_id']}.JPEG"
        assert (source / name).read_bytes() == sample["jpeg"]
        assert classes[record["label"]] == os.path.dirname(name)


def test_we_read_what_webdataset_writes(source, tmp_path):
    files = sorted(source.glob("*/*.JPEG"))
    pattern = str(tmp_path / "other-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
        for number, file in enumerate(files):
            label = number % 3
            key = f"{number:05d}"
            sample = {"__key__": key, "json": {"a": 1}, "cls": label, "jpg": file.read_bytes()}
            writer.write(sample)
    records, errors, notes = read_all(tmp_path)
    assert not errors
    assert any("its classes have no names" in note for note in notes)
    assert [r["label"] for r in records] == [number % 3 for number in range(24)]
    assert [read_sample(r) for r in records] == [file.read_bytes() for file in files]
    assert (tmp_path / "index.npz").exists()


def test_reading_in_order_mixes_classes(made):
    labels = [record["label"] for record in records_of(made)]
    assert labels != sorted(labels)
    assert all(len(set(labels[start : start + 7])) > 1 for start in range(0, 21, 7))


def test_keys_hold_no_dots_and_are_not_taken_twice(tmp_path):
    folder = tmp_path / "in.put" / "c.1"
    folder.mkdir(parents=True)
    names = ["a.b.png", "a_b.jpg", "a_b.png", "é" * 60 + ".bmp"]
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    make_shards(tmp_path / "in.put", tmp_path / "out", workers=1)
    records = records_of(tmp_path / "out")
    data = {read_sample(record) for record in records}
    assert data == {(folder / name).read_bytes() for name in names}
    samples = webdataset.WebDataset(str(tmp_path / "out/out-000000.tar"), shardshuffle=False)
    assert [s["__key__"] for s in samples] == [r["image_id"] for r in records]
    assert len({record["image_id"] for record in records}) == 4


def test_keys_of_several_shards_get_their_names(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, {"0.png": some_image(), "0.cls": b"1\n"})
    records, errors, _ = read_all(tmp_path)
    assert [record["image_id"] for record in records] == ["a/0", "b/0"] and not errors


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_kinds_of_tar(tmp_path, kind):
    name = "n01/" + "long" * 20
    write_tar(
        tmp_path / "a.tar", {f"{name}.PNG": some_image("blue", "PNG"), f"{name}.cls": b"0"}, kind
    )
    (record,) = records_of(tmp_path)
    assert record["image_id"] == name
    assert np.asarray(read_image(record))[0, 0].tolist() == [0, 0, 255]


def test_a_flat_folder_called_val(source, tmp_path):
    home = tmp_path / "imagenet"
    (home / "val").mkdir(parents=True)
    shutil.copytree(source, home / "train")
    for label in range(3):
        shutil.copy(source / class_name(label) / "0.JPEG", home / "val" / f"{2 - label}.JPEG")
    text = "".join(f"{2 - label}.JPEG {class_name(label)}\n" for label in range(3))
    (home / "val_labels.txt").write_text(text)
    make_shards(home / "val", tmp_path / "out", workers=1)
    assert {r["image_id"]: r["label"] for r in records_of(tmp_path / "out")} == {
        "0": 2,
        "1": 1,
        "2": 0,
    }


# --- the converter -------------------------------------------------------------------------------


def test_it_goes_on(source, made):
    files = sorted(made.glob("*.tar"))
    before = {file.name: file.read_bytes() for file in files}
    times = {file.name: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    files[2].write_bytes(before[files[2].name][:3000])  # damaged externally
    (made / "train-000001.tar.tmp").write_bytes(b"of a killed run")
    (made / "index.npz").unlink()
    assert make_shards(source, made, samples_per_shard=7, workers=2) == (2, 2)
    assert {file.name: file.read_bytes() for file in sorted(made.glob("*.tar"))} == before
    assert files[0].stat().st_mtime_ns == times[files[0].name]
    assert files[3].stat().st_mtime_ns == times[files[3].name]
    assert sorted(os.listdir(made)) == sorted([*before, "classes.txt", "index.npz", "shards.json"])


@pytest.mark.parametrize("same_size", [False, True])
def test_an_image_that_was_replaced_is_taken_anew(source, tmp_path, same_size):
    folder, out = tmp_path / "train", tmp_path / "shards"
    shutil.copytree(source, folder)
    make_shards(folder, out, samples_per_shard=7, workers=1)
    image = folder / class_name(1) / "2.JPEG"
    old, times = image.read_bytes(), image.stat()
    new = old[:-1] + b"x" if same_size else old + b"x"
    image.unlink()
    image.write_bytes(new)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p and tar do
    assert make_shards(folder, out, samples_per_shard=7, workers=1) == (1, 3)
    (record,) = [r for r in records_of(out) if r["image_id"] == f"{class_name(1)}/2"]
    assert read_sample(record) == new
    assert make_shards(folder, out, samples_per_shard=7, workers=1) == (0, 4)


def test_the_number_of_workers_changes_nothing(source, made, tmp_path):
    make_shards(source, tmp_path / "two" / "train", samples_per_shard=7, workers=2)
    for file in made.glob("*.tar"):
        assert file.read_bytes() == (tmp_path / "two" / "train" / file.name).read_bytes()


@pytest.mark.slow
def test_killed_and_restarted(tmp_path):
    """The result of a killed and restarted conversion is that of an uninterrupted one."""
    folder = tmp_path / "train"
    for label in range(3):
        (folder / class_name(label)).mkdir(parents=True)
        for number in range(400):
            data = np.random.default_rng([label, number]).bytes(40000)
            (folder / class_name(label) / f"{number}.JPEG").write_bytes(data)
    make_shards(folder, tmp_path / "whole" / "train", samples_per_shard=20, workers=1)
    target = tmp_path / "killed" / "train"
    command = [sys.executable, str(REPOSITORY / "tools" / "make_shards.py"), str(folder)]
    command += [str(target), "--samples-per-shard", "20", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 300
    while time.monotonic() < limit and len(list(target.glob("*.tar"))) < 5:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = len(list(target.glob("*.tar")))
    assert 5 <= there < 60
    _, errors, _ = read_all(target)
    assert any("of 1200" in line for line in errors)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.match(rf"{60 - there} .*\b{there}\b.*\n$", done.stdout)
    assert "1200/1200" in done.stderr and "Warning" not in done.stderr
    for file in (tmp_path / "whole" / "train").glob("*.tar"):
        assert file.read_bytes() == (target / file.name).read_bytes()
    records, errors, _ = read_all(target)
    assert len(records) == 1200 and not errors


def test_other_content_is_refused(source, made, tmp_path, capsys):
    def error(*arguments: object, status: int = 1) -> str:
        assert main([str(argument) for argument in arguments]) == status
        return capsys.readouterr().err.splitlines()[-1]

    assert "other images or options (samples_per_shard)" in error(source, made)
    other = make_imagenet(tmp_path / "other", classes=2) / "imagenet" / "train"
    said = error(other, made, "--samples-per-shard", "7")
    assert "(images, sha256_of_names)" in said
    (made / "train-000009.tar").write_bytes(b"")
    said = error(source, made, "--samples-per-shard", "7")
    assert "train-000009.tar" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "contains other files, such as thesis.tex" in error(source, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    assert "is inside" in error(other, other / "shards")
    (made / "train-000009.tar").unlink()
    assert "already contains shards" in error(made, tmp_path / "x")
    assert "--workers is 0" in error(source, tmp_path / "x", "--workers", "0", status=2)
    negative = error(source, tmp_path / "x", "--samples-per-shard=-1", status=2)
    assert "--samples-per-shard is -1" in negative
    assert "cannot be read" in error(tmp_path / "gone", tmp_path / "x")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error(source, tmp_path / "file" / "x")


def test_an_image_that_cannot_be_read_is_named(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    lost = copy / class_name(1) / "3.JPEG"
    lost.unlink()
    lost.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"3.JPEG: No such file"):
        make_shards(copy, tmp_path / "out", workers=1)


# --- the index -----------------------------------------------------------------------------------


def count_looks(monkeypatch, folder: Path) -> list[str]:
    """Returns the shards that are indexed again; the records must equal those of a new index."""
    looked = []

    def look(path: str):
        looked.append(os.path.basename(path))
        return index_shard(path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "index_shard", look)
        records = records_of(folder)
    paths = sorted(folder.glob("*.tar"))
    assert records == shard_records(str(folder), [index_shard(str(path)) for path in paths])
    return looked


def test_index_is_used_while_it_is_fresh(made, monkeypatch):
    assert count_looks(monkeypatch, made) == []
    shard = made / "train-000001.tar"
    os.utime(shard, ns=(1, 1))
    assert count_looks(monkeypatch, made) == [shard.name]
    assert count_looks(monkeypatch, made) == []
    status = shard.stat()
    members = {"0.png": some_image(), "0.cls": b"1"}
    write_tar(shard, members)  # shorter, with the same time
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert count_looks(monkeypatch, made) == [shard.name]
    shutil.copy(shard, made / "train-000009.tar")
    assert count_looks(monkeypatch, made) == ["train-000009.tar"]
    shard.unlink()
    assert count_looks(monkeypatch, made) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other", "older", "short"])
def test_damaged_index_is_made_again(made, monkeypatch, damage):
    index = made / "index.npz"
    data = index.read_bytes()
    parts = dict(np.load(io.BytesIO(data)))
    if damage == "missing":
        index.unlink()
    elif damage == "empty":
        index.write_bytes(b"")
    elif damage == "cut":
        index.write_bytes(data[: len(data) // 2])
    elif damage == "other":
        np.savez(index, something=np.zeros(3))
    elif damage == "older":
        np.savez(index, **{**parts, "format": np.array(0)})
    else:
        np.savez(index, **{**parts, "labels": parts["labels"][:-1]})
    assert len(count_looks(monkeypatch, made)) == 4
    assert count_looks(monkeypatch, made) == []


def test_folders_that_cannot_be_written_to(made, monkeypatch, caplog):
    """The failure is simulated, because root may write everywhere."""
    (made / "index.npz").unlink()

    def refuse(path, mode="wb"):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shards, "atomic_write", refuse)
    with caplog.at_level("INFO"):
        assert len(count_looks(monkeypatch, made)) == 4
    assert f"{made}/index.npz cannot be written" in caplog.text
    assert count_looks(monkeypatch, made) == []
    assert not (made / "index.npz").exists()
    monkeypatch.setattr(shards, "atomic_write", atomic_write)
    os.utime(made / "train-000000.tar", ns=(1, 1))
    assert count_looks(monkeypatch, made) == ["train-000000.tar"]


def _index_here(folder: Path) -> int:
    return len(records_of(folder))


def test_processes_that_index_at_once(made):
    (made / "index.npz").unlink()
    with get_context("fork").Pool(4) as pool:
        assert pool.map(_index_here, [made] * 8) == [24] * 8
    assert sorted(os.listdir(made))[:2] == ["classes.txt", "index.npz"]
    assert not [name for name in os.listdir(made) if name.startswith("index.npz.")]


# --- reading -------------------------------------------------------------------------------------


def _digest(record: dict) -> tuple[int, int]:
    pixels = np.asarray(read_image(record)).astype(int)
    return record["label"], int((pixels * np.arange(pixels.size).reshape(pixels.shape)).sum())


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same(made, method):
    records = records_of(made) * 8
    expected = [_digest(record) for record in records]  # the shards are open when the workers start
    with get_context(method).Pool(2) as pool:
        assert pool.map(_digest, records, chunksize=3) == expected


def test_few_files_stay_open(tmp_path):
    for number in range(100):
        write_tar(tmp_path / f"{number:03d}.tar", {"0.png": some_image(), "0.cls": b"0"})
    records = records_of(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for record in records * 2:
        read_image(record)
    assert len(os.listdir("/proc/self/fd")) <= before + 64


def test_broken_images_are_named_by_shard_and_key(made):
    record = records_of(made)[3]
    with open(record["file_name"], "r+b") as file:
        file.seek(record["offset"])
        file.write(bytes(record["size"]))
    with pytest.raises(UserError) as caught:
        read_image(record)
    place = f"{record['file_name']} key {record['image_id']}"
    assert str(caught.value).startswith(f"the image {place} cannot be read (")
    with pytest.raises(UserError, match="10 bytes"):
        size = os.path.getsize(record["file_name"])
        read_image({**record, "offset": size - record["size"] + 10})


# --- damage --------------------------------------------------------------------------------------

PAIR = {"0.jpg": some_image(), "0.cls": b"0"}
CONTENT = {
    "a class's own tar": ({"n01_1.JPEG": some_image()}, "1 of 1 images have no .cls file"),
    "label alone": ({**PAIR, "1.cls": b"0"}, "'1' has a .cls but no image"),
    "no number": (
        {"0.jpg": some_image(), "0.cls": b"cat"},
        "0.cls contains b'cat', it must be a l",
    ),
    "below 0": ({"0.jpg": some_image(), "0.cls": b"-1"}, "0.cls contains b'-1', it must be a l"),
    "two images": ({**PAIR, "0.png": some_image()}, "the key '0' has two images"),
    "nothing": ({"readme": b"hello"}, "there are no images in"),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_wrong_content_is_told(tmp_path, kind):
    members, said = CONTENT[kind]
    write_tar(tmp_path / "a.tar", members)
    records, errors, _ = read_all(tmp_path)
    assert not records
    assert len(errors) == 1 and said in errors[0], errors


def test_damaged_shards_are_told(made):
    shard = made / "train-000002.tar"
    whole = shard.read_bytes()
    second = next(
        r for r in records_of(made) if r["file_name"] == str(shard) and r["offset"] > 1000
    )
    header = second["offset"] - tarfile.BLOCKSIZE
    overwritten = whole[:header] + b"\xff" * 512 + whole[header + 512 :]
    for data in (b"", b"gone", whole[:700], whole[:5120], whole[:-10240], overwritten):
        shard.write_bytes(data)
        records, errors, _ = read_all(made)
        assert not records
        assert len(errors) == 1 and f"the shard {shard} cannot be read (" in errors[0], errors


def test_lost_shards_and_labels_are_told(made):
    lost = made / "train-000003.tar"
    lost.rename(made.parent / lost.name)
    _, errors, _ = read_all(made)
    assert "contain only 21 of 24 images: run tools/make_shards.py again" in errors[0]
    (made.parent / lost.name).rename(lost)
    (made / "classes.txt").write_text("one\ntwo\n")
    _, errors, _ = read_all(made)
    assert errors[0].startswith("labels beyond the 2 classes: 8 [")
    for text in ("one\none\ntwo\n", "one\n\ntwo\n", ""):
        (made / "classes.txt").write_text(text)
        _, errors, _ = read_all(made)
        assert "classes.txt must have one class per line" in errors[0]
    for encoding in ("utf-8", "utf-8-sig"):
        (made / "classes.txt").write_text("one\ntwo\nthree\n", encoding=encoding)
        assert not read_all(made)[1]
        assert read_classes(str(made)) == ["one", "two", "three"]
    (made / "shards.json").write_text("{")
    assert "shards.json is damaged" in read_all(made)[1][0]


def test_val_must_have_the_classes_of_train(made, source):
    names = [class_name(label) for label in range(3)]
    val = ClassificationSource(str(made), train_dir=str(source))
    findings = Findings()
    assert read_set(val, findings).classes == names and not findings.lines(ERROR)
    (made / "classes.txt").write_text("\n".join([names[1], names[0], names[2]]) + "\n")
    read_set(val, findings)
    (error,) = findings.lines(ERROR)
    assert f"number 0 is {names[1]}" in error
