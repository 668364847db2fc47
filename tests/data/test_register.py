"""Tests DATASETS.REGISTER: names, paths, number of classes, every process."""

import json
from pathlib import Path
from types import NoneType

import pytest
import torch
import yaml
from conftest import REPOSITORY, finish, metrics_of
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from contnet.config import is_set, load_config
from contnet.data.datasets.cityscapes import CityscapesSource
from contnet.data.datasets.classes import dataset_class_names
from contnet.data.datasets.classification import ClassificationSource
from contnet.data.datasets.coco import CocoSource
from contnet.data.datasets.register import find_source, register_datasets
from contnet.data.datasets.shapes import make_shapes
from contnet.data.findings import ERROR, NOTE
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.validation.dataset import check_dataset, check_datasets
from contnet.launch.arguments import configure
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
KEY = "MODEL.ROI_HEADS.NUM_CLASSES"
NAMES = ("mine_train", "mine_val")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("drawn") / "set", num_train=6, num_val=2)


def _entries(root="") -> list[list[str]]:
    return [
        [f"mine_{split}", f"{root}annotations/instances_{split}.json", f"{root}{split}"]
        for split in ("train", "val")
    ]


def _options(root="") -> list[str]:
    return [
        *("DATASETS.REGISTER", str(_entries(root))),
        *("DATASETS.TRAIN", "('mine_train',)"),
        *("DATASETS.TEST", "('mine_val',)"),
    ]


def _config(*opts: str, file: str = LEAF, eval_only: bool = False) -> CfgNode:
    return configure(file, opts, eval_only)[0]


def test_paths_start_in_the_working_directory(drawn, monkeypatch):
    monkeypatch.chdir(drawn)
    cfg = _config(*_options())
    registered = cfg.DATASETS.REGISTER
    assert registered == _entries(f"{drawn}/")
    monkeypatch.chdir("/")
    assert len(DatasetCatalog.get("mine_train")) == 6
    assert MetadataCatalog.get("mine_val").evaluator_type == "coco"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mine_val", CocoSource),
        ("coco_2017_val", CocoSource),
        ("keypoints_coco_2017_train", CocoSource),
        ("cityscapes_fine_instance_seg_val", CityscapesSource),
        ("cityscapes_fine_sem_seg_train", CityscapesSource),
        ("imagenet_val", ClassificationSource),
        ("coco_2017_val_panoptic_separated", NoneType),
        ("cityscapes_fine_panoptic_val", NoneType),
        ("lvis_v1_val", NoneType),
        ("nobody's", NoneType),
    ],
)
def test_kinds(drawn, name, kind):
    register_datasets(load_config(LEAF, _options(f"{drawn}/")))
    assert type(find_source(name)) is kind


def test_all_of_coco_is_known():
    kinds = {
        name: find_source(name)
        for name in DatasetCatalog.list()
        if MetadataCatalog.get(name).get("evaluator_type") == "coco"
    }
    assert len(kinds) > 10 and all(isinstance(each, CocoSource) for each in kinds.values())
    assert all(source.json_file.endswith(".json") for source in kinds.values())


def test_a_loader_of_ones_own_counts_whatever_its_metadata_say(drawn):
    """A subset of an annotation file, selected by Python code, is not treated as the whole file."""
    file, images = _entries(f"{drawn}/")[0][1:]
    DatasetCatalog.register("mine", lambda: load_coco_json(file, images, "mine")[:2])
    MetadataCatalog.get("mine").set(json_file=file, image_root=images, evaluator_type="coco")
    cfg = load_config(LEAF, ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"])
    assert len(load_dataset_dicts(cfg, ["mine"], train=True)) == 2
    findings = check_dataset(cfg, "mine")
    assert not findings.lines(ERROR) and len(findings.lines(NOTE)) == 1


@pytest.mark.parametrize("name", ["coco_2017_val", "cityscapes_fine_instance_seg_val"])
def test_a_built_in_name_can_be_given_away(name):
    catalogs = (DatasetCatalog, MetadataCatalog)
    before = [(catalog, catalog.pop(name)) for catalog in catalogs]
    try:
        DatasetCatalog.register(name, lambda: [{"file_name": "a.jpg", "width": 3, "height": 4}])
        assert find_source(name) is None
        assert len(load_dataset_dicts(load_config(LEAF), [name], train=False)) == 1
    finally:
        for catalog, entry in before:
            catalog[name] = entry


def test_a_set_of_detectron2s_own_call_is_loaded(drawn):
    register_coco_instances("theirs", {}, *_entries(f"{drawn}/")[0][1:])
    cfg = load_config(LEAF, ["DATASETS.TRAIN", "('theirs',)", "DATASETS.TEST", "()"])
    check_datasets(cfg, ["theirs"])
    assert len(load_dataset_dicts(cfg, ["theirs"], train=True)) == 6


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = load_config(LEAF, ["DATASETS.REGISTER", "[['mine_train', '~/a.json', '~/images']]"])
    assert cfg.DATASETS.REGISTER == [["mine_train", "/home/me/a.json", "/home/me/images"]]


def test_yaml_and_its_dump_say_the_same(drawn, tmp_path):
    content = {
        "_BASE_": LEAF,
        "DATASETS": {
            "REGISTER": _entries(f"{drawn}/"),
            "TRAIN": ["mine_train"],
            "TEST": ["mine_val"],
        },
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    cfg = _config(file=str(file))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again, notes = configure(str(tmp_path / "config.yaml"))
    assert json.dumps(again) == json.dumps(cfg)
    assert notes == []


def test_number_of_classes_comes_from_the_file(drawn):
    cfg, notes = configure(LEAF, _options(f"{drawn}/"))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4
    assert notes == [f"{KEY} 4: the number of classes of mine_train"]


def test_only_test_sets_count_in_evaluation(drawn):
    options = [*_options(f"{drawn}/"), "DATASETS.TRAIN", "('coco_2017_train',)"]
    assert _config(*options).MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert _config(*options, eval_only=True).MODEL.ROI_HEADS.NUM_CLASSES == 4


def test_a_number_that_the_user_gave_stays_and_is_checked(drawn, tmp_path):
    cfg = _config(*_options(f"{drawn}/"), KEY, "5")
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5
    with pytest.raises(UserError, match=f"mine_train: .* 4 classes, .*{KEY} is 5"):
        check_datasets(cfg, ["mine_train", "mine_val"])
    file = tmp_path / "leaf.yaml"
    file.write_text(f"_BASE_: {LEAF}\nMODEL: {{ROI_HEADS: {{NUM_CLASSES: 7}}}}\n")
    assert _config(*_options(f"{drawn}/"), file=str(file)).MODEL.ROI_HEADS.NUM_CLASSES == 7


def test_other_models_have_other_keys(drawn):
    levels = ["MODEL.RETINANET.IN_FEATURES", "['p3','p4','p5']"]
    cfg = _config(*_options(f"{drawn}/"), "MODEL.META_ARCHITECTURE", "RetinaNet", *levels)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 4
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    check_datasets(cfg, NAMES)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(UserError, match=r"objects, .*SemanticSegmentor"):
        check_datasets(cfg, NAMES)


def test_is_set(tmp_path):
    assert not is_set(KEY, LEAF, ["MODEL.WEIGHTS", KEY])
    assert is_set(KEY, LEAF, [KEY, "3"])
    assert is_set("MODEL.CONTNET.VARIANT", LEAF, [])
    (tmp_path / "x.yaml").write_text("MODEL: {ROI_HEADS: 3}")
    assert not is_set(KEY, str(tmp_path / "x.yaml"), [])


def test_built_in_sets_keep_the_configs_number():
    assert _config(KEY, "3").MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert _config().MODEL.ROI_HEADS.NUM_CLASSES == 80


def test_names_are_not_taken_twice(drawn):
    cfg = load_config(LEAF, _options(f"{drawn}/"))
    register_datasets(cfg)
    register_datasets(cfg)
    other = load_config(LEAF, ["DATASETS.REGISTER", "[['mine_train', 'other.json', 'images']]"])
    with pytest.raises(UserError, match=r"mine_train is already used .*train.json"):
        register_datasets(other)
    for name in ("coco_2017_train", "cityscapes_fine_sem_seg_val"):
        built_in = load_config(LEAF, ["DATASETS.REGISTER", f"[['{name}', 'o.json', 'images']]"])
        with pytest.raises(UserError, match=f"the name {name} is already used"):
            register_datasets(built_in)


@pytest.mark.parametrize(
    "value",
    ["['mine', 'a.json', 'images']", "[['mine', 'a.json']]", "[[1, 'a', 'b']]", "[['m', '', 'b']]"],
)
def test_form_is_told(value):
    with pytest.raises(UserError, match=r"DATASETS.REGISTER .*\[name, annotation file"):
        register_datasets(load_config(LEAF, ["DATASETS.REGISTER", value]))


def test_double_names_are_told():
    value = "[['mine', 'a.json', 'images'], ['mine', 'b.json', 'images']]"
    with pytest.raises(UserError, match="has the name 'mine' twice"):
        load_config(LEAF, ["DATASETS.REGISTER", value])


@pytest.mark.parametrize("change", ["reorder", "rename"])
def test_train_and_test_must_agree(drawn, tmp_path, change):
    content = json.loads((drawn / "annotations" / "instances_val.json").read_text())
    first, second = content["categories"][:2]
    if change == "reorder":
        first["name"], second["name"] = second["name"], first["name"]
    else:
        first["name"] = "disc"
    (tmp_path / "val.json").write_text(json.dumps(content))
    entries = _entries(f"{drawn}/")
    entries[1][1] = str(tmp_path / "val.json")
    cfg = _config(*_options(f"{drawn}/"), "DATASETS.REGISTER", str(entries))
    if change == "reorder":  # valid for evaluation, but not for training
        check_datasets(cfg, NAMES)
        cfg.DATASETS.TRAIN = NAMES
    with pytest.raises(UserError, match=r"mine_val: its classes .*mine_train"):
        check_datasets(cfg, NAMES)


def test_file_must_be_there(tmp_path):
    with pytest.raises(UserError, match="mine_train: the annotation file"):
        _config(*_options(f"{tmp_path}/"))


def _boxes_only(root: Path, target: Path) -> list[str]:
    """Writes the drawn set without masks, with ids from 10, keypoints, and no info."""
    entries = _entries(f"{root}/")
    for entry in entries:
        content = json.loads(Path(entry[1]).read_text())
        for item in content["annotations"]:
            del item["segmentation"]
            item["keypoints"] = [1, 1, 2] * 3
            item["category_id"] += 9
        for category in content["categories"]:
            category["id"] += 9
        del content["info"], content["licenses"]
        entry[1] = str(target / f"{entry[0]}.json")
        Path(entry[1]).write_text(json.dumps(content))
    return [*_options(), "DATASETS.REGISTER", str(entries)]


@pytest.mark.parametrize(
    ("leaf", "name", "expected"),
    [
        ("retinanet_contti", "coco_2017_val", (80, "person")),
        ("cityscapes/mask_rcnn_contti", "cityscapes_fine_instance_seg_val", (8, "person")),
        ("cityscapes/pspnet_contti", "cityscapes_fine_sem_seg_val", (19, "road")),
        ("imagenet/contti", "imagenet_val", None),  # the names are known after loading
    ],
)
def test_learned_classes_are_those_of_the_models_outputs(leaf, name, expected):
    cfg = load_config(str(REPOSITORY / "configs" / f"{leaf}.yaml"))
    found = dataset_class_names(cfg, [name])
    assert (found and (len(found), found[0])) == expected
    assert dataset_class_names(cfg, []) is None


def test_two_kinds_of_classes_are_not_named(monkeypatch):
    cfg = load_config(LEAF, ["MODEL.META_ARCHITECTURE", "PanopticFPN"])
    assert dataset_class_names(cfg, ["coco_2017_val_panoptic_separated"]) is None


def test_boxes_without_masks(drawn, tmp_path):
    options = _boxes_only(drawn, tmp_path)
    check_datasets(_config(*options), NAMES)
    with pytest.raises(UserError, match=r"MODEL.MASK_ON"):
        check_datasets(_config(*options, "MODEL.MASK_ON", "True"), NAMES)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "launcher"),
    [
        ("--num-gpus 2 DATALOADER.NUM_WORKERS 1", ()),
        ("", ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517")),
    ],
    ids=["two processes", "torchrun"],
)
def test_trains_evaluates_resumes(drawn, train_net, tmp_path, options, launcher):
    """Two processes train, and one resumes with the config that they saved."""
    run = tmp_path / "run"
    own = ["OUTPUT_DIR", str(run), "MODEL.CONTNET.NORM", "GN", *_boxes_only(drawn, tmp_path)]
    command = f"{options} --config-file {LEAF} SOLVER.MAX_ITER 2"
    output = finish(train_net(command, *own, launcher=launcher))
    assert output.count(f"{KEY} 4: the number of classes of mine_train") >= 1
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 4
    assert "bbox/AP" in metrics_of(run)[-1]
    model = torch.load(run / "model_final.pth")["model"]
    assert model["roi_heads.box_predictor.cls_score.weight"].shape[0] == 5
    if not launcher:
        finish(train_net(f"--config-file {run}/config.yaml --resume SOLVER.MAX_ITER 3"))
        assert metrics_of(run)[-1]["iteration"] == 2
