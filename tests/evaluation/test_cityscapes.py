"""Tests the evaluation on Cityscapes against the official scripts, and over processes."""

import argparse
import json
import math
import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as official_instances
import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official_classes
import numpy as np
import pytest
import torch
from cityscapes import make_cityscapes, use_cityscapes, write_polygons
from cityscapesscripts.evaluation.instances2dict import instances2dict
from cityscapesscripts.helpers.labels import name2label, trainId2label
from conftest import REPOSITORY
from detectron2.data import MetadataCatalog
from detectron2.engine.launch import _find_free_port
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image
from predicted_scenes import (
    CLASSES,
    INSTANCES,
    THINGS,
    images_of,
    predict_classes,
    predict_instances,
    read,
    run_evaluator,
    to_instances,
    truth_file,
)

from contnet.config import load_config
from contnet.evaluation.build import build_evaluator
from contnet.evaluation.cityscapes import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    match_instances,
)
from contnet.launch.distributed import launch_run
from contnet.launch.environment import Processes
from contnet.utils.errors import UserError

pytest_plugins = ["predicted_scenes"]
pytestmark = pytest.mark.numpy1


def equal(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


# --- the official scripts on files ---------------------------------------------------------------


@pytest.fixture
def official(monkeypatch, tmp_path):
    """Provides the official scripts in a separate folder, with functions that numpy removed."""

    class Numpy:
        in1d = staticmethod(np.isin)

        def __getattr__(self, name):
            return getattr(np, name)

        def count_nonzero(self, array):
            return int(np.count_nonzero(array))

    folder = tmp_path / "official"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for module in (official_instances, official_classes):
        monkeypatch.setattr(module, "np", Numpy())
        args = copy(module.args)
        vars(args).update(quiet=True, JSONOutput=False, predictionPath=str(folder))
        vars(args).update(gtInstancesFile=str(folder / "gt.json"), predictionWalk=None)
        monkeypatch.setattr(module, "args", args)
    return SimpleNamespace(folder=folder)


def write_instances(folder: Path, image: str, instances: Instances) -> Path:
    stem = Path(image).stem.removesuffix("_leftImg8bit")
    lines = []
    rows = zip(instances.pred_masks, instances.pred_classes, instances.scores, strict=True)
    for number, (mask, index, score) in enumerate(rows):
        name = f"{stem}_{number}.png"
        Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(folder / name)
        lines.append(f"{name} {name2label[THINGS[index]].id} {score.item()}\n")
    file = folder / f"{stem}_pred.txt"
    file.write_text("".join(lines))
    return file


def official_instance_scores(folder: Path, images: list[str], predictions: list) -> dict:
    files = [str(write_instances(folder, *pair)) for pair in zip(images, predictions, strict=True)]
    truths = [truth_file(image, "instanceIds") for image in images]
    averages = official_instances.evaluateImgLists(files, truths, official_instances.args)
    averages = averages["averages"]
    scores = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
    for name, values in averages["classes"].items():
        scores |= {f"AP-{name}": values["ap"], f"AP50-{name}": values["ap50%"]}
    return {key: 100 * score for key, score in scores.items()}


def official_class_scores(folder: Path, images: list[str], predictions: list) -> dict:
    files = []
    for image, scores in zip(images, predictions, strict=True):
        ids = np.vectorize(lambda k: trainId2label[k].id)(scores.argmax(dim=0).numpy())
        files.append(str(folder / Path(image).name))
        Image.fromarray(ids.astype(np.uint8)).save(files[-1])
    truths = [truth_file(image, "labelIds") for image in images]
    found = official_classes.evaluateImgLists(files, truths, official_classes.args)
    kinds = {"IoU": "", "iIoU": "Inst", "IoU_sup": "", "iIoU_sup": "Inst"}
    scores = {}
    for kind, part in kinds.items():
        plural, single = ("Categories", "category") if "sup" in kind else ("Classes", "class")
        scores[kind] = found[f"averageScore{part}{plural}"]
        for name, score in found[f"{single}{part}Scores"].items():
            scores[f"{kind}-{name}"] = score
    return {key: 100 * score for key, score in scores.items()}


# --- instances -----------------------------------------------------------------------------------


def test_instance_scores_equal_the_official_scripts(cityscapes_root, official):
    images = images_of(cityscapes_root)
    predictions = [predict_instances(image) for image in images]
    expected = official_instance_scores(official.folder, images, predictions)
    outputs = [{"instances": instances} for instances in predictions]
    scores = run_evaluator(CityscapesInstanceEvaluator(INSTANCES), images, outputs)["cityscapes"]
    assert scores.keys() == expected.keys()
    assert [key for key in scores if not equal(scores[key], expected[key])] == []
    assert 0 < scores["AP"] < scores["AP50"] < 100
    assert math.isnan(scores["AP-truck"]) and 0 < scores["AP-car"] < 100


def without(value, key: str):
    """Removes a key from nested lists and dicts."""
    if isinstance(value, dict):
        return {k: without(v, key) for k, v in value.items() if k != key}
    return [without(v, key) for v in value] if isinstance(value, list) else value


def test_matches_equal_the_official_scripts(cityscapes_root, official):
    image = images_of(cityscapes_root)[0]
    instances = predict_instances(image)
    file = write_instances(official.folder, image, instances)
    args = official_instances.args
    official_instances.setInstanceLabels(args)
    truth_path = truth_file(image, "instanceIds")
    (truth,) = instances2dict([truth_path]).values()
    with Image.open(truth_path) as opened:
        expected = official_instances.assignGt2Preds(
            official_instances.filterGtInstances(truth, args),
            opened,
            official_instances.readPredInfo(str(file), args),
            args,
        )
    named = json.loads(json.dumps(expected))
    objects, predictions = (without(part, "imgName") for part in named)
    ours = match_instances(truth, read(truth_path), instances, THINGS)
    assert ours["prediction"] == predictions
    assert ours["groundTruth"] == objects
    assert any(p["voidIntersection"] for p in predictions["car"])
    assert any(len(p["matchedGt"]) > 1 for part in predictions.values() for p in part)


def test_the_truth_itself_gets_everything(cityscapes_root):
    images = images_of(cityscapes_root)
    outputs = [{"instances": predict_instances(image, exact=True)} for image in images]
    scores = run_evaluator(CityscapesInstanceEvaluator(INSTANCES), images, outputs)["cityscapes"]
    present = {"person", "rider", "car", "bicycle"}
    assert {key for key, score in scores.items() if round(score, 9) == 100} == {"AP", "AP50"} | {
        f"{kind}-{name}" for kind in ("AP", "AP50") for name in present
    }


def test_a_class_without_objects_does_not_count(cityscapes_root):
    images = images_of(cityscapes_root)
    outputs = [{"instances": predict_instances(image, exact=True)} for image in images]
    for output in outputs:
        instances = output["instances"]
        wrong = instances[:2]
        wrong.pred_classes = torch.full((2,), THINGS.index("truck"))
        output["instances"] = Instances.cat([instances, wrong])
    scores = run_evaluator(CityscapesInstanceEvaluator(INSTANCES), images, outputs)["cityscapes"]
    assert math.isnan(scores["AP-truck"]) and math.isnan(scores["AP50-truck"])
    assert scores["AP"] == pytest.approx(100, rel=1e-12)


def test_without_predictions_scores_are_zero(cityscapes_root):
    images = images_of(cityscapes_root)
    outputs = [{"instances": to_instances([], [], [])} for _ in images]
    scores = run_evaluator(CityscapesInstanceEvaluator(INSTANCES), images, outputs)["cityscapes"]
    assert scores["AP"] == scores["AP50-car"] == 0


def test_without_objects_scores_are_nan_and_silent(tmp_path):
    root = make_cityscapes(tmp_path, num_train=1, num_val=0)
    (polygons,) = root.glob("cityscapes/gtFine/*/*/*.json")
    write_polygons(polygons, [])
    for file in polygons.parent.glob("*.png"):
        image = read(str(file))
        Image.fromarray(np.zeros_like(image)).save(file)
    images = images_of(root)
    name = "cityscapes_without_objects"
    MetadataCatalog.get(name).set(gt_dir=str(polygons.parents[1]), thing_classes=THINGS)
    outputs = [{"instances": to_instances([], [], [])}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = run_evaluator(CityscapesInstanceEvaluator(name), images, outputs)["cityscapes"]
        classes = [{"sem_seg": torch.rand(19, 64, 128)}]
        every = run_evaluator(CityscapesSemSegEvaluator(name), images, classes)["sem_seg"]
    MetadataCatalog.remove(name)
    assert all(map(math.isnan, scores.values())) and all(map(math.isnan, every.values()))


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 8, 10])  # sums in another order would differ for the last two
def test_class_scores_equal_the_official_scripts(seed, cityscapes_root, official):
    images = images_of(cityscapes_root)
    predictions = [predict_classes(image, seed) for image in images]
    expected = official_class_scores(official.folder, images, predictions)
    outputs = [{"sem_seg": scores} for scores in predictions]
    scores = run_evaluator(CityscapesSemSegEvaluator(CLASSES), images, outputs)["sem_seg"]
    assert [key for key in scores if not equal(scores[key], expected[key])] == []
    assert all(math.isnan(expected[key]) for key in expected.keys() - scores.keys())
    assert list(scores)[:4] == ["IoU", "iIoU", "IoU_sup", "iIoU_sup"]
    assert len([key for key in scores if key.startswith("IoU-")]) == 19
    assert {key for key in scores if key.startswith("iIoU-")} == {f"iIoU-{n}" for n in THINGS}
    assert all(0 < scores[kind] < 100 for kind in ("IoU", "iIoU", "IoU_sup", "iIoU_sup"))


EVALUATED = [label for label in name2label.values() if not label.ignoreInEval]


def exact_classes(image: str) -> torch.Tensor:
    """Returns the truth; pixels without a class are "train"."""
    truth = torch.from_numpy(read(truth_file(image, "labelTrainIds")).astype(np.int64))
    truth[truth == 255] = 16
    return torch.nn.functional.one_hot(truth, 19).permute(2, 0, 1).float()


def test_which_classes_count(cityscapes_root):
    """A class that occurs nowhere is left out; an absent class that is predicted counts as 0."""
    images = images_of(cityscapes_root)
    predictions = [exact_classes(image) for image in images]
    outputs = [{"sem_seg": scores} for scores in predictions]
    evaluator = CityscapesSemSegEvaluator(CLASSES)
    scores = run_evaluator(evaluator, images, outputs)["sem_seg"]
    assert scores["IoU"] == 100
    assert scores["iIoU"] == pytest.approx(100, rel=1e-12)
    assert math.isnan(scores["IoU-train"]), "pixels without a class must not count"
    assert math.isnan(scores["IoU-truck"])
    ids = read(truth_file(images[0], "labelIds"))
    y, x = np.argwhere(ids == name2label["road"].id)[0]
    predictions[0][:, y, x] = 0
    predictions[0][14, y, x] = 1  # one pixel of "truck"
    wrong = run_evaluator(evaluator, images, outputs)["sem_seg"]
    assert wrong["IoU-truck"] == 0
    present = sum(not math.isnan(scores[f"IoU-{label.name}"]) for label in EVALUATED)
    assert wrong["IoU"] == pytest.approx(
        (100 * (present - 1) + wrong["IoU-road"]) / (present + 1), rel=1e-12
    )


def test_a_model_of_other_classes_is_told(cityscapes_root):
    images = images_of(cityscapes_root)[:1]
    with pytest.raises(UserError, match=r"54 classes.*NUM_CLASSES to 19"):
        outputs = [{"sem_seg": torch.rand(54, 64, 128)}]
        run_evaluator(CityscapesSemSegEvaluator(CLASSES), images, outputs)


# --- damaged ground truth ------------------------------------------------------------------------


def cut(file):
    Path(file).write_bytes(Path(file).read_bytes()[:200])


def shrink(file):
    Image.fromarray(read(file)[:, :100]).save(file)


def strange(file):
    pixels = read(file).copy()
    pixels[0, 0] = 99 if pixels.dtype == np.uint8 else 60000
    Image.fromarray(pixels).save(file)


DAMAGES = [(os.remove, "prepare_cityscapes"), (cut, "cannot be read"), (shrink, "has the shape")]


@pytest.mark.parametrize(("damage", "message"), [*DAMAGES, (strange, "is not a class id")])
@pytest.mark.parametrize("kind", ["labelIds", "instanceIds"])
def test_damaged_truth_is_named(own_root, damage, message, kind, capsys):
    image = images_of(own_root)[0]
    damage(truth_file(image, kind))
    cases = [(CityscapesSemSegEvaluator(CLASSES), {"sem_seg": predict(own_root, 0)})]
    if kind == "instanceIds":
        instances = to_instances([np.ones((64, 128), bool)], [0], [0.5])
        cases.append((CityscapesInstanceEvaluator(INSTANCES), {"instances": instances}))
    for evaluator, output in cases:
        with pytest.raises(UserError, match=message) as error:
            run_evaluator(evaluator, [image], [output])
        assert Path(image).stem.removesuffix("_leftImg8bit") in str(error.value)
    assert capsys.readouterr().out == ""


def predict(root: Path, number: int) -> torch.Tensor:
    return predict_classes(images_of(root)[number])


def test_images_that_are_left_out_are_told(cityscapes_root, caplog):
    images = images_of(cityscapes_root)[:3]
    outputs = [{"sem_seg": predict_classes(image)} for image in images]
    run_evaluator(CityscapesSemSegEvaluator(CLASSES), images, outputs)
    assert "the metrics are those of 3 images" in caplog.text
    caplog.clear()
    images = images_of(cityscapes_root)
    outputs = [{"sem_seg": predict_classes(image)} for image in images]
    run_evaluator(CityscapesSemSegEvaluator(CLASSES), images, outputs)
    assert "the metrics are those of" not in caplog.text


# --- several processes ---------------------------------------------------------------------------


def evaluate_everything(root: Path, output: Path, part: slice) -> dict:
    """Computes all metrics of the made-up predictions; ``part`` is this process's share."""
    images = images_of(root)
    results = {}
    config = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
    cfg = load_config(config, ["OUTPUT_DIR", str(output), "MODEL.MASK_ON", "True"])
    for name in (INSTANCES, CLASSES):
        outputs = [
            {"instances": predict_instances(image), "sem_seg": predict_classes(image)}
            for image in images[part]
        ]
        results |= run_evaluator(build_evaluator(cfg, name), images[part], outputs)
    return results


def evaluate_in_parallel(args):
    """Evaluates a process's share of the images, in the folders of its machine."""
    rank, machine = comm.get_rank(), Path(args.folder, f"machine{args.machine_rank}")
    for name in ("tmp", "here"):
        (machine / name).mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(machine / "tmp")
    os.chdir(machine / "here")
    use_cityscapes(args.root)
    results = evaluate_everything(args.root, machine / "out", slice(rank, None, 2))
    Path(args.folder, f"{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_get_the_same_numbers(machines, cityscapes_root, tmp_path):
    """The machines need not share a folder."""
    url = f"tcp://127.0.0.1:{_find_free_port()}"
    where = {"root": cityscapes_root, "folder": tmp_path}
    with ThreadPoolExecutor(machines) as starters:
        started = []
        for rank in range(machines):
            args = argparse.Namespace(**where, machine_rank=rank)
            processes = Processes(2 // machines, machines, rank, url)
            started.append(
                starters.submit(launch_run, evaluate_in_parallel, args, processes, "cpu")
            )
    assert [start.result() for start in started] == [None] * machines
    expected = evaluate_everything(cityscapes_root, tmp_path / "single", slice(None))
    (first, second) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert second == {}
    assert set(first) == {"cityscapes", "bbox", "segm", "sem_seg"}
    for task, scores in expected.items():
        assert first[task].keys() == scores.keys()
        assert [key for key in scores if not equal(first[task][key], scores[key])] == [], task
    left = [path for name in ("tmp", "here") for path in tmp_path.glob(f"machine*/{name}/*")]
    assert left == []


def test_nothing_is_left_in_the_working_directory(cityscapes_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate_everything(cityscapes_root, tmp_path / "out", slice(None))
    assert os.listdir(tmp_path) == ["out"]
