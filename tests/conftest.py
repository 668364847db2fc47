"""Settings of all tests: one thread, fixed seeds, a tiny COCO."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# Detectron2 reads this variable at import; the tests have their own data.
os.environ.pop("DETECTRON2_DATASETS", None)
torch.set_num_threads(1)
# Annotations are cached for this session, not in the user's home.
_CACHE = tempfile.TemporaryDirectory(prefix="contnet_cache_")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# Options that make a shipped run take seconds on a CPU, and further ones for detectors.
QUICK_OPTIONS = """
MODEL.DEVICE cpu SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0 SEED 3 SOLVER.WARMUP_ITERS 2
"""
SMALL_OPTIONS = """
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96
MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.PRE_NMS_TOPK_TEST 50
MODEL.RPN.POST_NMS_TOPK_TEST 20 MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_MASK_HEAD.CONV_DIM 16
"""
QUICK = QUICK_OPTIONS.split()
SMALL = [*QUICK, *SMALL_OPTIONS.split()]
# Keys of metrics.json that differ between equal runs: times and memory of processes.
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds", "host_memory_mb"}


def finish(process: subprocess.Popen) -> str:
    """Waits for a run that must succeed; returns its output."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def pytest_configure() -> None:
    """Restores the usual signals for commands if the tests run in the background or with nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # commands would inherit this
            signal.signal(number, lambda *_: None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every long test as slow, too, so that ``-m "not slow"`` leaves it out."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")


def metrics_of(folder: Path) -> list[dict]:
    """Returns the lines of a run's metrics.json, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Starts every test with the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_loggers():
    """Removes the log handlers that a run in this process adds."""
    from detectron2.utils.logger import setup_logger

    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "contnet")]
    before = [(list(each.handlers), each.propagate) for each in loggers]
    yield
    setup_logger.cache_clear()
    for each, (handlers, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate


@pytest.fixture(autouse=True)
def forget_datasets():
    """Removes registered data sets, so that tests can reuse the same names."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    known = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory) -> Path:
    """Makes a DETECTRON2_DATASETS with a tiny COCO 2017."""
    from coco import make_coco

    return make_coco(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def coco_here(coco_root, tmp_path, monkeypatch) -> Path:
    """Changes to a folder in which this process's Detectron2 finds the tiny COCO."""
    from detectron2.data import MetadataCatalog

    file = MetadataCatalog.get("coco_2017_train").json_file
    root = tmp_path / file.removesuffix("coco/annotations/instances_train2017.json")
    root.mkdir(exist_ok=True)
    (root / "coco").symlink_to(coco_root / "coco")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def cityscapes_root(tmp_path_factory) -> Path:
    """Makes a DETECTRON2_DATASETS with a tiny Cityscapes, used by Detectron2's names."""
    from cityscapes import make_cityscapes, use_cityscapes

    root = make_cityscapes(tmp_path_factory.mktemp("datasets"))
    use_cityscapes(root)
    return root


@pytest.fixture(scope="session")
def imagenet_root(tmp_path_factory) -> Path:
    """Makes a DETECTRON2_DATASETS with a tiny ImageNet of 7 classes and 35 validation images."""
    from imagenet import make_imagenet

    return make_imagenet(tmp_path_factory.mktemp("datasets"), classes=7, train=8, val=5)


@pytest.fixture
def imagenet_here(imagenet_root, monkeypatch) -> None:
    """Makes this process use the tiny ImageNet."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))


@pytest.fixture(scope="session")
def train_net(coco_root) -> Callable[..., subprocess.Popen]:
    """Starts ``train_net.py`` in a separate process; arguments are a string and a list."""

    def start(options: str, *more: str, launcher: tuple[str, ...] = (), **environment: str):
        command = [sys.executable, *launcher, str(REPOSITORY / "train_net.py"), *options.split()]
        small = QUICK if "configs/imagenet/" in options else SMALL
        values = {**os.environ, "DETECTRON2_DATASETS": str(coco_root), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *small, *more],
            env={**values, **environment},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start
