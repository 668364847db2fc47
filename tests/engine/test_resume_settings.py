"""Tests resumes with other settings, and from incomplete checkpoints, in small real runs."""

import contextlib
import json
import shutil

import pytest
import torch
from conftest import QUICK, REPOSITORY, metrics_of

from contnet.config import load_config
from contnet.engine.hooks import LauncherHook
from contnet.engine.resume import Before, resume_config
from contnet.engine.trainer import Trainer
from contnet.evaluation.progress import Progress
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.main import main
from contnet.launch.preflight import check_run
from contnet.launch.run import run
from contnet.slurm.runs import prepare_runs
from contnet.slurm.submit import parse_submission
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
pytestmark = pytest.mark.usefixtures("imagenet_here")
SMALL_OPTIONS = """
SOLVER.RESCALE_INTERVAL False
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 8 SOLVER.CHECKPOINT_PERIOD 2
TEST.EVAL_PERIOD 0 LOG_PERIOD 1 SOLVER.WARMUP_ITERS 2 SOLVER.WARMUP_FACTOR 0.5 SOLVER.BASE_LR 0.01
SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR SOLVER.STEPS (6,) SOLVER.WEIGHT_DECAY 0.001
"""
SMALL = SMALL_OPTIONS.split()


class Cut(LauncherHook):
    """Ends a run after an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise InterruptedError


def arguments(folder, *more):
    return ["--config-file", LEAF, *QUICK, *SMALL, "OUTPUT_DIR", str(folder), *more]


def settings(folder, *more):
    return build_run_settings(parse_arguments(arguments(folder, *more)))


def resume(folder, *more, launcher=None):
    """Resumes like train_net.py, in this process."""
    run(check_run(settings(folder, *more, "--resume")), launcher)


def trainer_of(folder, *more):
    """Builds a trainer that has resumed."""
    found = check_run(settings(folder, *more, "--resume"))
    trainer = Trainer(found.cfg, found.cfg.SEED, scaled=found.scaled)
    trainer.resume_or_load(found.checkpoint.path)
    return trainer


def said(folder):
    return (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def base(imagenet_root, tmp_path_factory):
    """Returns a run that ended after 4 of 8 iterations, evaluated after 2."""
    folder = tmp_path_factory.mktemp("base") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
        with pytest.raises(InterruptedError):
            run(settings(folder, "TEST.EVAL_PERIOD", "2"), Cut(3))
    return folder


@pytest.fixture
def cut(base, tmp_path):
    """Copies the run."""
    return shutil.copytree(base, tmp_path / "run")


def checkpoint(folder, name="model_final.pth"):
    return torch.load(folder / name)


def momenta(state):
    """Returns the values of an optimiser's state, by parameter."""
    return {
        name: state["state"][number]["momentum_buffer"]
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }


# --- classes of keys -----------------------------------------------------------------------------

REFUSED = """
MODEL.CONTNET.PRE_NORM True
MODEL.CLASSIFIER.NAME contnet_s
MODEL.CLASSIFIER.LABEL_SMOOTHING 0.1
MODEL.CLASSIFIER.MIXUP_ALPHA 0.2
MODEL.FCOS.FOCAL_LOSS_GAMMA 1.5
MODEL.RPN.LOSS_WEIGHT 2.0
MODEL.PIXEL_STD [1.0,1.0,1.0]
INPUT.FORMAT BGR
SOLVER.OPTIMIZER AdamW
DATASETS.TRAIN ('other',)
"""
FOLLOWED = """
SOLVER.BASE_LR 0.5
SOLVER.WEIGHT_DECAY 0.0
SOLVER.WEIGHT_DECAY_NORM 0.5
SOLVER.WEIGHT_DECAY_BIAS 0.5
SOLVER.BIAS_LR_FACTOR 2.0
SOLVER.LAYER_DECAY 0.5
SOLVER.ADAMW_BETAS (0.5,0.6)
SOLVER.MOMENTUM 0.1
SOLVER.NESTEROV True
SOLVER.STEPS (3,)
SOLVER.LR_SCHEDULER_NAME WarmupCosineLR
SOLVER.CLIP_GRADIENTS.ENABLED True
SOLVER.GRAD_ACCUM_STEPS 2
SOLVER.EMA.DECAY 0.5
SOLVER.AMP.ENABLED True
SOLVER.MAX_ITER 20
TEST.EVAL_PERIOD 3
TEST.DETECTIONS_PER_IMAGE 7
INPUT.CLASSIFIER.RANDOM_ERASING 0.5
INPUT.MIN_SIZE_TRAIN (99,)
DATASETS.TEST ('other',)
DATALOADER.NUM_WORKERS 1
MODEL.RETINANET.SCORE_THRESH_TEST 0.5
MODEL.RPN.PRE_NMS_TOPK_TEST 7
MODEL.CONTNET.FREEZE_AT 1
MODEL.CLASSIFIER.CHANNELS_LAST True
MODEL.DEVICE cuda
MODEL.WEIGHTS other.pth
"""


def before_and_now(*opts, old=()):
    """Returns the settings of a checkpoint of a plain config, and the config with other options."""
    cfg = load_config(LEAF, [*QUICK, *SMALL, *old])
    content = {"contnet": {"config": cfg.dump()}, "trainer": {"iteration": 3}}
    now = load_config(LEAF, [*QUICK, *SMALL, *opts])
    return Before.of("model.pth", content, now), now


def pairs(text):
    return [line.split() for line in text.strip().splitlines()]


@pytest.mark.parametrize(("key", "value"), pairs(REFUSED))
def test_keys_that_cannot_change(key, value):
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS model\.pth") as refused:
        resume_config(*before_and_now(key, value))
    assert f"{key} " in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("key", "value"), pairs(FOLLOWED))
def test_keys_that_are_followed_are_named(key, value):
    before, now = before_and_now(key, value)
    resumed = resume_config(before, now)
    assert [line.split()[0] for line in resumed.lines] == [key]
    assert resumed.cfg.dump() == now.dump() and not resumed.scaled


def test_equal_settings_give_no_line():
    before, now = before_and_now()
    resumed = resume_config(before, now)
    assert resumed.lines == () and resumed.cfg.dump() == now.dump()


def test_the_seed_is_the_checkpoints():
    before, now = before_and_now("SEED", "9")
    resumed = resume_config(before, now)
    (line,) = resumed.lines
    assert line.startswith("SEED 3 -> 9") and resumed.cfg.SEED == 3
    resumed = resume_config(*before_and_now("SEED", "-1"))
    assert resumed.lines == () and resumed.cfg.SEED == 3


def test_norms_over_all_processes_are_alike():
    """A GPU run resumes on a CPU, where SyncBN is replaced."""
    before, now = before_and_now()
    now.MODEL.CONTNET.NORM = "naiveSyncBN"
    before.config["MODEL.CONTNET.NORM"] = "SyncBN"
    (line,) = resume_config(before, now).lines
    assert line == "MODEL.CONTNET.NORM SyncBN -> naiveSyncBN"


def test_keys_of_other_versions():
    cfg = load_config(LEAF, [*QUICK, *SMALL])
    text = cfg.dump().replace("LOG_PERIOD: 1\n", "ONCE_THERE: 1\n")
    now = load_config(LEAF, [*QUICK, *SMALL, "LOG_PERIOD", "20"])  # the default value
    before = Before.of("model.pth", {"contnet": {"config": text}}, now)
    (line,) = resume_config(before, now).lines
    assert "ONCE_THERE" in line


# --- refused before anything is written ----------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["SOLVER.OPTIMIZER AdamW", "MODEL.CONTNET.RELATIVE True", "DATASETS.TRAIN ('mine',)"]
)
def test_a_refusal_leaves_the_folder_alone(cut, imagenet_root, capsys, change):
    files = {path.name: path.read_bytes() for path in cut.iterdir() if path.is_file()}
    mine = [["mine", str(imagenet_root / "imagenet" / "val")]]
    more = [*change.split(), "DATASETS.REGISTER", repr(mine)]
    assert main(arguments(cut, *more, "--resume")) == 1
    output = capsys.readouterr().err.strip().splitlines()
    assert change.split()[0] in output[-1] and "MODEL.WEIGHTS" in output[-1]
    assert {path.name: path.read_bytes() for path in cut.iterdir() if path.is_file()} == files


def test_weights_without_a_training_are_refused(cut, capsys):
    torch.save({"model": checkpoint(cut, "model_0000003.pth")["model"]}, cut / "model_0000003.pth")
    assert main(arguments(cut, "--resume")) == 1
    assert "without the training state" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_training_set_that_was_moved(imagenet_root, tmp_path, capsys, split):
    """Equal images may move; different images may not replace them."""
    places = [imagenet_root / "imagenet" / "train", tmp_path / "moved"]
    shutil.copytree(imagenet_root / "imagenet" / split, places[1])

    def register(place):
        return ["DATASETS.TRAIN", "('moving',)", "DATASETS.REGISTER", f"[['moving', '{place}']]"]

    folder = tmp_path / "run"
    run(settings(folder, *register(places[0]), "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"))
    from detectron2.data import DatasetCatalog, MetadataCatalog

    DatasetCatalog.remove("moving")
    MetadataCatalog.remove("moving")
    given = settings(folder, *register(places[1]), "SOLVER.STEPS", "()", "--resume")
    if split == "val":
        with pytest.raises(UserError, match="56 images, not 35"):
            check_run(given)
    else:
        assert any("DATASETS.REGISTER moving" in line for line in check_run(given).notes)


# --- applied changes -----------------------------------------------------------------------------


CHANGES = """
SOLVER.BASE_LR 0.002 SOLVER.STEPS (5,) SOLVER.GAMMA 0.5 SOLVER.MOMENTUM 0.5
SOLVER.WEIGHT_DECAY 0.0 SOLVER.WEIGHT_DECAY_NORM 0.0
"""


def test_settings_take_effect_in_the_next_iteration(cut):
    resume(cut, *CHANGES.split())
    rates = [line["lr"] for line in metrics_of(cut)]
    assert rates == pytest.approx([0.005, 0.0075, 0.01, 0.01, 0.002, 0.001, 0.001, 0.001], rel=1e-6)
    groups = checkpoint(cut)["trainer"]["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert "SOLVER.BASE_LR 0.01 -> 0.002" in said(cut)


@pytest.mark.parametrize("named", [True, False])
def test_the_optimisers_state_follows_its_parameters(cut, named):
    """This includes older checkpoints, whose groups do not name parameters."""
    file = cut / "model_0000003.pth"
    content = torch.load(file)
    expected = momenta(content["trainer"]["optimizer"])
    if not named:
        for group in content["trainer"]["optimizer"]["param_groups"]:
            del group["param_names"]
        torch.save(content, file)
    trainer = trainer_of(cut, "SOLVER.LAYER_DECAY", "0.5", "SOLVER.BIAS_LR_FACTOR", "2.0")
    state = trainer.optimizer.state_dict()
    assert len(state["param_groups"]) > len(content["trainer"]["optimizer"]["param_groups"])
    found = momenta(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(value.abs().sum() for value in expected.values())


def test_momentum_that_was_switched_off_starts_anew(cut):
    resume(cut, "SOLVER.MOMENTUM", "0.0", "SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "()")
    assert not checkpoint(cut)["trainer"]["optimizer"]["state"]
    trainer = trainer_of(cut, "SOLVER.STEPS", "()")
    assert not trainer.optimizer.state


def test_an_end_that_lies_behind(cut):
    resume(cut, "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()")
    assert "Training has finished: 4 of 3 iterations" in said(cut)


# --- incomplete checkpoints ----------------------------------------------------------------------


def test_an_average_that_was_on_then_off_starts_from_the_weights(cut):
    on = ["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.5"]
    short = ["SOLVER.STEPS", "()"]
    resume(cut, *on, *short, "SOLVER.MAX_ITER", "5")
    resume(cut, *short, "SOLVER.MAX_ITER", "6")
    trainer = trainer_of(cut, *on, *short)
    weights = checkpoint(cut)["model"]
    assert all(torch.equal(trainer.ema.module.state_dict()[k], v) for k, v in weights.items())


@pytest.mark.parametrize("saved", [True, False])
def test_a_loss_scaler(cut, caplog, saved):
    amp = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"]
    file = cut / "model_0000003.pth"
    content = torch.load(file)
    assert content["trainer"]["grad_scaler"] == {}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    if saved:
        content["trainer"]["grad_scaler"] = scaler.state_dict()
        torch.save(content, file)
    trainer = trainer_of(cut, *amp)
    assert trainer.scaler.get_scale() == (8.0 if saved else 65536.0)
    assert ("no loss scaler" in caplog.text) != saved
    caplog.clear()
    trainer_of(cut, *amp, "SOLVER.AMP.DTYPE", "bfloat16")
    assert ("loss scaler, which is discarded" in caplog.text) == saved


def without_stream(content):
    del content["trainer"]["stream"]
    return "order of its images"


def without_optimizer(content):
    del content["trainer"]["optimizer"]
    return "no optimiser state"


def without_scaler(content):
    del content["trainer"]["grad_scaler"], content["trainer"]["loss_normalizers"]
    return ""


def without_config(content):
    del content["contnet"]
    return "without a comparison"


def of_detectron2(content):
    """Converts to the format of DefaultTrainer: the optimiser one level below, without names."""
    optimizer = content["trainer"]["optimizer"]
    for group in optimizer["param_groups"]:
        del group["param_names"]
    state = {"iteration": 3, "_trainer": {"iteration": 3, "optimizer": optimizer}}
    model = content["model"]
    content.clear()
    content.update(model=model, trainer=state, iteration=3, something=1)
    return "also has something"


STRIPPED = [without_stream, without_optimizer, without_scaler, without_config, of_detectron2]


@pytest.mark.parametrize("strip", STRIPPED)
def test_a_part_that_is_missing_is_named(cut, caplog, strip):
    file = cut / "model_0000003.pth"
    content = torch.load(file)
    line = strip(content)
    torch.save(content, file)
    trainer = trainer_of(cut)
    notes = check_run(settings(cut, "--resume")).notes
    assert line in "\n".join([caplog.text, *notes])
    assert trainer.start_iter == 4
    assert trainer.state_dict()["iteration"] == 3
    assert trainer.done == Progress(3, 16, 4)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.01}
    assert bool(trainer.optimizer.state) == (strip is not without_optimizer)


# --- another batch size --------------------------------------------------------------------------

DOUBLED = ["SOLVER.IMS_PER_BATCH", "8"]


def test_twice_the_batch(cut):
    """The other 4 of 8 iterations of 4 images become 2 of 8; a second start changes nothing."""
    every = ["TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINTS_KEPT", "2", *DOUBLED]
    with pytest.raises(InterruptedError):
        resume(cut, *every, launcher=Cut(2))
    assert (cut / "last_checkpoint").read_text() == "model_0000002.pth"
    assert sorted(path.name for path in cut.glob("model_0*")) == [
        "model_0000002.pth",
        "model_0000003.pth",
    ]
    text = said(cut)
    resume(cut, *every)
    again = said(cut).removeprefix(text)
    assert "BASE_LR" in text and "scaled with it" in text
    assert "scaled with it" not in again and " -> " not in again
    lines = metrics_of(cut)
    assert [line["images_seen"] for line in lines] == [4, 8, 12, 16, 24, 32]
    assert [line["iteration"] for line in lines] == [0, 0, 0, 1, 2, 3]
    assert [line["lr"] for line in lines[-2:]] == pytest.approx([0.02, 0.002])
    content = checkpoint(cut)
    assert content["trainer"]["iteration"] == 3
    results = json.loads((cut / "results.json").read_text())
    assert [each["iteration"] for each in results] == [0, 1, 2, 3]
    assert [each["images_seen"] for each in results] == [8, 16, 24, 32]


@pytest.mark.parametrize("opts", [[], ["SOLVER.BASE_LR", "0.05", "SOLVER.MAX_ITER", "7"]])
def test_what_follows_a_batch(opts):
    before, now = before_and_now("SOLVER.IMS_PER_BATCH", "8", *opts)
    resumed = resume_config(before, now)
    solver = resumed.cfg.SOLVER
    set_anew = bool(opts)
    rate, end = solver.BASE_LR, solver.MAX_ITER
    assert (rate, end) == ((0.05, 7) if set_anew else (0.02, 4))
    assert list(solver.STEPS) == [3] and solver.WARMUP_ITERS == 1
    assert solver.CHECKPOINT_PERIOD == 1 and resumed.cfg.TEST.EVAL_PERIOD == 0
    (line,) = [line for line in resumed.lines if "scaled with it" in line]
    assert ("SOLVER.BASE_LR" in line) != set_anew and "SOLVER.STEPS (6,)" not in line
    assert any(each.startswith("SOLVER.BASE_LR 0.01 -> 0.05") for each in resumed.lines) == set_anew


def test_a_batch_there_and_back():
    """Rounding leaves no trace."""
    old = ["SOLVER.MAX_ITER", "10", "SOLVER.CHECKPOINT_PERIOD", "4"]
    before, now = before_and_now(*old, "SOLVER.IMS_PER_BATCH", "12", old=old)
    tripled = resume_config(before, now)
    assert tripled.cfg.SOLVER.MAX_ITER == 4
    content = {
        "contnet": {"config": tripled.cfg.dump()},
        "trainer": {"iteration": 1, "scaled_settings": tripled.scaled},
    }
    _, again = before_and_now(*old)
    back = resume_config(Before.of("model.pth", content, again), again)
    assert back.cfg.dump() == again.dump() and not back.scaled


def test_processes_that_scale_the_recipe_are_not_scaled_again():
    old = ["SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.WARMUP_ITERS", "1"]
    now = ["SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.WARMUP_ITERS", "1", *DOUBLED]
    resumed = resume_config(*before_and_now(*now, old=old))
    assert resumed.cfg.SOLVER.BASE_LR == 0.01 and resumed.cfg.SOLVER.WARMUP_ITERS == 1
    assert not resumed.scaled


def test_processes_that_scale_the_recipe_go_on_by_images(cut):
    """As given with --num-gpus 2; the trainer here is one of the processes."""
    trainer = trainer_of(cut, "SOLVER.REFERENCE_WORLD_SIZE", "1", "--num-gpus", "2")
    assert (trainer.start_iter, trainer.max_iter) == (2, 4)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.02}
    assert trainer.scaled_settings == {}


@pytest.mark.parametrize(
    ("more", "finished"),
    [([], True), (DOUBLED, True), ([*DOUBLED, "SOLVER.MAX_ITER", "7"], False)],
    ids=["same", "other batch", "and a later end"],
)
def test_a_submission_knows_what_is_left_under_another_batch(tmp_path, more, finished):
    content = {
        "contnet": {"config": settings(tmp_path).cfg.dump()},
        "trainer": {"iteration": 7, "stream": {"images_seen": 32}},
    }
    torch.save(content, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    words = [*arguments(tmp_path, *more), "--resume", "--cluster", "local"]
    _, (submitted,) = prepare_runs(parse_submission(words))
    assert submitted.finished == finished


class StopInEvaluation(Cut):
    """Leaves the evaluation after an iteration, before which the run has saved a checkpoint."""

    @contextlib.contextmanager
    def evaluating(self):
        if self.trainer.iter == self.iteration:
            raise InterruptedError
        yield


@pytest.mark.parametrize("more", [DOUBLED, ["TEST.EVAL_PERIOD", "3"]])
def test_an_evaluation_that_was_left(tmp_path, more):
    """The evaluation is made up for in the new iterations, or reported if it is no longer due."""
    folder, short = tmp_path / "run", ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()"]
    every = [*short, "TEST.EVAL_PERIOD", "2"]
    with pytest.raises(InterruptedError):
        run(settings(folder, *every), StopInEvaluation(1))
    resume(folder, *every, *more)
    results = json.loads((folder / "results.json").read_text())
    seen = [(each["iteration"], each["images_seen"]) for each in results]
    if more == DOUBLED:
        assert seen == [(0, 8), (1, 16)]
    else:
        assert seen == [(2, 12), (3, 16)] and "skipped" in said(folder)
    lines = metrics_of(folder)
    assert [line["images_seen"] for line in lines] == (
        [4, 8, 16] if more == DOUBLED else [4, 8, 12, 16]
    )


def test_an_optimizer_of_a_version_with_other_keys(cut):
    """Its groups have no names, and correspond to the known keys."""
    content = checkpoint(cut, "model_0000003.pth")
    momentum = momenta(content["trainer"]["optimizer"])
    for group in content["trainer"]["optimizer"]["param_groups"]:
        del group["param_names"]
    content["contnet"]["config"] = content["contnet"]["config"].replace(
        "SOLVER:\n", "SOLVER:\n  GONE: 1\n"
    )
    torch.save(content, cut / "model_0000003.pth")
    restored = momenta(trainer_of(cut).state_dict()["optimizer"])
    assert restored.keys() == momentum.keys()
    assert all(torch.equal(restored[name], momentum[name]) for name in momentum)


# --- warnings about the initial weights ----------------------------------------------------------


def test_all_results_warn_of_the_weights_that_a_run_started_from(base, tmp_path):
    weights = {"model": checkpoint(base, "model_0000003.pth")["model"], "__author__": "MSRA"}
    torch.save(weights, tmp_path / "start.pth")
    folder, options = tmp_path / "run", ["MODEL.WEIGHTS", str(tmp_path / "start.pth")]
    with pytest.raises(InterruptedError):
        run(settings(folder, *options), Cut(3))
    resume(folder, *options)
    run(settings(folder, "MODEL.WEIGHTS", str(folder / "model_final.pth"), "--eval-only"))
    trained, alone = json.loads((folder / "results.json").read_text())
    for record in (trained, alone):
        assert any("PIXEL_MEAN" in line for line in record["warnings"])
