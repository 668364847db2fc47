"""Tests data sets for classification: layouts, registration, numbers of classes."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from detectron2.data import DatasetCatalog, MetadataCatalog
from image_folders import KEY, LEAF, config, flatten, lines, load
from imagenet import class_name
from PIL import Image
from torchvision.datasets import ImageFolder

from contnet.config import load_config
from contnet.data.datasets.register import register_datasets
from contnet.data.datasets.shard_writer import make_shards
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.loader import build_train_loader
from contnet.data.validation.classes import count_classes
from contnet.data.validation.dataset import check_datasets
from contnet.launch.arguments import configure
from contnet.utils.errors import UserError

pytest_plugins = ["image_folders"]
DETECTOR = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")


# --- layouts -------------------------------------------------------------------------------------


def test_class_folders_are_those_of_image_folder(root):
    train = root / "imagenet" / "train"
    first = train / class_name(0)
    for name in ("a/x.png", "a-b/y.PNG", "a/c/z.webp", "B.jpg", "_.Jpeg"):
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(first / name)
    (first / "notes.txt").write_text("no image")
    expected = ImageFolder(str(train))
    records = load(config(), "imagenet_train")
    assert [(r["file_name"], r["label"]) for r in records] == expected.samples
    assert [r["image_id"] for r in records] == [
        os.path.relpath(path, train) for path, _ in expected.samples
    ]
    metadata = MetadataCatalog.get("imagenet_train")
    assert metadata.thing_classes == expected.classes
    assert metadata.evaluator_type == "classification"
    assert metadata.image_dir == str(train)


def test_shards_without_names_beside_named_classes_are_refused(root):
    home = root / "imagenet"
    make_shards(home / "train", home / "new", samples_per_shard=8, workers=1)
    (home / "new" / "classes.txt").unlink()
    shutil.rmtree(home / "train")
    (home / "new").rename(home / "train")
    cfg = config("MODEL.CLASSIFIER.NUM_CLASSES", "3")
    check_datasets(cfg, ["imagenet_train"])
    with pytest.raises(UserError, match=r"imagenet_train: .* no names"):
        check_datasets(cfg, ["imagenet_train", "imagenet_val"])


def test_shards(root):
    home = root / "imagenet"
    for split in ("train", "val"):
        make_shards(home / split, home / "new" / split, samples_per_shard=4, workers=1)
        expected = {r["image_id"]: r["label"] for r in load(config(), f"imagenet_{split}")}
        shutil.rmtree(home / split)
        (home / "new" / split).rename(home / split)
        DatasetCatalog.remove(f"imagenet_{split}")
        MetadataCatalog.remove(f"imagenet_{split}")
        records = load(config(), f"imagenet_{split}")
        assert {f"{r['image_id']}.JPEG": r["label"] for r in records} == expected
        assert all(r["file_name"].endswith(".tar") for r in records)
    assert MetadataCatalog.get("imagenet_val").thing_classes == [class_name(i) for i in range(3)]


def test_training_batches_need_no_sizes(root):
    cfg = config("SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "0")
    dicts = load(cfg, "imagenet_train")
    batch = next(iter(build_train_loader(cfg, dicts, seed=0)))
    assert len(batch) == 4
    assert all(set(item) >= {"file_name", "image_id", "label"} for item in batch)


def test_names_follow_the_environment(root, tmp_path, monkeypatch):
    config()
    assert MetadataCatalog.get("imagenet_val").image_dir == f"{root}/imagenet/val"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    config()
    assert MetadataCatalog.get("imagenet_val").image_dir == "datasets/imagenet/val"


# --- DATASETS.REGISTER ---------------------------------------------------------------------------


def registered(root: Path) -> list[str]:
    """Registers a flat set and a set with class folders, by paths."""
    classes = flatten(root)
    lines(root, classes)
    home = root / "imagenet"
    entries = [
        ["mine_train", str(home / "train")],
        ["mine_val", str(home / "val_labels.txt"), str(home / "val")],
    ]
    return [
        *("DATASETS.REGISTER", str(entries)),
        *("DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "('mine_val',)"),
    ]


def test_own_sets_decide_the_number_of_classes(root):
    options = registered(root)
    cfg, notes = configure(LEAF, options)
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 3
    assert notes == [f"{KEY} 3: the number of classes of mine_train"]
    check_datasets(cfg, ["mine_train", "mine_val"])
    assert len(load_dataset_dicts(cfg, ["mine_train"], train=True)) == 9
    assert len(load_dataset_dicts(cfg, ["mine_val"], train=False)) == 6
    assert count_classes(cfg, "mine_val") == 3
    register_datasets(cfg)
    other = load_config(LEAF, ["DATASETS.REGISTER", "[['mine_train', 'elsewhere']]"])
    with pytest.raises(UserError, match="mine_train is already used"):
        register_datasets(other)
    with pytest.raises(UserError, match=r"labels of images, .*GeneralizedRCNN"):
        detector, _ = configure(DETECTOR, options)
        check_datasets(detector, ["mine_train"])
    with pytest.raises(UserError, match=f"3 classes, but {KEY} is 5"):
        check_datasets(config(*options, KEY, "5"), ["mine_train"])


def test_a_classifier_refuses_objects(coco_root):
    home = coco_root / "coco"
    sets = [["c", f"{home}/annotations/instances_val2017.json", f"{home}/val2017"]]
    cfg = config("DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", "('c',)")
    with pytest.raises(UserError, match=r"objects, .*ImageClassifier"):
        check_datasets(cfg, ["c"])


@pytest.mark.parametrize(
    "value", ["[['m', 'labels.txt']]", "[['m', 'a.json']]", "[['m']]", "[['m', '']]"]
)
def test_form_of_entries_is_told(value):
    with pytest.raises(UserError, match=r"\[name, folder\]"):
        register_datasets(load_config(LEAF, ["DATASETS.REGISTER", value]))


# --- mistakes ------------------------------------------------------------------------------------


def test_label_files_are_for_flat_folders(root):
    options = registered(root)
    entries = [["mine_val", str(root / "imagenet/val_labels.txt"), str(root / "imagenet/train")]]
    cfg = config(*options[2:], "DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "()", KEY, "3")
    with pytest.raises(UserError, match="contains folders"):
        check_datasets(cfg, ["mine_val"])
    entries = [["mine", str(root / "imagenet" / "val")]]
    cfg = config("DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('mine',)", KEY, "3")
    with pytest.raises(UserError, match=r"DATASETS.REGISTER as \[name, label file"):
        check_datasets(cfg, ["mine"])
    with pytest.raises(UserError, match=r"data set mine: .* require a label file"):
        config("DATASETS.REGISTER", str(entries), "DATASETS.TRAIN", "('mine',)")
