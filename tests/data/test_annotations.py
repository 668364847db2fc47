"""Tests that annotations equal Detectron2's, and that errors are reported each time."""

import copy
import json
import os
import pickle

import pytest
from annotated import (
    SCENES,
    Drawn,
    described,
    draw_content,
    scenes_of_detectron2,
    usable_content,
)
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json

from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.loader import build_train_loader
from contnet.data.pipeline.records import Records
from contnet.data.validation.dataset import check_datasets
from contnet.utils.errors import UserError

pytest_plugins = ["annotated"]


@pytest.fixture
def drawn(tmp_path) -> Drawn:
    return Drawn(tmp_path, draw_content())


@pytest.mark.parametrize("train", [False, True])
def test_records_are_those_of_detectron2(drawn, train):
    records = drawn.load(train)
    expected = get_detection_dataset_dicts("drawn", filter_empty=train)
    assert isinstance(records, Records)
    assert len(expected) == (3 if train else 5)
    assert described(records[:]) == described(expected)
    assert described(list(records)) == described(expected)
    assert records.sizes.tolist() == [[each["width"], each["height"]] for each in expected]
    assert drawn.load(train)[:] == expected


def test_classes_are_told_as_by_detectron2(drawn):
    drawn.load()
    load_coco_json(str(drawn.file), "", "theirs")
    ours, theirs = MetadataCatalog.get("drawn"), MetadataCatalog.get("theirs")
    MetadataCatalog.remove("theirs")
    assert ours.thing_classes == theirs.thing_classes == ["class 3", "class 7", "class 20"]
    ids = ours.thing_dataset_id_to_contiguous_id
    assert ids == theirs.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1, 20: 2}


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


def test_what_is_wrong_is_told_each_time(drawn):
    for _ in range(2):
        with pytest.raises(UserError, match="fewer than 3 points"):
            check_datasets(drawn.cfg, ["drawn"])
    assert not drawn.kept()
