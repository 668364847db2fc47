"""Annotations that are read once: equal to Detectron2's, shared, and never stale."""

import copy
import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from cityscapes import draw_scene, use_cityscapes, write_polygons
from conftest import REPOSITORY, SMALL
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json
from detectron2.utils import comm
from torch import distributed, multiprocessing

from benchmarks.main import main as benchmarks
from contnet.config import load_config
from contnet.data.datasets.register import register_datasets
from contnet.data.findings import NOTE
from contnet.data.pipeline import annotation_cache, annotation_sources
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.loader import build_train_loader
from contnet.data.pipeline.records import Records
from contnet.data.validation import examine
from contnet.data.validation.classes import count_classes
from contnet.data.validation.dataset import check_dataset, check_datasets
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "mask_rcnn_contti.yaml")
SCENES = ("cityscapes_fine_instance_seg_train", "cityscapes_fine_sem_seg_train")
HEIGHT, WIDTH = 48, 64


pytestmark = pytest.mark.usefixtures("forget_datasets")


# --- annotations of every kind -------------------------------------------------------------------


def _polygon(rng: np.random.Generator, points: int = 5) -> list[float]:
    return np.round(rng.uniform(1, HEIGHT - 1, 2 * points), 2).tolist()


def _mask(rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    top, left = rng.integers(0, 20, 2)
    mask[top : top + 12, left : left + 17] = 1
    return np.asfortranarray(mask)


def _runs(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends.tolist(), flat.size]).tolist()
    return runs if flat[0] == 0 else [0, *runs]


def _segmentations(rng: np.random.Generator) -> dict[str, object]:
    compressed = mask_util.encode(_mask(rng))
    return {
        "one polygon": [_polygon(rng)],
        "two polygons": [_polygon(rng), _polygon(rng, 9)],
        "whole numbers": [[3, 4, 20, 5, 11, 30]],
        "some whole numbers": [[3, 4.5, 20, 5, 11.25, 30], _polygon(rng)],
        "a part too short": [[1.0, 2.0, 3.0, 4.0], _polygon(rng)],
        "an odd part": [_polygon(rng), [*_polygon(rng), 1.0]],
        "not finite": [[1.0, float("inf"), 2.0, 3.0, 4.0, 5.0]],
        "nothing left": [[1.0, 2.0, 3.0, 4.0]],
        "none": [],
        "compressed": {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
        "runs": {"size": [HEIGHT, WIDTH], "counts": _runs(_mask(rng))},
    }


def draw_content() -> dict:
    """An annotation file with all that Detectron2 reads, and what it leaves out."""
    rng = np.random.default_rng(5)
    items = []
    for number, segmentation in enumerate(_segmentations(rng).values()):
        items.append({"image_id": 40 - 7 * (number % 3), "segmentation": segmentation})
    items += [{"image_id": 26} for _ in range(2)]
    items[3]["keypoints"] = [10, 11, 2, 12.5, 13, 1, 0, 0, 0]
    items[4]["keypoints"] = []
    items.append({"image_id": 7, "segmentation": items[10]["segmentation"], "iscrowd": 1})
    items.append({"image_id": 999})  # of no image
    for number, item in enumerate(items, 1):
        box = np.round(rng.uniform(1, 20, 4), 2).tolist()
        item.update({"id": 100 - number, "category_id": [3, 7, 20][number % 3], "bbox": box})
        item.setdefault("iscrowd", 0)
        item["area"] = 30.5
    items[0]["bbox"] = [1, 2, 30, 20]
    del items[1]["iscrowd"]
    sizes = {40: (WIDTH, HEIGHT), 33: (WIDTH, HEIGHT), 26: (HEIGHT, WIDTH), 7: (WIDTH, HEIGHT)}
    images = [
        {"id": key, "file_name": f"ümlaut/{key}.jpg", "width": width, "height": height}
        for key, (width, height) in sizes.items()
    ]
    images.append({"id": 8, "file_name": "empty.jpg", "width": WIDTH, "height": HEIGHT})
    categories = [{"id": key, "name": f"class {key}"} for key in (20, 3, 7)]
    return {"images": images, "annotations": items, "categories": categories}


def usable_content() -> dict:
    """The same without what the checks refuse."""
    content = draw_content()
    items = content["annotations"]
    refused = {"a part too short", "an odd part", "not finite", "nothing left", "none"}
    wrong = [
        i for i, kind in enumerate(_segmentations(np.random.default_rng(0))) if kind in refused
    ]
    content["annotations"] = [
        item
        for i, item in enumerate(items)
        if i not in wrong and item["image_id"] != 999 and "segmentation" in item
    ]
    content["annotations"][1]["iscrowd"] = 0
    return content


class Drawn:
    """A registered data set of COCO's form, and a config that keeps annotations beside it."""

    def __init__(self, folder: Path, content: dict, *options: str):
        self.file = folder / "drawn.json"
        self.cache = folder / "cache"
        self.write(content)
        for image in content["images"]:
            path = folder / "images" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        own = {
            "DATASETS.REGISTER": [["drawn", str(self.file), str(folder / "images")]],
            "DATASETS.TRAIN": ("drawn",),
            "DATASETS.TEST": (),
            "DATASETS.CACHE_DIR": str(self.cache),
            "INPUT.MASK_FORMAT": "bitmask",
            "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        }
        values = [str(each) for pair in own.items() for each in pair]
        self.cfg = load_config(LEAF, [*SMALL, *values, *options])
        register_datasets(self.cfg)

    def write(self, content: dict) -> None:
        self.file.write_text(json.dumps(content))

    def load(self, train: bool = False) -> Records | list:
        return load_dataset_dicts(self.cfg, ["drawn"], train)

    def kept(self, ending: str = "records") -> list[Path]:
        return sorted(self.cache.glob(f"*.{ending}"))


@pytest.fixture
def drawn(tmp_path) -> Drawn:
    return Drawn(tmp_path, draw_content())


@pytest.fixture
def usable(tmp_path) -> Drawn:
    return Drawn(tmp_path, usable_content())


@pytest.fixture
def scenes(cityscapes_root, tmp_path):
    """A copy of the drawn Cityscapes, and a config."""
    root = tmp_path / "scenes"
    shutil.copytree(cityscapes_root, root)
    use_cityscapes(root)
    options = ["DATASETS.CACHE_DIR", str(tmp_path / "cache")]
    config = str(REPOSITORY / "configs" / "cityscapes" / "mask_rcnn_contti.yaml")
    yield root / "cityscapes", load_config(config, options)
    use_cityscapes(cityscapes_root)


@pytest.fixture
def parses(monkeypatch) -> list[int]:
    """The number of JSON files that were parsed."""
    counts, plain = [0], json.load

    def counted(*args, **kwargs):
        counts[0] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(json, "load", counted)
    return counts


def described(value: object) -> object:
    """A value with all its types and the order of its keys."""
    if isinstance(value, dict):
        return [(key, described(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [described(each) for each in value]
    return type(value), value


# --- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_records_are_those_of_detectron2(drawn, train):
    records = drawn.load(train)
    expected = get_detection_dataset_dicts("drawn", filter_empty=train)
    assert isinstance(records, Records)
    assert len(expected) == (3 if train else 5)
    assert described(records[:]) == described(expected)
    assert described(list(records)) == described(expected)
    sizes = [records.size(i) for i in range(len(records))]
    assert sizes == [(each["width"], each["height"]) for each in expected]
    assert drawn.load(train)[:] == expected


def test_classes_are_told_as_by_detectron2(drawn):
    drawn.load()
    load_coco_json(str(drawn.file), "", "theirs")
    ours, theirs = MetadataCatalog.get("drawn"), MetadataCatalog.get("theirs")
    MetadataCatalog.remove("theirs")
    assert ours.thing_classes == theirs.thing_classes == ["class 3", "class 7", "class 20"]
    ids = ours.thing_dataset_id_to_contiguous_id
    assert ids == theirs.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1, 20: 2}


def scenes_of_detectron2(name: str) -> list[dict]:
    """In the order of their names, for its own is the file system's."""
    return sorted(get_detection_dataset_dicts(name), key=lambda record: record["file_name"])


@pytest.mark.parametrize("name", SCENES)
def test_scenes_are_those_of_detectron2(scenes, name):
    _, cfg = scenes
    expected = scenes_of_detectron2(name)
    for _ in range(2):
        records = load_dataset_dicts(cfg, [name], train=True)
        assert isinstance(records, Records)
        assert described(records[:]) == described(expected)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("kept", [True, False])
def test_scenes_come_in_the_same_order_on_every_file_system(scenes, monkeypatch, name, kept):
    _, cfg = scenes
    if not kept:
        cfg.DATASETS.CACHE_DIR = ""
    listings = []

    def list_backwards(folder: str) -> list[str]:
        listings.append(folder)
        return sorted(os.listdir(folder), reverse=True)

    loader = "detectron2.data.datasets.cityscapes.PathManager.ls"
    monkeypatch.setattr(loader, list_backwards)
    files = [record["file_name"] for record in load_dataset_dicts(cfg, [name], train=False)]
    assert files == sorted(files) and len(files) > 1
    assert listings


def test_several_sets_follow_each_other(drawn, tmp_path):
    content = usable_content()
    del content["images"][0]
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    drawn.cfg.DATASETS.REGISTER.append(["other", str(file), "elsewhere"])
    register_datasets(drawn.cfg)
    for train in (False, True):
        records = load_dataset_dicts(drawn.cfg, ["drawn", "other"], train)
        expected = [
            each
            for name in ("drawn", "other")
            for each in get_detection_dataset_dicts(name, filter_empty=train)
        ]
        assert records[:] == expected
        assert pickle.loads(pickle.dumps(records))[:] == expected
        assert records[1:-1] == expected[1:-1]
        for outside in (-1, len(records)):
            with pytest.raises(IndexError):
                records[outside]


def test_a_record_is_a_new_dict_each_time(drawn):
    records = drawn.load()
    before = copy.deepcopy(records[1])
    records[1]["annotations"].clear()
    assert records[1] == before


def test_the_stream_is_the_same_as_of_a_list(usable):
    records = usable.load(train=True)
    order = []
    for dicts in (records, records[:]):
        stream = build_train_loader(usable.cfg, dicts, seed=3).batch_sampler
        order.append([next(batches) for batches in [iter(stream)] for _ in range(20)])
    assert order[0] == order[1]


# --- read once -----------------------------------------------------------------------------------


def _begin(drawn: Drawn) -> list[dict]:
    """What the start of a run asks for."""
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
    count_classes(cfg, "drawn")  # before the processes know each other, in a real start
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


def test_another_format_does_not_find_what_an_older_one_made(usable, monkeypatch):
    first = _begin(usable)
    for module, name in ((annotation_cache, "_RECORDS_FORMAT"), (examine, "_CHECKS_FORMAT")):
        monkeypatch.setattr(module, name, 99)
    assert _begin(usable) == first
    assert len(usable.kept()) == len(usable.kept("checks")) == 2


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


def test_what_is_wrong_is_told_each_time(drawn):
    for _ in range(2):
        with pytest.raises(UserError, match="fewer than 3 points"):
            check_datasets(drawn.cfg, ["drawn"])
    assert not drawn.kept()


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
    with pytest.raises(UserError, match="images that are missing"):
        check_datasets(usable.cfg, ["drawn"])


def test_a_loader_of_the_users_own_is_left_alone(usable):
    _begin(usable)
    DatasetCatalog.remove("drawn")
    DatasetCatalog.register("drawn", lambda: [{"file_name": "a.jpg", "width": 3, "height": 4}])
    assert usable.load() == [{"file_name": "a.jpg", "width": 3, "height": 4}]


# --- damage, and folders that cannot be written --------------------------------------------------


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def _tables(path: Path) -> int:
    """Where the tables begin."""
    size = int.from_bytes(path.read_bytes()[-40:-32], "little")
    return json.loads(path.read_bytes()[size:-40])["tables"]["starts"][0]


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
    told = [each.getMessage() for each in caplog.records if "are not kept" in each.getMessage()]
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
    plain = annotation_sources.read_instances

    def slow(file):
        content = plain(file)
        usable.write(draw_content())
        return content

    monkeypatch.setattr(annotation_sources, "read_instances", slow)
    with pytest.raises(UserError, match="drawn changed"):
        usable.load()
    assert not usable.kept()


# --- the benchmarks -------------------------------------------------------------------------------


@pytest.mark.slow
def test_benchmark_counts_parses(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = "--images 120 --objects 900 --processes 1 --detectron2 --scenes 0"
    assert benchmarks(["start-up", *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    parses = [int(line.split(" parses")[0].split()[-1]) for line in lines if " parses" in line]
    assert parses == [1, 0]


def test_benchmark_draws_scenes(capsys, cityscapes_root):
    try:
        assert benchmarks(["start-up", "--images", "0", "--scenes", "4"]) == 0
    finally:
        use_cityscapes(cityscapes_root)
    first, second = re.findall("4 scenes, (first|second) start", capsys.readouterr().out)
    assert (first, second) == ("first", "second")
