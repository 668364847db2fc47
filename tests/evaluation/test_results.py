"""Tests tables of results, results.json, and the best checkpoint."""

import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from detectron2.data import MetadataCatalog
from detectron2.engine import TrainerBase
from torch import nn

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.config import load_config
from contnet.engine.hooks import BestCheckpoint, Evaluation, PeriodicCheckpoint
from contnet.evaluation.metrics import check_best_metric, main_metric
from contnet.evaluation.progress import Progress
from contnet.evaluation.results import (
    markdown_tables,
    read_results,
    record_results,
    truncate_results,
)
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
NAN = math.nan

# --- tables --------------------------------------------------------------------------------------


def test_tables():
    metrics = {
        "bbox": {"AP": 37.916, "AP50": NAN, "AP-person": 50.0, "AP-dining table": 0.0},
        "segm": {"AP": 34.0, "AP50": 55.5, "AP-person": 45.25, "AP-dining table": NAN},
        "sem_seg": {"IoU": np.float64(70), "IoU-a|b-c (d)": 1.0, "min(IoU, B-Iou)-person": 3.0},
        "speed": 12,
    }
    main, by_class = markdown_tables("coco_2017_val", metrics).split("\n\n")
    assert main.splitlines() == [
        "| coco_2017_val | AP | AP50 | IoU | value |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| bbox | 37.92 | n/a |  |  |",
        "| segm | 34.00 | 55.50 |  |  |",
        "| sem_seg |  |  | 70.00 |  |",
        "| speed |  |  |  | 12.00 |",
    ]
    assert by_class.splitlines() == [
        "| class | bbox AP | segm AP | sem_seg min(IoU, B-Iou) | sem_seg IoU |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| person | 50.00 | 45.25 | 3.00 |  |",
        "| dining table | 0.00 | n/a |  |  |",
        "| a\\|b-c (d) |  |  |  | 1.00 |",
    ]


def test_no_table_of_classes_without_any():
    assert markdown_tables("x", {"cityscapes": {"AP": 1.0}}).count("---") == 2


# --- results.json --------------------------------------------------------------------------------


def record(folder, iteration, value, dataset="val", weights=None, ema=False):
    """Records an evaluation of a data set."""
    results = {dataset: {"bbox": {"AP": value}}}
    record_results(folder, results, iteration=iteration, weights=weights, ema=ema)


def values_of(folder):
    """Returns (iteration, AP) of all records."""
    return [(each["iteration"], each["metrics"]["bbox"]["AP"]) for each in read_results(folder)]


def test_records_are_strict_json(tmp_path):
    results = {"val": {"bbox": {"AP": NAN, "AP50": np.float32(2.5), "n": 3}, "speed": math.inf}}
    record_results(tmp_path, results, iteration=4, weights=None, ema=True)

    def refuse(constant):
        raise AssertionError(constant)

    (found,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found == {
        "iteration": 4,
        "dataset": "val",
        "weights": None,
        "ema": True,
        "float32_precision": "",
        "loss": None,
        "metrics": {"bbox": {"AP": None, "AP50": 2.5, "n": 3.0}, "speed": None},
        "skipped_images": 0,
        "warnings": [],
    }


def test_the_later_of_two_equal_evaluations_stays(tmp_path):
    record(tmp_path, 4, 1.0)
    record(tmp_path, 9, 2.0)
    record(tmp_path, 9, 3.0, weights="model_final.pth")
    record(tmp_path, 9, 4.0, weights="model_final.pth", ema=True)
    record(tmp_path, 9, 5.0, dataset="test")
    record(tmp_path, 9, 6.0)
    assert values_of(tmp_path) == [(4, 1.0), (9, 3.0), (9, 4.0), (9, 5.0), (9, 6.0)]


def test_files_of_earlier_revisions_go_on(tmp_path):
    metrics = {"bbox": {"AP": 1.0}}
    old = {"iteration": 4, "dataset": "val", "weights": None, "averaged": True, "metrics": metrics}
    (tmp_path / "results.json").write_text(json.dumps([old]))
    record(tmp_path, 9, 2.0)
    assert values_of(tmp_path) == [(4, 1.0), (9, 2.0)]


def test_a_resume_forgets_what_it_will_evaluate_again(tmp_path):
    truncate_results(tmp_path, Progress(3))
    assert not (tmp_path / "results.json").exists()
    for iteration in (4, 9, 14):
        record(tmp_path, iteration, 1.0)
    record(tmp_path, 99, 2.0, weights="other.pth")
    record(tmp_path, None, 3.0, weights="foreign.pth")
    truncate_results(tmp_path, Progress(9))
    assert values_of(tmp_path) == [(4, 1.0), (9, 1.0), (99, 2.0), (None, 3.0)]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"iteration": 1}]', "[{"])
def test_a_damaged_file_is_set_aside(tmp_path, caplog, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    assert read_results(tmp_path) == [] and path.read_text() == content
    record(tmp_path, 1, 1.0)
    assert values_of(tmp_path) == [(1, 1.0)]
    assert (tmp_path / "set_aside" / "results.json").read_text() == content
    (said,) = [each.getMessage() for each in caplog.records if "set aside" in each.getMessage()]
    assert str(path) in said and str(tmp_path / "set_aside" / "results.json") in said


# --- the metric for the best checkpoint ----------------------------------------------------------


def record_many(folder, weights):
    for iteration in range(40):
        record(folder, iteration, 1, weights=weights)


def test_evaluations_at_once_keep_each_others_results(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=record_many, args=(tmp_path, weights))
        for weights in ("a.pth", "b.pth")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(read_results(tmp_path)) == 80
    assert not (tmp_path / "set_aside").exists()


def config(*options):
    """Loads a config with overrides."""
    return load_config(LEAF, list(options))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bbox/AP50", "bbox/AP", "bbox/AP-x"], "bbox/AP"),
        (["bbox/AP", "segm/AP"], "segm/AP"),
        (["bbox/AP", "segm/AP", "cityscapes/AP"], "cityscapes/AP"),
        (["sem_seg/mIoU", "sem_seg/fwIoU"], "sem_seg/mIoU"),
        (["sem_seg/IoU", "sem_seg/iIoU"], "sem_seg/IoU"),
        (["box_proposals/AR@100"], ""),
        ([], ""),
    ],
)
def test_main_metric(names, expected):
    assert main_metric(config(), names) == expected


def test_main_metric_of_several_data_sets_is_the_first_ones():
    cfg = config("DATASETS.TEST", "('a', 'b')")
    assert main_metric(cfg, ["b/segm/AP", "a/bbox/AP", "b/bbox/AP"]) == "a/bbox/AP"


def test_chosen_metric():
    cfg = config("TEST.BEST_METRIC", "bbox/AP-cat")
    assert main_metric(cfg, ["bbox/AP", "bbox/AP-cat"]) == "bbox/AP-cat"
    with pytest.raises(UserError, match=r"'bbox/AP-cat', .* there are bbox/AP, bbox/APs$"):
        main_metric(cfg, ["bbox/AP", "bbox/APs", "bbox/AP-dog"])


RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet"]


@pytest.mark.parametrize(
    ("metric", "options", "right"),
    [
        ("bbox/AP75", [], True),
        ("bbox/AP-traffic light", [], True),
        ("bbox/APs", RETINANET, True),
        ("segm/AP", ["MODEL.MASK_ON", "True"], True),
        ("segm/AP", [], False),
        ("segm/AP", [*RETINANET, "MODEL.MASK_ON", "True"], False),
        ("bbox/ap", [], False),
        ("bbox/AP-unicorn", [], False),
        ("bbox/AP", ["DATASETS.TEST", "()"], False),
        ("bbox/AP", ["DATASETS.TEST", "('coco_2017_val', 'coco_2014_val')"], False),
        ("coco_2014_val/bbox/AP", ["DATASETS.TEST", "('coco_2017_val', 'coco_2014_val')"], True),
    ],
)
def test_chosen_metric_is_checked_before_a_run(metric, options, right):
    # The classes are known without annotations, as in a run's checks.
    assert len(MetadataCatalog.get("coco_2017_val").thing_classes) == 80
    cfg = config("TEST.BEST_METRIC", metric, *options)
    if right:
        check_best_metric(cfg)
        return
    with pytest.raises(UserError, match=r"TEST\.BEST_METRIC is .*; there are "):
        check_best_metric(cfg)


# --- the best checkpoint -------------------------------------------------------------------------


class Loop(TrainerBase):
    """Detectron2's loop without a real model, with given metrics and our hooks.

    The model's weight is the last iteration.
    """

    def __init__(self, folder, values, metric="bbox/AP"):
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        self.checkpointer = Checkpointer(self.model, str(folder), keep=1, trainer=self)
        evaluate = lambda: {"bbox": {metric[5:]: values[self.iter]}}  # noqa: E731
        self.evaluation = Evaluation(1, evaluate, lambda scalars: metric)
        self.register_hooks([self.evaluation])
        if self.checkpointer.has_checkpoint():
            self.checkpointer.load(self.checkpointer.get_checkpoint_file())
            self.start_iter = self.iter + 1
        self.register_hooks(
            [
                BestCheckpoint(self.checkpointer, self.evaluation),
                PeriodicCheckpoint(self.checkpointer, 2),
            ]
        )
        self.last = len(values)

    def run_step(self):
        nn.init.constant_(self.model.weight, self.iter)

    def run(self, stop=None):
        """Trains, or ends after the iteration ``stop``."""
        self.train(self.start_iter, self.last if stop is None else stop + 1)
        return self


class Killable(Loop):
    """Ends like a killed run, without a final checkpoint."""

    def run(self, stop):
        step = self.run_step

        def run_step():
            if self.iter > stop:
                raise KeyboardInterrupt
            step()

        self.run_step = run_step
        with pytest.raises(KeyboardInterrupt):
            self.train(self.start_iter, self.last)
        return self


def best_of(folder):
    """Returns the weight and the best value in model_best.pth."""
    content = torch.load(folder / "model_best.pth")
    return content["model"]["weight"].item(), content["trainer"]["hooks"]["Evaluation"]


def test_best_is_the_first_highest_number(tmp_path):
    Loop(tmp_path, [NAN, 3.0, 2.0, 5.0, 5.0, NAN, 4.0]).run()
    assert best_of(tmp_path) == (3, {"metric": "bbox/AP", "value": 5.0, "iteration": 3})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model_best.pth", "model_0000005.pth", "model_final.pth", "last_checkpoint"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_what_is_no_number_is_never_best(tmp_path):
    Loop(tmp_path, [NAN, NAN, NAN]).run()
    assert not (tmp_path / "model_best.pth").exists()


def test_zero_is_better_than_nothing(tmp_path):
    Loop(tmp_path, [NAN, 0.0]).run()
    assert best_of(tmp_path)[0] == 1


@pytest.mark.parametrize("stop", range(1, 7))
def test_best_survives_a_kill(tmp_path, stop):
    values = [1.0, 4.0, 2.0, NAN, 6.0, 3.0, 5.0, 6.0]
    (tmp_path / "uncut").mkdir()
    (tmp_path / "cut").mkdir()
    Loop(tmp_path / "uncut", values).run()
    Killable(tmp_path / "cut", values).run(stop)
    resumed = Loop(tmp_path / "cut", values)
    assert resumed.start_iter == (stop + 1) // 2 * 2
    resumed.run()
    for name in ("model_best.pth", "model_final.pth"):
        uncut, cut = (torch.load(tmp_path / each / name) for each in ("uncut", "cut"))
        assert uncut == cut
    assert best_of(tmp_path / "cut")[0] == 4


def test_a_resume_by_another_metric_starts_anew(tmp_path):
    Loop(tmp_path, [50.0, 60.0], "bbox/AP50").run()
    Loop(tmp_path, [NAN, NAN, 20.0, 10.0], "bbox/AP").run()
    assert best_of(tmp_path) == (2, {"metric": "bbox/AP", "value": 20.0, "iteration": 2})
