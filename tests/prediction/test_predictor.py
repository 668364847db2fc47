"""Tests that predictions of trained runs are those of their evaluation, for all kinds of images."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, SMALL
from detectron2.data import MetadataCatalog
from leaves import CONFIGS, SYSTEMS, TINY
from PIL import Image
from untrained import NAMES, save_untrained
from untrained import OPTIONS as UNTRAINED

import contnet
from contnet.launch.main import main as train
from contnet.utils.errors import UserError

OPTIONS = """
SOLVER.MAX_ITER 3 SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5 TEST.DETECTIONS_PER_IMAGE 5
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0
MODEL.FCOS.SCORE_THRESH_TEST 0.0
"""
# Detectors on COCO; Cityscapes' results have other image names.
DETECTORS = [name for name, (_, tasks) in SYSTEMS.items() if tasks in ("bbox", "bbox segm")]


@pytest.fixture
def trained(coco_here, cityscapes_root, imagenet_here, tmp_path):
    """Trains a system for three steps; returns its folder."""

    def trained(name: str, *options: str) -> Path:
        folder = tmp_path / "run"
        small = QUICK if name.startswith("imagenet") else SMALL
        words = [*small, *TINY, *OPTIONS.split(), *SYSTEMS[name][0].split(), *options]
        assert not train(
            ["--config-file", str(CONFIGS / f"{name}.yaml"), *words, "OUTPUT_DIR", str(folder)]
        )
        return folder

    return trained


def same(found: dict, others: dict) -> bool:
    """Returns whether two predictions are equal."""
    return found.keys() == others.keys() and all(
        np.array_equal(value, others[key]) for key, value in found.items()
    )


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_are_those_of_the_evaluation(name, trained):
    folder = trained(name)
    (file,) = (folder / "inference").rglob("coco_instances_results.json")
    metadata = MetadataCatalog.get("coco_2017_val")
    numbers = metadata.thing_dataset_id_to_contiguous_id
    model = contnet.load_run(folder)
    assert model.task == "detection" and model.class_names == list(metadata.thing_classes)
    for image in json.loads(Path(metadata.json_file).read_text())["images"]:
        found = model(Path(metadata.image_root, image["file_name"]))
        rows = [row for row in json.loads(file.read_text()) if row["image_id"] == image["id"]]
        rows.sort(key=lambda row: -row["score"])
        assert len(rows) == len(found["scores"]) > 0
        assert found["scores"].tolist() == pytest.approx([row["score"] for row in rows])
        assert found["classes"].tolist() == [numbers[row["category_id"]] for row in rows]
        corners = np.array([row["bbox"] for row in rows])
        corners[:, 2:] += corners[:, :2]
        assert found["boxes"] == pytest.approx(corners, abs=1e-3)
        if "segm" in SYSTEMS[name][1]:
            assert found["masks"].shape == (len(rows), image["height"], image["width"])


def test_segmentation_is_that_of_the_evaluation(trained, cityscapes_root):
    folder = trained("cityscapes/pspnet_contti")
    model = contnet.load_run(folder)
    assert model.task == "segmentation"
    counts = np.zeros((19, 19))
    for path in sorted(cityscapes_root.rglob("leftImg8bit/val/**/*.png")):
        truth = str(path).replace("leftImg8bit", "gtFine").replace(".png", "_labelTrainIds.png")
        labels = np.array(Image.open(truth))
        found = model(path)["semantic"]
        assert found.shape == labels.shape
        known = labels < 19
        np.add.at(counts, (labels[known], found[known]), 1)
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    present = union > 0
    (record,) = json.loads((folder / "results.json").read_text())
    assert 100 * (hits / union)[present].mean() == pytest.approx(
        record["metrics"]["sem_seg"]["IoU"]
    )


def test_classification_is_that_of_the_evaluation(trained, imagenet_root):
    folder = trained("imagenet/contti_strong", "MODEL.CLASSIFIER.NUM_CLASSES", "7")
    model = contnet.load_run(folder)
    assert model.task == "classification" and len(model.class_names) == 7
    paths = sorted(path for path in imagenet_root.rglob("val/*/*") if path.is_file())
    found = model(paths, batch_size=4)
    hits = [each["names"][0] == path.parent.name for each, path in zip(found, paths, strict=True)]
    (record,) = json.loads((folder / "results.json").read_text())
    assert 100 * np.mean(hits) == pytest.approx(record["metrics"]["classification"]["top1"])
    assert all(1 >= each["scores"].sum() > 0 for each in found)


def test_instances_of_cityscapes(trained, cityscapes_root):
    model = contnet.load_run(trained("cityscapes/mask_rcnn_contti"))
    path = next(cityscapes_root.rglob("leftImg8bit/val/**/*.png"))
    found = model(path)
    assert len(found["boxes"]) == len(found["masks"]) == len(found["names"]) > 0
    assert set(found["names"]) <= set(
        MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes
    )
    assert found["masks"].shape[1:] == Image.open(path).size[::-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Loads an untrained detector."""
    return contnet.load_run(save_untrained(tmp_path_factory.mktemp("it"), "retinanet_contti"))


def draw(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_all_forms_of_an_image_are_one(model, tmp_path):
    pixels = draw(70, 90)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    found = model(str(path))
    assert len(found["boxes"]) == 5 and set(found["names"]) <= set(NAMES)
    for other in (path, pixels, Image.fromarray(pixels), Image.open(path)):
        assert same(model(other), found)
    first, second = model([path, pixels])
    assert same(first, found) and same(second, found)


def test_images_are_brought_to_what_the_model_was_trained_on(model, tmp_path):
    grey = draw(70, 90)[..., 0]
    of_grey = model(grey)
    for mode in ("RGB", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        Image.fromarray(grey).convert(mode).save(path)
        assert same(model(path), of_grey), mode
    sixteen = tmp_path / "sixteen.png"
    Image.fromarray(grey.astype(np.uint16) << 8).save(sixteen)
    assert same(model(sixteen), of_grey)
    turned, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(grey)).save(turned, exif=exif)
    assert same(model(turned), of_grey)


def test_scores(model):
    pixels = draw(70, 90)
    found = model(pixels)
    assert (np.diff(found["scores"]) <= 0).all()
    least = float(found["scores"][2])
    best = model(pixels, score=least)
    assert len(best["scores"]) == 3 and (best["boxes"] == found["boxes"][:3]).all()
    assert len(model(pixels, score=1.1)["boxes"]) == 0


def test_threads_share_a_model(model):
    images = [draw(60 + number, 90) for number in range(8)]
    alone = [model(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(model, images), alone))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("absent.jpg", "absent.jpg"),
        (np.zeros((4, 4, 4), np.uint8), "(4, 4, 4)"),
        (np.zeros((4, 4, 3)), "float64"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image(model, image, words):
    with pytest.raises(UserError) as raised:
        model([draw(60, 60), image])
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_run(model, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        contnet.load_run(tmp_path)
    bare = tmp_path / "bare.pth"
    torch.save(model.model.state_dict(), bare)
    with pytest.raises(UserError, match="--config-file"):
        contnet.load_run(bare)


def test_a_config_for_a_file_that_has_none(model, tmp_path):
    bare, pixels = tmp_path / "bare.pth", draw(70, 90)
    torch.save(model.model.state_dict(), bare)
    words = [*SMALL, *TINY, *UNTRAINED.split()]
    other = contnet.load_run(bare, CONFIGS / "retinanet_contti.yaml", words)
    assert (other(pixels)["boxes"] == model(pixels)["boxes"]).all()
