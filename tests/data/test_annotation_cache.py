"""Tests the annotation cache: shared, never stale, rebuilt if damaged."""

import json
import os
import pickle
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from annotated import SCENES, Drawn, draw_content, scenes_of_detectron2, usable_content
from cityscapes import draw_scene, write_polygons
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils import comm
from msgspec import msgpack
from torch import distributed, multiprocessing

from contnet.data.datasets import coco
from contnet.data.datasets.register import register_datasets
from contnet.data.findings import NOTE
from contnet.data.pipeline import annotations
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.records import Records
from contnet.data.validation import examine
from contnet.data.validation.classes import count_classes
from contnet.data.validation.dataset import check_dataset, check_datasets
from contnet.utils.errors import UserError

pytest_plugins = ["annotated"]


@pytest.fixture
def parses(monkeypatch) -> list[int]:
    """Counts the JSON files that are parsed."""
    counts, plain = [0], json.load

    def counted(*args, **kwargs):
        counts[0] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(json, "load", counted)
    return counts


# --- read once -----------------------------------------------------------------------------------


def _begin(drawn: Drawn) -> list[dict]:
    """Reads what a run reads when it starts."""
    assert count_classes(drawn.cfg, "drawn") == 3
    check_datasets(drawn.cfg, ["drawn"])
    return drawn.load(train=True)[:]


def test_a_file_is_parsed_once_for_all_starts(usable, parses):
    first = _begin(usable)
    assert parses == [1]
    assert _begin(usable) == first
    assert parses == [1]


def test_without_a_folder_it_is_parsed_each_time(tmp_path, parses):
    drawn = Drawn(tmp_path, usable_content(), "DATASETS.CACHE_DIR", "")
    first = _begin(drawn)
    assert isinstance(drawn.load(), list)
    assert parses[0] >= 3
    assert not list(tmp_path.rglob("*.records"))
    usable = Drawn(tmp_path, usable_content())
    DatasetCatalog.remove("drawn")
    register_datasets(usable.cfg)
    assert _begin(usable) == first


def test_the_folder_is_found_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    Drawn(tmp_path, draw_content(), "DATASETS.CACHE_DIR", "auto").load()
    assert list((tmp_path / "mine" / "contnet").glob("drawn-*.records"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Drawn(tmp_path, draw_content(), "DATASETS.CACHE_DIR", "auto").load()
    assert list((tmp_path / "home" / ".cache" / "contnet").glob("drawn-*.records"))


def _rank(rank: int, world_size: int, cfg, folder: str, results) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    comm.create_local_process_group(world_size)
    counts, plain = [0], json.load
    json.load = lambda *args, **kwargs: counts.__setitem__(0, counts[0] + 1) or plain(*args)
    count_classes(cfg, "drawn")  # in a real start, before the process group exists
    records = load_dataset_dicts(cfg, ["drawn"], train=True)
    results.put((counts[0], type(records), records[:]))


def test_of_several_processes_one_reads(usable, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    args = (3, usable.cfg, str(tmp_path), results)
    processes = [context.Process(target=_rank, args=(rank, *args)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    counts, kinds, found = zip(*(results.get() for _ in processes), strict=True)
    assert sum(counts) == 1
    assert set(kinds) == {Records}
    assert found[0] == found[1] == found[2] == usable.load(train=True)[:]


def test_scenes_that_passed_are_not_looked_at_again(scenes, monkeypatch):
    _, cfg = scenes
    found = [check_dataset(cfg, name).facts for name in SCENES]
    monkeypatch.setattr(examine, "check_layout", None)
    assert [check_dataset(cfg, name).facts for name in SCENES] == found


# --- never stale ---------------------------------------------------------------------------------


def _same_times(path: Path, change) -> None:
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def test_another_content_of_the_same_size_and_time_is_seen(usable):
    first = _begin(usable)
    content = usable_content()
    content["annotations"][0]["bbox"][0] += 1
    _same_times(usable.file, lambda: usable.write(content))
    second = _begin(usable)
    assert second != first
    assert second == get_detection_dataset_dicts("drawn")


def test_other_polygons_of_the_same_size_and_time_are_seen(scenes):
    root, cfg = scenes
    first = load_dataset_dicts(cfg, SCENES[:1], train=True)[:]
    file = sorted(root.glob("gtFine/train/*/*_polygons.json"))[0]
    text = file.read_text()
    assert "person" in text
    _same_times(file, lambda: file.write_text(text.replace('"person"', '"rider" ')))
    second = load_dataset_dicts(cfg, SCENES[:1], train=True)[:]
    assert second != first
    assert second == scenes_of_detectron2(SCENES[0])


def test_new_scenes_are_seen(scenes):
    root, cfg = scenes
    check_datasets(cfg, [SCENES[0]])
    before = len(load_dataset_dicts(cfg, SCENES[:1], train=True))
    image = sorted(root.glob("leftImg8bit/train/*/*.png"))[0]
    shutil.copy(image, image.with_name("drawnham_000077_000019_leftImg8bit.png"))
    with pytest.raises(UserError, match="images without polygons"):
        check_datasets(cfg, [SCENES[0]])
    labels = root / "gtFine" / "train" / image.parent.name / "drawnham_000077_000019_gtFine"
    write_polygons(Path(f"{labels}_polygons.json"), draw_scene(np.random.default_rng(1)))
    assert len(load_dataset_dicts(cfg, SCENES[:1], train=True)) == before + 1


def test_checks_of_one_model_do_not_stand_for_those_of_another(tmp_path):
    content = usable_content()
    for item in content["annotations"]:
        del item["segmentation"]
    boxes = Drawn(tmp_path, content, "MODEL.MASK_ON", "False")
    check_datasets(boxes.cfg, ["drawn"])
    masks = Drawn(tmp_path, content)
    with pytest.raises(UserError, match="objects without a mask"):
        check_datasets(masks.cfg, ["drawn"])
    check_datasets(boxes.cfg, ["drawn"])


def test_what_the_checks_do_not_know_is_an_error_too(usable):
    content = usable_content()
    content["annotations"][0]["keypoints"] = ["left", "right", 2]
    usable.write(content)
    with pytest.raises(UserError, match="drawn cannot be loaded"):
        check_datasets(usable.cfg, ["drawn"])
    with pytest.raises(UserError, match="drawn cannot be loaded"):
        usable.load()
    assert not usable.kept() and not usable.kept("tmp")


def test_notes_and_facts_are_told_each_time(usable):
    first, second = (check_dataset(usable.cfg, "drawn") for _ in range(2))
    assert len(usable.kept("checks")) == 1
    assert first.lines(NOTE) == second.lines(NOTE) != []
    assert first.facts == second.facts
    assert first.classes == second.classes


def test_images_that_went_are_missed_each_time(usable):
    check_datasets(usable.cfg, ["drawn"])
    (usable.file.parent / "images" / "empty.jpg").unlink()
    with pytest.raises(UserError, match="missing images"):
        check_datasets(usable.cfg, ["drawn"])


def test_a_loader_of_the_users_own_is_left_alone(usable):
    _begin(usable)
    DatasetCatalog.remove("drawn")
    MetadataCatalog.remove("drawn")
    DatasetCatalog.register("drawn", lambda: [{"file_name": "a.jpg", "width": 3, "height": 4}])
    assert usable.load() == [{"file_name": "a.jpg", "width": 3, "height": 4}]


# --- clean-up ------------------------------------------------------------------------------------


def _make(folder: Path, name: str, days: float = 1, size: int = 1000) -> Path:
    """Makes a file that was last used this many days ago."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(bytes(size))
    then = time.time() - 86400 * days
    os.utime(path, (then, then))
    return path


def _file_name(number: int, ending: str) -> str:
    return f"other-{number:024x}.{ending}"


def _change(drawn: Drawn) -> None:
    content = usable_content()
    content["annotations"][0]["bbox"][0] += 1
    drawn.write(content)


def test_files_of_other_formats_go(usable, monkeypatch):
    endings = ["records", "checks", "v1.records", "v1.checks", "v999.records"]
    old = [_make(usable.cache, _file_name(i, ending)) for i, ending in enumerate(endings)]
    others = [_make(usable.cache, name) for name in ("notes.txt", "mine.records", "x-12.checks")]
    first = _begin(usable)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in others)
    (kept,) = [path for path in usable.kept() if path not in others]
    monkeypatch.setattr(annotations, "_FORMAT", annotations._FORMAT + 1)
    assert _begin(usable) == first
    (new,) = [path for path in usable.kept() if path not in others]
    assert new != kept


def test_the_longest_unused_go_first(tmp_path):
    drawn = Drawn(tmp_path, usable_content(), "DATASETS.CACHE_SIZE_GB", "0.00005")
    current = f"v{annotations._FORMAT}.records"
    files = [_make(drawn.cache, _file_name(i, current), 1 + i, 20_000) for i in range(4)]
    _begin(drawn)
    assert [path.exists() for path in files] == [True, True, False, False]
    assert sum(path.stat().st_size for path in drawn.cache.iterdir()) <= 50_000
    assert len(drawn.kept()) == 3


def test_what_is_used_again_stays(tmp_path):
    drawn = Drawn(tmp_path, usable_content(), "DATASETS.CACHE_SIZE_GB", "1e-9")
    _begin(drawn)
    (first,) = drawn.kept()
    for path in drawn.cache.iterdir():
        os.utime(path, (0, 0))
    before = _begin(drawn)
    assert all(path.stat().st_mtime > 0 for path in (first, *drawn.kept("checks")))
    _change(drawn)
    assert _begin(drawn) != before
    assert first.exists() and len(drawn.kept()) == 2


@pytest.mark.parametrize("held", [True, False])
def test_what_a_run_has_open_stays(tmp_path, held):
    drawn = Drawn(tmp_path, usable_content(), "DATASETS.CACHE_SIZE_GB", "1e-9")
    records = drawn.load()
    expected = records[:]
    (first,) = drawn.kept()
    os.utime(first, (0, 0))
    if not held:
        del records
    _change(drawn)
    drawn.load()
    assert first.exists() == held
    if held:
        assert pickle.loads(pickle.dumps(records))[:] == expected


@pytest.mark.parametrize("size", ["0", "10"])
def test_within_the_limit_all_stay(tmp_path, size):
    drawn = Drawn(tmp_path, usable_content(), "DATASETS.CACHE_SIZE_GB", size)
    old = _make(drawn.cache, _file_name(0, f"v{annotations._FORMAT}.records"))
    _begin(drawn)
    assert old.exists()


def test_a_size_below_0_is_told(tmp_path):
    with pytest.raises(UserError, match=r"DATASETS\.CACHE_SIZE_GB is -1"):
        Drawn(tmp_path, usable_content(), "DATASETS.CACHE_SIZE_GB", "-1")


# --- damage, and read-only folders ---------------------------------------------------------------


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def _tables(path: Path) -> int:
    """Returns the position of the tables."""
    size = int.from_bytes(path.read_bytes()[-40:-32], "little")
    return msgpack.decode(path.read_bytes()[size:-40])["tables"]["starts"][0]


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "the digest alone": lambda path: path.write_bytes(path.read_bytes()[-32:]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "a bit of a record": lambda path: _flip(path, 100),
    "a bit of a table": lambda path: _flip(path, _tables(path) + 9),
    "a bit of the header": lambda path: _flip(path, -60),
    "a bit of the digest": lambda path: _flip(path, -1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(usable, caplog, damage):
    first = _begin(usable)
    (path,) = usable.kept()
    whole = path.read_bytes()
    DAMAGES[damage](path)
    assert _begin(usable) == first
    assert f"{path} is damaged" in caplog.text
    assert path.read_bytes() == whole


def test_damaged_notes_of_checks_are_made_again(usable):
    check_datasets(usable.cfg, ["drawn"])
    (path,) = usable.kept("checks")
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole.replace(b"class 3", b"class 4"), b"\xff\xfe", b""):
        assert damaged != whole
        path.write_bytes(damaged)
        check_datasets(usable.cfg, ["drawn"])
        assert path.read_bytes() == whole


def test_what_a_killed_writer_left_goes(usable):
    usable.cache.mkdir()
    left = usable.cache / "drawn-0123.records.tmp"
    left.write_bytes(b"half")
    _begin(usable)
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path, caplog):
    (tmp_path / "file").touch()
    drawn = Drawn(tmp_path, usable_content(), "DATASETS.CACHE_DIR", str(tmp_path / "file" / "x"))
    found = _begin(drawn)
    assert found == get_detection_dataset_dicts("drawn")
    told = [each.getMessage() for each in caplog.records if "are not cached" in each.getMessage()]
    assert f"{tmp_path / 'file' / 'x'} cannot be written (Not a directory)" in told[-1]


def test_a_full_disk_is_told_and_leaves_nothing(usable, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        found = usable.load(train=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == get_detection_dataset_dicts("drawn")
    assert "cannot be written (File too large)" in caplog.text
    assert [path.name for path in usable.cache.iterdir()] == ["lock"]
    assert isinstance(usable.load(), Records)


def test_a_change_while_it_is_read_is_an_error(usable, monkeypatch):
    plain = coco.read_instances

    def slow(file):
        content = plain(file)
        usable.write(draw_content())
        return content

    monkeypatch.setattr(coco, "read_instances", slow)
    with pytest.raises(UserError, match="drawn changed"):
        usable.load()
    assert not usable.kept()
