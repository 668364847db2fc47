"""Tests TEST.LOSS_PERIOD: losses on the test set, which have no effect on the training."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK, SMALL, metrics_of
from detectron2.utils.events import EventStorage
from equality import equal
from leaves import CONFIGS, SYSTEMS, TINY

from contnet.config import load_config
from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.engine.trainer import Trainer
from contnet.evaluation.evaluate import Evaluator
from contnet.evaluation.validation_loss import build_loss_mapper
from contnet.launch.main import main as train
from contnet.modeling.build import build_model

# Periods that do not coincide, a norm with running statistics, and dropout.
OPTIONS = """
SOLVER.MAX_ITER 7 LOG_PERIOD 4 TEST.LOSS_PERIOD 3 TEST.EVAL_PERIOD 0 SOLVER.CHECKPOINT_PERIOD 4
SOLVER.BASE_LR 0.0001 MODEL.CONTNET.LAST_DROP_RATE 0.2
TEST.AUG.ENABLED False
"""
CLASSES = ("MODEL.CLASSIFIER.NUM_CLASSES", "7", "SOLVER.WARMUP_FACTOR", "0.1")
BACKBONE = ("MODEL.CONTNET.NORM", "BN")


@pytest.fixture(autouse=True)
def data_here(coco_here, cityscapes_root, imagenet_here):
    """Provides tiny versions of all data sets."""


def words_of(name: str, *options: str) -> list[str]:
    small = [*QUICK, *CLASSES] if name.startswith("imagenet") else [*SMALL, *TINY, *BACKBONE]
    return [*small, *OPTIONS.split(), *SYSTEMS[name][0].split(), *options]


def run(name, folder, *options, flags=()):
    """Trains in this process; returns the folder."""
    words = words_of(name, *options, "OUTPUT_DIR", str(folder))
    assert train(["--config-file", str(CONFIGS / f"{name}.yaml"), *flags, *words]) == 0
    return folder


def split(folder):
    """Returns validation losses by iteration, and the lines of metrics.json without them."""
    losses, rest = {}, []
    for line in metrics_of(folder):
        found = {key: value for key, value in line.items() if key.startswith("validation/")}
        if found:
            losses[line["iteration"]] = found
        rest.append({key: value for key, value in line.items() if key not in found})
    return losses, rest


def state_of(folder):
    content = torch.load(folder / "model_final.pth")
    del content["contnet"]  # the folder is different
    return content


def every_system():
    """Yields all systems; `make test` leaves out those on Cityscapes, which take longest."""
    for name in SYSTEMS:
        fast = "imagenet" in name or "fcos" in name
        marks = pytest.mark.long if "cityscapes" in name else () if fast else pytest.mark.slow
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [*every_system()])
def test_it_leaves_no_trace(name, tmp_path):
    measured = run(name, tmp_path / "measured")
    plain = run(name, tmp_path / "plain", "TEST.LOSS_PERIOD", "0")
    losses, rest = split(measured)
    assert list(losses) == [2, 5, 6]
    for each in losses.values():
        parts = [value for key, value in each.items() if key != "validation/total_loss"]
        assert parts and each["validation/total_loss"] == pytest.approx(sum(parts))
    training = {key for line in rest for key in line if "loss" in key}
    assert {key.removeprefix("validation/") for key in losses[2]} >= training
    assert not split(plain)[0]
    by_iteration = {line["iteration"]: line for line in rest}
    assert all(by_iteration[line["iteration"]] == line for line in split(plain)[1])
    assert equal(state_of(measured), state_of(plain))


def test_a_resume_writes_the_same(tmp_path):
    whole = run("fcos_contti", tmp_path / "whole", "SOLVER.EMA.ENABLED", "True")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    lines = (cut / "metrics.json").read_text().splitlines(keepends=True)
    (cut / "metrics.json").write_text("".join(lines[:-1]))
    file = str(whole / "model_0000003.pth")
    run("fcos_contti", cut, "SOLVER.EMA.ENABLED", "True", flags=["--resume-from", file])
    assert metrics_of(cut) == metrics_of(whole)


def evaluator_and_model(name, *options):
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), words_of(name, *options))
    register_datasets(cfg)
    torch.manual_seed(1)
    return cfg, Evaluator(cfg), build_model(cfg)


def test_a_classifier_has_its_cross_entropy():
    """It has no smoothing or mixing, and is a mean over images, not over batches."""
    cfg, evaluator, model = evaluator_and_model(
        "imagenet/contti_strong", "TEST.IMS_PER_PROCESS", "8"
    )
    assert cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING > 0
    losses = evaluator.losses(model)
    mapper, total = build_loss_mapper(cfg), 0
    records = list(load_dataset_dicts(cfg, cfg.DATASETS.TEST, train=False))
    assert len(records) % 8
    for record in records:
        image = (mapper(record)["image"] - model.pixel_mean) / model.pixel_std
        with torch.no_grad():
            logits = model.network.eval()(image[None])
        total += F.cross_entropy(logits, torch.tensor([record["label"]])).item()
    assert losses["validation/loss_cls"] == pytest.approx(total / len(records), rel=1e-5)


def test_a_detector_has_those_of_its_test_images():
    """RetinaNet in training mode, with batch-independent norms and each image's own positives."""
    options = ("MODEL.CONTNET.NORM", "GN", "MODEL.CONTNET.LAST_DROP_RATE", "0.0")
    cfg, evaluator, model = evaluator_and_model("retinanet_contti", *options)
    losses = evaluator.losses(model)
    mapper, sums = build_loss_mapper(cfg), Counter()
    records = load_dataset_dicts(cfg, cfg.DATASETS.TEST, train=False)
    model.train()
    for record in records:
        inputs = mapper(record)
        assert min(inputs["image"].shape[1:]) <= cfg.INPUT.MIN_SIZE_TEST
        with torch.no_grad(), EventStorage():
            model.loss_normalizer = positives(model, inputs)
            sums.update({key: value.item() for key, value in model([inputs]).items()})
    means = {f"validation/{key}": value / len(records) for key, value in sums.items()}
    assert losses == pytest.approx(
        {"validation/total_loss": sum(means.values()), **means}, rel=1e-4
    )


def positives(model, inputs) -> int:
    """Counts the anchors of an image that are assigned to an object; at least 1."""
    features = model.backbone(model.preprocess_image([inputs]).tensor)
    anchors = model.anchor_generator([features[name] for name in model.head_in_features])
    (labels,), _ = model.label_anchors(anchors, [inputs["instances"]])
    return max(int(((labels >= 0) & (labels != model.num_classes)).sum()), 1)


def test_the_losses_are_the_same_each_time():
    """Faster R-CNN samples its proposals."""
    _, evaluator, model = evaluator_and_model("faster_rcnn_contti")
    state = torch.random.get_rng_state()
    first = evaluator.losses(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert evaluator.losses(model) == first


def test_images_without_truth_have_none(coco_here, tmp_path):
    file = coco_here / "datasets/coco/annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    del content["annotations"]
    (tmp_path / "info.json").write_text(json.dumps(content))
    images = str(file.parents[1] / "val2017")
    sets = ["DATASETS.REGISTER", f"[['info', '{tmp_path / 'info.json'}', '{images}']]"]
    sets += ["DATASETS.TEST", "('info', 'coco_2017_val')"]
    _, evaluator, model = evaluator_and_model("fcos_contti", *sets)
    losses = evaluator.losses(model)
    assert losses and all(key.startswith("coco_2017_val/validation/") for key in losses)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["giou", pytest.param("iou", marks=pytest.mark.long)])
def test_two_processes_measure_the_same(loss, tmp_path, monkeypatch):
    """FCOS reduces numbers over processes in its losses; the shares of the processes differ."""
    monkeypatch.delenv("DETECTRON2_DATASETS")  # They look in the working folder.
    options = ["MODEL.FCOS.BOX_LOSS", loss, "SOLVER.MAX_ITER", "1", "MODEL.CONTNET.NORM", "GN"]
    content = json.loads(Path("datasets/coco/annotations/instances_val2017.json").read_text())
    content["images"] = content["images"][:3]
    ids = [each["id"] for each in content["images"]]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]
    (tmp_path / "three.json").write_text(json.dumps(content))
    options += [
        "DATASETS.REGISTER",
        f"[['three', '{tmp_path}/three.json', 'datasets/coco/val2017']]",
    ]
    options += ["DATASETS.TEST", "('three',)", "SOLVER.BASE_LR", "0.0000001"]
    one = run("fcos_contti", tmp_path / "one", *options)
    two = run("fcos_contti", tmp_path / "two", *options, flags=["--num-gpus", "2"])
    (ours,), (theirs,) = (split(folder)[0].values() for folder in (one, two))
    assert theirs == pytest.approx(ours, rel=1e-4)


def test_an_interrupted_computation_costs_no_training(tmp_path, monkeypatch):
    """A checkpoint is saved before it, and a resume starts with it."""
    whole, cut = run("fcos_contti", tmp_path / "whole"), tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validation_losses", interrupt)
        with pytest.raises(InterruptedError):
            run("fcos_contti", cut)
    assert (cut / "last_checkpoint").read_text() == "model_0000002.pth"
    run("fcos_contti", cut, flags=["--resume"])
    assert metrics_of(cut) == metrics_of(whole)
    assert equal(state_of(cut), state_of(whole))
    assert not (cut / "model_0000002.pth").exists()


def interrupt(_trainer):
    raise InterruptedError
