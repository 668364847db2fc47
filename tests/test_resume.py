"""A run that is killed and resumed equals one that was not, to the bit, with real processes; and
classifiers of every family and recipe, cut in this one.
"""

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import QUICK, REPOSITORY
from detectron2.engine import HookBase

from contnet.launch.arguments import parse_arguments
from contnet.launch.main import run

TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
ITERATIONS = 10
LEAF = "--config-file configs/faster_rcnn_contti.yaml"

EVERYTHING = """
SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.9 SOLVER.ACCUMULATE 2 SOLVER.AMP.ENABLED True
SOLVER.AMP.DTYPE bfloat16 SOLVER.OPTIMIZER AdamW SOLVER.BASE_LR 0.0001
MODEL.CONTNET.DROP_PATH_RATE 0.2 MODEL.CONTNET.DROP_RATE 0.1 DATALOADER.NUM_WORKERS 1
SOLVER.LR_SCHEDULER_NAME WarmupCosineLR
"""
SMALL_CROPS = """
INPUT.MIN_SIZE_TRAIN (64,96) INPUT.CROP.SIZE (48,64) MODEL.SEM_SEG_HEAD.CONVS_DIM 16
MODEL.PSP_HEAD.AUX_CONVS_DIM 16
"""
IMAGES = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 56 INPUT.CLASSIFIER.RESIZE_TEST 64
INPUT.CLASSIFIER.CROP_TEST 56 INPUT.CLASSIFIER.RANDOM_ERASING 0.5 SOLVER.EMA.ENABLED True
SOLVER.EMA.DECAY 0.9 SOLVER.IMS_PER_BATCH 8 SOLVER.ACCUMULATE 2 DATALOADER.NUM_WORKERS 1
TEST.IMS_PER_PROCESS 4
"""
SETTINGS = {
    "one process": (f"{LEAF} --num-gpus 1", ["DATALOADER.NUM_WORKERS", "2"]),
    "two processes": (
        f"{LEAF} --num-gpus 2",
        ["MODEL.CONTNET.NORM", "BN", "TEST.EVAL_PERIOD", "4"],
    ),
    "everything": (f"{LEAF} --num-gpus 1", EVERYTHING.split()),
    "running loss normaliser": (
        "--config-file configs/fcos_contti.yaml --num-gpus 2",
        ["MODEL.FPN.OUT_CHANNELS", "64"],
    ),
    "cityscapes masks": (
        "--config-file configs/cityscapes/mask_rcnn_contti.yaml",
        ["MODEL.CONTNET.NORM", "GN", "SOLVER.BASE_LR", "0.001"],
    ),
    "cityscapes classes, norms over two processes": (
        "--config-file configs/cityscapes/pspnet_contti.yaml --num-gpus 2",
        SMALL_CROPS.split(),
    ),
    "mixed images": (
        "--config-file configs/imagenet/contti_strong.yaml --num-gpus 2",
        IMAGES.split(),
    ),
}


def _options(folder: Path, more: list[str]) -> list[str]:
    own = f"""SOLVER.MAX_ITER {ITERATIONS} SOLVER.STEPS (6,) SOLVER.CHECKPOINT_PERIOD 3
    TEST.EVAL_PERIOD 5 LOG_PERIOD 2 OUTPUT_DIR {folder} TEST.DETECTIONS_PER_IMAGE 1000
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0""".split()
    return [*own, *more]


def _finish(process, timeout: float = 400) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-3000:]
    return output


def _kill_after(process, folder: Path, checkpoint: str, iteration: int) -> None:
    """SIGKILL to the run once it has ``checkpoint`` or a later one, and an iteration's metrics."""
    last, further = folder / "last_checkpoint", folder / "metrics.json"
    output = []
    # A run that prints into a full pipe waits.
    reader = threading.Thread(target=lambda: output.append(process.stdout.read()))
    reader.start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            reader.join()
            pytest.fail(f"ended before it could be killed: {output[0][-3000:]}")
        lines = further.read_text().splitlines() if further.exists() else []
        saved = last.exists() and last.read_text() >= checkpoint
        if saved and lines and json.loads(lines[-1])["iteration"] >= iteration:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()
            return
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("the run made no progress")


def _metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_and_resumed_equals_uncut(train_net, request, tmp_path, setting):
    launch, more = SETTINGS[setting]
    for name in ("cityscapes", "imagenet"):
        if name in launch:
            root = request.getfixturevalue(f"{name}_root")
            train_net = partial(train_net, DETECTRON2_DATASETS=str(root))
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    output = _finish(train_net(launch, *_options(uncut, more)))
    assert ("computed by naiveSyncBN" in output) == ("pspnet" in launch)

    # Checkpoints follow iterations 2, 5, 8: killed after the line of iteration 7, off both periods.
    first = train_net(launch, *_options(cut, more))
    _kill_after(first, cut, "model_0000005.pth", 7)
    assert (cut / "last_checkpoint").read_text() in ("model_0000005.pth", "model_0000008.pth")
    _finish(train_net(f"{launch} --resume", *_options(cut, more)))

    expected, found = _metrics(uncut), _metrics(cut)
    assert [line["iteration"] for line in found] == [line["iteration"] for line in expected]
    # As text, where not-a-number equals itself.
    assert list(map(repr, found)) == list(map(repr, expected))
    mains = {"pspnet": "sem_seg/IoU", "imagenet": "classification/top1"}
    main = next((metric for name, metric in mains.items() if name in launch), "bbox/AP")
    assert any(main in line for line in expected)
    for name in ("model_final.pth", "model_best.pth"):
        assert _same(*(torch.load(folder / name) for folder in (uncut, cut)))
    results = [(folder / "results.json").read_text() for folder in (uncut, cut)]
    assert results[0] == results[1]
    task, metric = main.split("/")
    values = [each["metrics"][task][metric] for each in json.loads(results[0])]
    assert len(values) > 1 and (any(values) or "faster_rcnn" not in launch)


@pytest.mark.slow
def test_other_number_of_processes_keeps_the_count_of_images(train_net, tmp_path):
    options = _options(tmp_path, ["SOLVER.IMS_PER_BATCH", "4"])
    first = train_net(f"{LEAF} --num-gpus 2", *options)
    _kill_after(first, tmp_path, "model_0000005.pth", 5)
    resumed_at = int((tmp_path / "last_checkpoint").read_text()[6:13]) + 1
    output = _finish(train_net(f"{LEAF} --num-gpus 1 --resume", *options))
    assert f"Resuming after {4 * resumed_at} images" in output
    assert "order is no longer" in output
    assert _metrics(tmp_path)[-1]["images_seen"] == 4 * ITERATIONS


@pytest.mark.slow
def test_other_number_of_workers_changes_nothing(train_net, tmp_path):
    for workers in ("0", "2"):
        options = _options(tmp_path / workers, ["DATALOADER.NUM_WORKERS", workers])
        _finish(train_net(LEAF, *options))
    assert list(map(repr, _metrics(tmp_path / "0"))) == list(map(repr, _metrics(tmp_path / "2")))


@pytest.mark.slow
def test_cut_line_in_metrics_is_dropped(train_net, tmp_path):
    options = _options(tmp_path, [])
    first = train_net(LEAF, *options)
    _kill_after(first, tmp_path, "model_0000002.pth", 3)
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 5, "total_lo')
    _finish(train_net(f"{LEAF} --resume", *options))
    iterations = [line["iteration"] for line in _metrics(tmp_path)]
    assert iterations == sorted(set(iterations))
    assert iterations[-1] == ITERATIONS - 1


# --- every family and recipe of classifiers ------------------------------------------------------

FEW_OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 4 SOLVER.CHECKPOINT_PERIOD 2
TEST.EVAL_PERIOD 2 LOG_PERIOD 1 SOLVER.WARMUP_FACTOR 0.1
"""
AVERAGED = "SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5"
# All of the strong ones mix images; contti_strong's run with two processes is above.
CLASSIFIERS = {
    "contti": "SOLVER.BASE_LR 0.01",
    "contti_strong": AVERAGED,
    "res18": "MODEL.CLASSIFIER.DROP_PATH_RATE 0.2",
    "deit_ti_strong": AVERAGED,
}


class Cut(HookBase):
    """Ends a run between two checkpoints."""

    def after_step(self):
        if self.trainer.iter == 2:
            raise InterruptedError


@pytest.mark.parametrize("leaf", CLASSIFIERS)
def test_a_classifier_that_was_cut_equals_uncut(imagenet_root, monkeypatch, tmp_path, leaf):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    file = str(REPOSITORY / "configs" / "imagenet" / f"{leaf}.yaml")
    options = ["--config-file", file, *QUICK, *FEW_OPTIONS.split(), *CLASSIFIERS[leaf].split()]

    def arguments(folder, *more):
        return parse_arguments([*options, "OUTPUT_DIR", str(folder), *more])

    run(arguments(uncut))
    with pytest.raises(InterruptedError):
        run(arguments(cut), lambda trainer: trainer.last_hooks.append(Cut()))
    assert (cut / "last_checkpoint").read_text() == "model_0000001.pth"
    assert [line["iteration"] for line in _metrics(cut)] == [0, 1, 2]
    run(arguments(cut, "--resume"))

    expected = _metrics(uncut)
    assert _metrics(cut) == expected and len(expected) == 4
    assert len({line["total_loss"] for line in expected}) == 4
    states = [torch.load(folder / "model_final.pth") for folder in (uncut, cut)]
    assert _same(*states) and ("ema" in states[0]) == (CLASSIFIERS[leaf] == AVERAGED)
    assert (cut / "results.json").read_text() == (uncut / "results.json").read_text()
