"""Tests real training runs: their files, resumes, and the computation of a step."""

import json
import math
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, SMALL, finish, metrics_of
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from contnet.config import load_config
from contnet.engine.trainer import Trainer
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.main import main
from contnet.launch.run import run

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
ANNOTATIONS = "coco/annotations/instances_train2017.json"


def words(text):
    """Splits a text into keys and values."""
    return text.split()


# With so many boxes, the AP of an untrained detector is above 0 and differs between weights.
MANY_BOXES = words("""MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 3000
MODEL.RPN.PRE_NMS_TOPK_TEST 300 MODEL.RPN.POST_NMS_TOPK_TEST 200""")
EMA = words("SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.5")
PERIODS = words("LOG_PERIOD 1 SOLVER.CHECKPOINT_PERIOD 1 SOLVER.CHECKPOINTS_KEPT 2")


@META_ARCH_REGISTRY.register()
class AveragingToy(nn.Module):
    """The loss is the mean over single images, so it does not depend on the batches."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.seen = []

    def forward(self, batch):
        images = [F.interpolate(x["image"][None] / 255, (32, 32)) for x in batch]
        features = self.backbone(torch.cat(images))["res5"]
        self.seen.append(([x["image_id"] for x in batch], features.dtype))
        return {
            "loss_mean": features.float().mean(),
            "loss_square": features.float().square().mean(),
        }


@pytest.fixture(autouse=True)
def data_here(coco_root, tmp_path, monkeypatch):
    """Makes this process's Detectron2 find the tiny COCO."""
    root = MetadataCatalog.get("coco_2017_train").json_file.removesuffix(ANNOTATIONS)
    (tmp_path / root).mkdir(exist_ok=True)
    (tmp_path / root / "coco").symlink_to(coco_root / "coco")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def arguments(folder, *options):
    """Returns the command line of a small run in a folder."""
    return ["--config-file", LEAF, *SMALL, *PERIODS, "OUTPUT_DIR", str(folder), *options]


def starts_of(folder):
    """Returns the starts in run.json."""
    return json.loads((folder / "run.json").read_text())


def checkpoints_of(folder):
    """Returns the names of checkpoints and of partly written files."""
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".tmp"))


@pytest.fixture(scope="module")
def averaged(train_net, tmp_path_factory):
    """Returns folder and output of a whole train_net.py run with EMA weights and no seed."""
    folder = tmp_path_factory.mktemp("ema")
    options = f"SOLVER.MAX_ITER 5 SEED -1 OUTPUT_DIR {folder}".split()
    process = train_net(f"--config-file {LEAF}", *options, *PERIODS, *EMA, *MANY_BOXES)
    return folder, finish(process)


# --- files of a run ------------------------------------------------------------------------------


@pytest.mark.slow
def test_metrics_are_written_to_json_and_tensorboard(averaged):
    folder, _ = averaged
    lines = metrics_of(folder)
    assert [line["iteration"] for line in lines] == list(range(5))
    assert [line["images_seen"] for line in lines] == [2, 4, 6, 8, 10]
    assert all(math.isfinite(line["total_loss"]) for line in lines)
    assert lines[-1]["bbox/AP"] > 0
    (events,) = folder.glob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    tags = set(board.Tags()["scalars"])
    assert {"bbox/AP", "bbox/APs", "bbox/AP-person", "bbox/AP-bicycle"} <= tags
    assert board.Scalars("bbox/AP")[-1].value == pytest.approx(lines[-1]["bbox/AP"])
    written = board.Scalars("total_loss")
    assert [e.step for e in written] == list(range(5))
    assert [e.value for e in written] == pytest.approx([line["total_loss"] for line in lines])


@pytest.mark.slow
def test_config_and_command_are_recorded(averaged):
    folder, _ = averaged
    (start,) = starts_of(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["SOLVER"]["MAX_ITER"] == 5
    assert config["MODEL"]["CONTNET"]["VARIANT"] == "contnet_ti"
    assert config["SEED"] == start["seed"] >= 0
    assert str(REPOSITORY / "train_net.py") in start["command"]
    assert start["command"][-1] == MANY_BOXES[-1]
    assert start["versions"]["torch"] == str(torch.__version__).partition("+")[0]
    assert {"python", "detectron2", "torchvision", "timm", "numpy"} <= set(start["versions"])
    assert (start["device"], start["processes"], start["start_iter"]) == ("cpu", 1, 0)
    if (REPOSITORY / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}\+?", start["git_commit"])


@pytest.mark.slow
def test_recorded_config_starts_the_same_run(averaged):
    folder, _ = averaged
    cfg = load_config(str(folder / "config.yaml"))
    assert yaml.safe_load(cfg.dump()) == yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.slow
def test_checkpoints_are_whole_and_bounded(averaged):
    folder, _ = averaged
    kept = ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]
    assert checkpoints_of(folder) == sorted([*kept, "model_best.pth"])
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    for i, name in enumerate(kept):
        checkpoint = torch.load(folder / name)
        assert checkpoint["trainer"]["iteration"] == 2 + i
        said = checkpoint["contnet"]
        assert len(said["classes"]) == 80 and said["classes"][:2] == ["person", "bicycle"]
        assert said["config"] == (folder / "config.yaml").read_text()


@pytest.mark.slow
def test_best_checkpoint_is_whole(averaged):
    folder, output = averaged
    best = torch.load(folder / "model_best.pth")
    final = torch.load(folder / "model_final.pth")
    assert best.keys() == final.keys() >= {"model", "ema", "trainer"}
    assert best["trainer"]["iteration"] == 4  # of the only evaluation
    for part in ("model", "ema"):
        assert all(torch.equal(best[part][name], final[part][name]) for name in final[part])
    ap = metrics_of(folder)[-1]["bbox/AP"]
    expected = {"metric": "bbox/AP", "value": ap, "iteration": 4}
    assert final["trainer"]["hooks"]["Evaluation"] == expected
    assert f"The best bbox/AP so far: {ap:.2f}" in output


@pytest.mark.slow
def test_progress_is_printed(averaged):
    _, output = averaged
    assert re.search(r"eta: \d+:\d\d:\d\d  iter: 2  total_loss: \d", output)
    assert "MODEL.WEIGHTS is empty: the backbone starts from random weights" in output
    assert "FrozenBN norms stay the identity: set MODEL.CONTNET.NORM" in output
    assert "MODEL.WEIGHTS FILE" in output


# --- evaluation ----------------------------------------------------------------------------------


def evaluate(folder, *options):
    """Returns the metrics of --eval-only with the names in metrics.json."""
    args = parse_arguments(["--eval-only", *arguments(folder, *MANY_BOXES, *options)])
    found = run(build_run_settings(args))["bbox"]
    return {f"bbox/{name}": value for name, value in found.items()}


def assert_last_metrics(folder, found):
    """Checks for exactly the last metrics of the training in a folder."""
    last = metrics_of(folder)[-1]
    assert found.keys() == {name for name in last if name.startswith("bbox/")}
    assert {name: repr(last[name]) for name in found} == {k: repr(v) for k, v in found.items()}
    assert last["bbox/AP"] > 0


@pytest.mark.slow
def test_eval_only_gives_the_metrics_of_training_with_averaged_weights(averaged, tmp_path):
    folder, output = averaged
    weights = str(folder / "model_final.pth")
    found = evaluate(tmp_path / "eval", "MODEL.WEIGHTS", weights, *EMA)
    assert_last_metrics(folder, found)
    printed = " | ".join(f"{found[f'bbox/{name}']:.2f}" for name in ("AP", "AP50", "AP75"))
    head = r"\| coco_2017_val \| AP \| AP50 \| AP75 \| APs \| APm \| APl \|\n\| ---[ |:-]*\n"
    assert re.search(rf"{head}\| bbox \| {re.escape(printed)} \|", output)
    assert f"| person | {found['bbox/AP-person']:.2f} |" in output
    assert "copypaste" not in output
    # The weights without EMA have other metrics.
    plain = evaluate(tmp_path / "eval", "MODEL.WEIGHTS", weights)
    assert plain["bbox/AP"] != found["bbox/AP"]


@pytest.mark.slow
@pytest.mark.numpy1
def test_eval_only_gives_the_metrics_of_training(tmp_path):
    folder = tmp_path / "run"
    assert main(arguments(folder, *MANY_BOXES, "SOLVER.MAX_ITER", "2")) == 0
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    assert_last_metrics(folder, evaluate(tmp_path / "eval", *weights))
    assert_last_metrics(folder, evaluate(folder, "--resume"))


@pytest.mark.slow
def test_results_of_training_and_of_evaluation_alone_are_recorded(averaged, tmp_path):
    folder = Path(shutil.copytree(averaged[0], tmp_path / "run"))
    weights = str(folder / "model_best.pth")
    for _ in range(2):  # the second evaluation replaces the first
        found = evaluate(folder, "MODEL.WEIGHTS", weights, *EMA)
    trained, evaluated = json.loads((folder / "results.json").read_text())
    facts = {"iteration": 4, "dataset": "coco_2017_val", "ema": True, "skipped_images": 0}
    for record in (trained, evaluated):
        assert {key: record[key] for key in facts} == facts
    # The checks before a run find that the sets are not COCO's own.
    assert any("coco_2017_val: 4 images" in line for line in trained["warnings"])
    assert any("coco_2017_train: 12 images" in line for line in trained["warnings"])
    assert trained["weights"] is None and evaluated["weights"] == weights
    assert evaluated["metrics"] == trained["metrics"]
    loss = metrics_of(folder)[-1]["total_loss"]
    assert trained["loss"] == {"total_loss": loss, "smoothed": False}
    assert evaluated["loss"] is None
    metrics = trained["metrics"]["bbox"]
    assert len(metrics) == 92
    for name, value in metrics.items():
        last = found[f"bbox/{name}"]
        assert value is None if math.isnan(last) else value == last


@pytest.mark.long
def test_test_time_augmentation_of_boxes_and_masks(tmp_path):
    """At the end of training, and for the same checkpoint in a separate evaluation; in bfloat16."""
    folder = tmp_path / "run"
    more = words("""MODEL.MASK_ON True TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES (64,96)
    SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16 TEST.DETECTIONS_PER_IMAGE 800
    MODEL.RPN.PRE_NMS_TOPK_TEST 400 MODEL.RPN.POST_NMS_TOPK_TEST 400
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.EVAL_PERIOD 1 SOLVER.MAX_ITER 2""")
    assert main(arguments(folder, *more)) == 0
    first, last = metrics_of(folder)
    assert {name.split("/")[0] for name in first if "/AP" in name} == {"bbox", "segm"}
    tasks = {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    assert {name.split("/")[0] for name in last if "/AP" in name} == tasks
    args = ["--eval-only", "--resume", *arguments(folder, *more)]
    found = run(build_run_settings(parse_arguments(args)))
    assert set(found) == tasks
    for task, metrics in found.items():
        assert repr(metrics["AP"]) == repr(last[f"{task}/AP"])
    assert found["bbox"]["AP50"] > 0
    assert found["bbox_TTA"]["AP50"] != found["bbox"]["AP50"]
    for part in ("inference", "tta/inference"):
        assert (folder / part / "coco_2017_val" / "coco_instances_results.json").exists()


@pytest.mark.slow
def test_eval_only_needs_averaged_weights_where_they_are_asked_for(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(arguments(folder, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")) == 0
    capsys.readouterr()
    weights = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
    assert main(["--eval-only", *arguments(tmp_path / "eval", *EMA, *weights)]) == 1
    assert "SOLVER.EMA.ENABLED False" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_only_on_as_many_other_classes_is_refused(averaged, coco_root, tmp_path, capsys):
    """The number of classes fits, so that no other check would fail."""
    truth = json.loads((coco_root / "coco/annotations/instances_val2017.json").read_text())
    truth["categories"][0]["name"] = "human"
    (tmp_path / "other.json").write_text(json.dumps(truth))
    entry = ["other", str(tmp_path / "other.json"), str(coco_root / "coco" / "val2017")]
    data = ["DATASETS.REGISTER", str([entry]), "DATASETS.TEST", "('other',)"]
    weights = ("MODEL.WEIGHTS", str(averaged[0] / "model_final.pth"))
    assert main(["--eval-only", *arguments(tmp_path / "eval", *data, *weights)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 too many: human; 1 missing: person" in error
    assert not (tmp_path / "eval" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("--eval-only", "MODEL.CONTNET.PRE_NORM False, but the config has True"),
        ("--resume", "MODEL.CONTNET.PRE_NORM False -> True"),
    ],
)
def test_pre_norm_that_the_weights_were_not_trained_with(averaged, tmp_path, capsys, how, told):
    """Names and shapes are the same, and AP would be lower without an error."""
    folder = Path(shutil.copytree(averaged[0], tmp_path / "run"))
    metrics = (folder / "metrics.json").read_text()
    options = ["MODEL.CONTNET.PRE_NORM", "True", "MODEL.WEIGHTS", str(folder / "model_final.pth")]
    assert main([how, *arguments(folder, *EMA, *options, "SOLVER.MAX_ITER", "8")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert told in error
    assert (folder / "metrics.json").read_text() == metrics


# --- resumes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resume_is_recorded_and_keeps_checkpoints_bounded(averaged, tmp_path):
    folder = Path(shutil.copytree(averaged[0], tmp_path / "run"))
    (folder / "model_0000009.pth.tmp").write_text("half")
    more = ["SOLVER.MAX_ITER", "8", "DATASETS.TEST", "()"]
    assert main(["--resume", *arguments(folder, *EMA, *more)]) == 0
    first, second = starts_of(folder)
    assert (first["start_iter"], second["start_iter"]) == (0, 5)
    assert second["seed"] == first["seed"]
    assert [line["iteration"] for line in metrics_of(folder)] == list(range(8))
    kept = ["model_0000005.pth", "model_0000006.pth", "model_best.pth", "model_final.pth"]
    assert checkpoints_of(folder) == kept
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(folder / "model_final.pth")["trainer"]["iteration"] == 7


@pytest.mark.slow
def test_a_finished_run_says_so(averaged, tmp_path):
    folder = Path(shutil.copytree(averaged[0], tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in folder.glob("*.*") if p.suffix in (".pth", ".json")}
    assert main(["--resume", *arguments(folder, *EMA, "SOLVER.MAX_ITER", "5")]) == 0
    assert "Training has finished: 5 of 5 iterations" in (folder / "log.txt").read_text()
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_resume_without_a_checkpoint_says_where_it_starts(tmp_path):
    folder = tmp_path / "run"
    more = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    assert main(["--resume", *arguments(folder, *more)]) == 0
    log = (folder / "log.txt").read_text()
    assert f"no checkpoint in {folder}: starting from MODEL.WEIGHTS (empty)" in log
    assert checkpoints_of(folder) == ["model_final.pth"]


# --- two processes -------------------------------------------------------------------------------

# A recipe for four GPUs.
RECIPE = words("""SOLVER.REFERENCE_WORLD_SIZE 4 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 2
SOLVER.STEPS (1,) SOLVER.BASE_LR 0.01 SOLVER.EMA.ENABLED True
MODEL.CONTNET.GRAD_CHECKPOINTING block""")


@pytest.fixture(scope="module")
def of_two(train_net, tmp_path_factory):
    """Returns folder and output of a recipe's run in two processes with our launcher."""
    folder = tmp_path_factory.mktemp("of_two")
    options = [*PERIODS, *MANY_BOXES, *RECIPE, "OUTPUT_DIR", str(folder)]
    return folder, finish(train_net(f"--config-file {LEAF} --num-gpus 2", *options))


@pytest.mark.slow
def test_a_recipe_is_scaled_to_the_processes_that_there_are(of_two):
    folder, output = of_two
    solver = load_config(str(folder / "config.yaml")).SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS) == (2, 4, (2,))
    assert solver.BASE_LR == 0.005
    (line,) = [line for line in output.splitlines() if "scaled to 2 processes" in line]
    assert "SOLVER.BASE_LR 0.01 -> 0.005" in line
    assert metrics_of(folder)[-1]["images_seen"] == 8


@pytest.mark.slow
def test_two_processes_show_no_warning(of_two):
    """They are spawned, so warnings that only the first process filters would appear here."""
    _, output = of_two
    noise = r"\w*Warning: |is_fx_tracing"
    assert [line for line in output.splitlines() if re.search(noise, line)] == []


@pytest.mark.slow
def test_torchrun_equals_our_launcher(of_two, train_net, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    options = [*PERIODS, *MANY_BOXES, *RECIPE, "OUTPUT_DIR", str(tmp_path)]
    finish(train_net(f"--config-file {LEAF}", *options, launcher=torchrun))
    ours, theirs = metrics_of(of_two[0]), metrics_of(tmp_path)
    assert len(ours) == 4
    assert ours[-1]["bbox/AP"] > 0
    assert list(map(repr, ours)) == list(map(repr, theirs))
    for folder in (of_two[0], tmp_path):
        (start,) = starts_of(folder)
        assert start["processes"] == 2
        assert str(REPOSITORY / "train_net.py") in start["command"]
        assert start["command"][-1] == str(folder)


# --- one step ------------------------------------------------------------------------------------


def trainer_of(folder, *options):
    """Builds a trainer of the toy, without evaluation."""
    toy = words("MODEL.META_ARCHITECTURE AveragingToy MODEL.BACKBONE.NAME build_contnet_backbone")
    more = [*words("DATASETS.TEST () SOLVER.MAX_ITER 1 OUTPUT_DIR"), str(folder)]
    cfg = load_config(LEAF, [*SMALL, *toy, *more, *options])
    torch.manual_seed(1)
    return Trainer(cfg, seed=4)


def train(trainer):
    """Runs the loop; returns the last unsmoothed total loss."""
    trainer.train(0, trainer.max_iter)
    return trainer.storage.history("total_loss").latest()


def test_two_accumulated_batches_equal_the_joined_batch(tmp_path):
    options = words("SOLVER.IMS_PER_BATCH 4 SOLVER.WARMUP_ITERS 0 SOLVER.BASE_LR 0.1")
    options += words("DATALOADER.ASPECT_RATIO_GROUPING False SOLVER.GRAD_ACCUM_STEPS")
    joined, parts = (trainer_of(tmp_path, *options, str(n)) for n in (1, 2))
    start = {k: v.clone() for k, v in joined.unwrapped_model.state_dict().items()}
    losses = train(joined), train(parts)
    (together,), two = ([ids for ids, _ in t.unwrapped_model.seen] for t in (joined, parts))
    assert [len(ids) for ids in two] == [2, 2]
    assert together == two[0] + two[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    ours = parts.unwrapped_model.state_dict()
    for name, value in joined.unwrapped_model.state_dict().items():
        step = (value - start[name]).abs().max().item()
        assert (ours[name] - value).abs().max() <= 1e-3 * step + 1e-7, name
    assert any(not torch.equal(value, start[name]) for name, value in ours.items())


class Averaging(HookBase):
    """Computes the EMA by its formula, for comparison with the trainer's."""

    def __init__(self, decay):
        self.decay = decay

    def before_train(self):
        self.mean = {k: v.clone() for k, v in self.trainer.unwrapped_model.state_dict().items()}

    def after_step(self):
        for name, value in self.trainer.unwrapped_model.state_dict().items():
            self.mean[name] = self.decay * self.mean[name] + (1 - self.decay) * value


def test_averaged_weights_follow_the_formula(tmp_path):
    options = words("SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.9 SOLVER.BASE_LR 0.1")
    trainer = trainer_of(tmp_path, *options, "SOLVER.MAX_ITER", "3")
    expected = Averaging(0.9)
    trainer.register_hooks([expected])
    train(trainer)
    found = trainer.ema.module.state_dict()
    assert found.keys() == expected.mean.keys()
    moved = False
    for name, value in trainer.unwrapped_model.state_dict().items():
        torch.testing.assert_close(found[name], expected.mean[name], rtol=1e-5, atol=1e-6)
        moved |= not torch.equal(found[name], value)
    assert moved


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_on_the_cpu(tmp_path, dtype):
    options = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", dtype, "SOLVER.MAX_ITER", "8"]
    trainer = trainer_of(tmp_path, *options)
    before = {k: v.clone() for k, v in trainer.unwrapped_model.state_dict().items()}
    loss = train(trainer)
    exact = train(trainer_of(tmp_path, "SOLVER.MAX_ITER", "8"))
    assert loss == pytest.approx(exact, rel=0.1)
    after = trainer.unwrapped_model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    assert trainer.unwrapped_model.seen[0][1] == getattr(torch, dtype)
    assert {p.dtype for p in trainer.unwrapped_model.parameters()} == {torch.float32}
    assert bool(trainer.state_dict()["grad_scaler"]) == (dtype == "float16")


def test_spawned_workers_can_have_the_data(tmp_path):
    """Detectron2's launcher spawns the loader's workers, to which everything is pickled."""
    trainer = trainer_of(tmp_path)
    there = pickle.loads(pickle.dumps(trainer.data_loader.dataset))
    here = trainer.data_loader.dataset
    assert torch.equal(there[4, 3, 1]["image"], here[4, 3, 1]["image"])
    sampler = trainer.batch_sampler
    assert next(iter(pickle.loads(pickle.dumps(sampler)))) == next(iter(sampler))


def test_loss_normalizer_is_saved_and_restored(tmp_path):
    options = words(
        "MODEL.META_ARCHITECTURE RetinaNet MODEL.BACKBONE.NAME build_retinanet_contnet_fpn_backbone"
    )
    options += ["MODEL.FPN.IN_FEATURES", "('res3', 'res4', 'res5')"]
    trainer = trainer_of(tmp_path, *options)
    train(trainer)
    moved = trainer.unwrapped_model.loss_normalizer
    assert moved != 100  # the initial value
    trainer.checkpointer.save("model_0000000")
    trainer.checkpointer.wait()  # the checkpoint is written in the background
    other = trainer_of(tmp_path, *options)
    assert not hasattr(other.unwrapped_model, "loss_normalizer")
    other.resume_or_load(str(tmp_path / "model_0000000.pth"))
    assert other.unwrapped_model.loss_normalizer == moved
