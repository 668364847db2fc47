"""Tests that settings in epochs become iterations, by the number of images used in training."""

import shlex

import pytest
from annotated import LEAF, usable_content
from conftest import SMALL

from contnet.commands import doctor
from contnet.config import load_config, load_finished_config
from contnet.data.datasets import coco
from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.launch.arguments import build_run_settings, configure, parse_arguments
from contnet.launch.preflight import check_inputs
from contnet.slurm.runs import prepare_runs
from contnet.slurm.submit import parse_submission
from contnet.utils.errors import UserError

pytest_plugins = ["annotated"]

BATCH = ["SOLVER.IMS_PER_BATCH", "2"]


@pytest.fixture
def own(usable, tmp_path) -> list[str]:
    """Returns overrides for a set of five images, of which training uses three."""
    options = [
        *("DATASETS.REGISTER", f"[['drawn', '{usable.file}', '{tmp_path / 'images'}']]"),
        *("DATASETS.TRAIN", "('drawn',)", "DATASETS.TEST", "()"),
        *("DATASETS.CACHE_DIR", str(usable.cache), "INPUT.MASK_FORMAT", "bitmask"),
        *("OUTPUT_DIR", str(tmp_path / "out"), "DATASETS.CHECK_IMAGES", "none"),
    ]
    # Without the iterations of the options for small runs.
    small = [*SMALL]
    place = small.index("SOLVER.WARMUP_ITERS")
    return [*small[:place], *small[place + 2 :], *options]


def settings_of(own, *options, file=LEAF):
    return build_run_settings(parse_arguments(["--config-file", file, *own, *options]))


def test_all_keys(own):
    epochs = """SOLVER.MAX_EPOCHS 8 SOLVER.STEPS_EPOCHS (4,6.5) SOLVER.WARMUP_EPOCHS 0.5
    SOLVER.CHECKPOINT_PERIOD_EPOCHS 2 TEST.EVAL_PERIOD_EPOCHS 1 TEST.LOSS_PERIOD_EPOCHS 4"""
    settings = settings_of(own, *epochs.split())
    cfg = settings.cfg
    # 3 images and 2 per step are 1.5 steps per epoch.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (12, (6, 10), 1)
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD, cfg.TEST.LOSS_PERIOD) == (3, 2, 6)
    for note in (
        "SOLVER.MAX_ITER 12: SOLVER.MAX_EPOCHS 8 of 3 images, 2 a step",
        "SOLVER.STEPS (6, 10): SOLVER.STEPS_EPOCHS (4, 6.5) of 3 images, 2 a step",
    ):
        assert note in settings.notes
    check_inputs(settings)


def test_the_config_of_the_run_has_iterations_alone(own, tmp_path):
    first = settings_of(own, "SOLVER.MAX_EPOCHS", "8")
    file = tmp_path / "config.yaml"
    file.write_text(first.cfg.dump())
    assert load_finished_config(str(file)).SOLVER == first.cfg.SOLVER
    cfg, notes = configure(str(file), processes=1)
    assert cfg.SOLVER.MAX_ITER == 12 and not [note for note in notes if "EPOCHS" in note]
    assert settings_of(own, "SOLVER.MAX_EPOCHS", "8", "--resume").cfg == first.cfg


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
@pytest.mark.parametrize("filtered", [True, False])
def test_an_epoch_is_what_the_loader_gives(own, usable, sampler, filtered):
    options = [
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", str(filtered), "SOLVER.MAX_EPOCHS", "20"),
        *("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", "8.0"),
    ]
    cfg = settings_of(own, *options).cfg
    images = len(load_dataset_dicts(cfg, ["drawn"], train=True))
    assert images == (3 if filtered else 5)
    end = cfg.SOLVER.MAX_ITER
    if sampler == "TrainingSampler":
        assert end == 10 * images
    else:  # all classes are rare, so that all images with objects are repeated
        assert end > 20 * images


def test_annotations_are_parsed_once(own, monkeypatch):
    read, files = coco.read_instances, []
    monkeypatch.setattr(coco, "read_instances", lambda file: files.append(file) or read(file))
    check_inputs(settings_of(own, "SOLVER.MAX_EPOCHS", "8"))
    assert len(files) == 1


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_epochs_stay_when_a_recipe_is_scaled(own, processes):
    options = "SOLVER.REFERENCE_WORLD_SIZE 2 SOLVER.MAX_EPOCHS 8 SOLVER.STEPS (3,)"
    options += " TEST.EVAL_PERIOD 6 TEST.LOSS_PERIOD 6"
    settings = settings_of(own, *options.split(), "--num-gpus", str(processes))
    solver = settings.cfg.SOLVER
    found = (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS)
    assert found == (processes, 8 * 3 / processes, (round(3 * 2 / processes),))
    test = settings.cfg.TEST
    assert test.LOSS_PERIOD == test.EVAL_PERIOD == 6 * 2 / processes
    scaled = [note for note in settings.notes if note.startswith("scaled")]
    assert all("STEPS" in note and "MAX_ITER" not in note for note in scaled)
    assert len(scaled) == (processes != 2)


# --- precedence of the two kinds of keys ---------------------------------------------------------

BASE, MIDDLE, FILE, LINE = range(4)


def write_files(folder, contents):
    """Writes config files that extend each other; returns the path of the last one."""
    below = LEAF
    for number, content in enumerate(contents):
        file = folder / f"{number}.yaml"
        lines = "".join(f"  {key}: {value}\n" for key, value in content.items())
        file.write_text(f"_BASE_: {below}\n" + (f"SOLVER:\n{lines}" if lines else ""))
        below = file.name
    return str(folder / below)


@pytest.mark.parametrize(
    ("epochs", "iterations", "expected"),
    [
        (LINE, None, 12),
        (LINE, MIDDLE, 12),
        (FILE, BASE, 12),
        (MIDDLE, BASE, 12),
        (BASE, MIDDLE, 7),
        (MIDDLE, FILE, 7),
        (MIDDLE, LINE, 7),
        (LINE, LINE, None),
        (FILE, FILE, None),
        (FILE, LINE, None),
        (LINE, FILE, None),
        (BASE, BASE, None),
    ],
)
def test_the_form_set_nearer_to_the_command_line_counts(
    own, tmp_path, epochs, iterations, expected
):
    contents, line = [{}, {}, {}], []
    for key, value, place in (("MAX_EPOCHS", 8, epochs), ("MAX_ITER", 7, iterations)):
        if place == LINE:
            line += [f"SOLVER.{key}", str(value)]
        elif place is not None:
            contents[place][key] = value
    file = write_files(tmp_path, contents)
    if expected is None:
        with pytest.raises(UserError, match=r"SOLVER.MAX_EPOCHS 8.0 and SOLVER.MAX_ITER 7 are bot"):
            settings_of(own, *line, file=file)
        with pytest.raises(UserError, match="are both set"):  # also for tools that do not train
            configure(file, [*own, *line])
        more = ["SOLVER.MAX_EPOCHS", "0"]
        assert settings_of(own, *line, *more, file=file).cfg.SOLVER.MAX_ITER == 7
        assert settings_of(own, *line, "--eval-only", file=file)
        return
    solver = settings_of(own, *line, file=file).cfg.SOLVER
    found = (solver.MAX_ITER, solver.MAX_EPOCHS)
    assert found == (expected, 0)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("SOLVER.MAX_EPOCHS -1", "SOLVER.MAX_EPOCHS is -1"),
        ("SOLVER.MAX_EPOCHS nan", "SOLVER.MAX_EPOCHS is nan"),
        ("SOLVER.MAX_EPOCHS many", "SOLVER.MAX_EPOCHS is 'many'"),
        ("SOLVER.STEPS_EPOCHS (3,2)", "SOLVER.STEPS_EPOCHS is (3, 2)"),
        ("SOLVER.STEPS_EPOCHS (0,2)", "SOLVER.STEPS_EPOCHS is (0, 2)"),
        ("SOLVER.STEPS_EPOCHS ('a',)", "SOLVER.STEPS_EPOCHS is ('a',)"),
        ("SOLVER.MAX_EPOCHS 8 SOLVER.STEPS_EPOCHS (4,8)", "is not below SOLVER.MAX_EPOCHS 8"),
        ("SOLVER.MAX_EPOCHS 2 SOLVER.WARMUP_EPOCHS 2", "is not below SOLVER.MAX_EPOCHS 2"),
        # Two steps at the same iteration; a step at the end; a warm-up to be rescaled.
        ("SOLVER.STEPS_EPOCHS (3.2,3.3)", "SOLVER.STEPS_EPOCHS (3.2, 3.3) of 3 images"),
        ("SOLVER.MAX_EPOCHS 8 SOLVER.STEPS (6,12)", "SOLVER.MAX_EPOCHS 8 of 3 images"),
        (
            "SOLVER.MAX_EPOCHS 8 SOLVER.RESCALE_INTERVAL True SOLVER.WARMUP_ITERS 12",
            "SOLVER.MAX_EPOCHS 8 of 3 images",
        ),
        ("SOLVER.MAX_EPOCHS 8 DATASETS.TRAIN ('drwan',)", "did you mean drawn"),
    ],
)
def test_mistakes_are_told(own, options, told):
    with pytest.raises(UserError) as error:
        settings_of(own, *shlex.split(options.replace("'", r"\'")))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_iterations_are_checked_when_they_are_known(own):
    """They are not checked against the base's last iteration, 90000."""
    options = "SOLVER.STEPS (90000,) SOLVER.MAX_EPOCHS 100000"
    assert settings_of(own, *options.split()).cfg.SOLVER.MAX_ITER == 150_000


def test_a_training_that_is_all_warm_up_is_told(own):
    warnings = check_inputs(settings_of(own, "SOLVER.MAX_EPOCHS", "8")).warnings
    said = "SOLVER.WARMUP_ITERS 1000 is not below SOLVER.MAX_ITER 12"
    assert sum(said in warning for warning in warnings) == 1


# --- other tools ---------------------------------------------------------------------------------


def test_the_doctor_needs_no_iterations(own, usable, capsys):
    content = usable_content()
    content["annotations"][0]["category_id"] = 99
    usable.write(content)
    options = [*own, "SOLVER.MAX_EPOCHS", "8"]
    assert doctor.main(["--config-file", LEAF, *options]) == 1
    assert "99" in capsys.readouterr().out
    register_datasets(load_config(LEAF, options))
    with pytest.raises(UserError, match=r"data set drawn.*99"):
        settings_of(options)


def test_a_sweep(own):
    options = ["--config-file", LEAF, *own, "--sweep", "SOLVER.MAX_EPOCHS=2,8"]
    _, runs = prepare_runs(parse_submission([*options, "--cluster", "local"]))
    assert [run.folder.name for run in runs] == ["MAX_EPOCHS=2", "MAX_EPOCHS=8"]
    assert [run.cfg.SOLVER.MAX_ITER for run in runs] == [3, 12]


def test_labelled_images(imagenet_root, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    options = "SOLVER.MAX_EPOCHS 3 SOLVER.WARMUP_EPOCHS 1 MODEL.CLASSIFIER.NUM_CLASSES 7"
    file = LEAF.replace("mask_rcnn_contti", "imagenet/contti")
    settings = settings_of([*options.split(), "SOLVER.IMS_PER_BATCH", "16"], file=file)
    solver = settings.cfg.SOLVER
    assert (solver.MAX_ITER, solver.WARMUP_ITERS) == (11, 4)  # 56 images
