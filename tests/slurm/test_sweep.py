"""Tests the runs of --array, --sweep and --only: submissions, names, and resumes."""

import os

import pytest
import torch
from conftest import REPOSITORY
from submissions import GPU, JOB, LEAF, error_of, submit
from submitit.core.utils import DelayedSubmission

from contnet.config import load_config, load_finished_config
from contnet.slurm.records import read_submissions
from contnet.slurm.submit import main, parse_submission
from contnet.slurm.sweep import expand_runs

pytest_plugins = ["submissions"]
OTHER = str(REPOSITORY / "configs" / "faster_rcnn_r50.yaml")


def test_sweep_is_one_array(slurm, here, capsys):
    sweeps = [
        "--sweep",
        "SOLVER.BASE_LR=0.01,0.02",
        "--sweep",
        "INPUT.MIN_SIZE_TRAIN=(64,),(64,80)",
    ]
    options = [*sweeps, "--max-parallel", "3", *GPU, "OUTPUT_DIR", "out"]
    assert submit("--dry-run", *options) == 0
    shown = capsys.readouterr().out
    assert submit(*options) == 0
    assert "#SBATCH --array=0-3%3" in slurm.sent
    assert "\n".join(slurm.sent) in shown
    names = [
        f"BASE_LR={lr},MIN_SIZE_TRAIN={size}" for lr in ("0.01", "0.02") for size in ("64", "64_80")
    ]
    (record,) = read_submissions(here / "out")
    assert record["runs"] == {name: f"4242_{i}" for i, name in enumerate(names)}
    assert "#SBATCH --job-name=out" in slurm.sent
    folder = here / "out" / "slurm" / "submission1"
    assert f"#SBATCH --output={folder}/%A_%a_0_log.out" in slurm.sent
    for i, name in enumerate(names):
        job = DelayedSubmission.load(folder / f"4242_{i}_submitted.pkl").function
        assert job.run_folder == str(here / "out" / name)
        cfg = load_finished_config(job.config_file)
        assert job.run_folder == cfg.OUTPUT_DIR
        assert float(name[8:12]) == cfg.SOLVER.BASE_LR
        assert read_submissions(here / "out" / name)[0]["job_id"] == f"4242_{i}"


def test_array_file(slurm, here):
    (here / "runs.txt").write_text(
        f"# two detectors\n--config-file {LEAF} SOLVER.BASE_LR 0.01\n\n--config-file {OTHER}\n"
    )
    assert main(["--array", "runs.txt", "--sweep", "SEED=1,2", *JOB, *GPU]) == 0
    base = here / "output" / "runs"
    (record,) = read_submissions(base)
    assert list(record["runs"]) == [
        "faster_rcnn_contti,BASE_LR=0.01,SEED=1",
        "faster_rcnn_contti,BASE_LR=0.01,SEED=2",
        "faster_rcnn_r50,SEED=1",
        "faster_rcnn_r50,SEED=2",
    ]


def test_an_array_that_is_no_file(slurm, here, capsys):
    os.mkfifo(here / "runs.txt")  # nothing writes to the pipe
    assert "--array runs.txt cannot be read" in error_of(capsys, "--array", "runs.txt", *JOB)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--num-gpus 4", "runs.txt, line 1"),
        ("SOLVER.BASE_LR", "runs.txt, line 1"),
        ("'SOLVER.BASE_LR", "runs.txt, line 1"),
        ("OUTPUT_DIR x", "its own OUTPUT_DIR"),
        ("SEED 1\nSEED 1", "runs 1 and 2 of 2 are the same"),
    ],
)
def test_wrong_lines(slurm, here, capsys, line, said):
    (here / "runs.txt").write_text(line)
    argv = ["--config-file", LEAF, "--array", "runs.txt", *JOB, *GPU]
    assert said in error_of(capsys, *argv)


def test_names_say_what_differs():
    def names(*sweeps, config="a.yaml"):
        options = [word for each in sweeps for word in ("--sweep", each)]
        return [
            run.name for run in expand_runs(parse_submission(["--config-file", config, *options]))
        ]

    # This includes single values, so that more values can be added in the same folder.
    assert names("SEED=1,2", "SOLVER.MAX_ITER=5") == ["SEED=1,MAX_ITER=5", "SEED=2,MAX_ITER=5"]
    assert names("config-file=x/a.yaml") == ["a"]
    assert names("config-file=x/a.yaml,x/b.yaml") == ["a", "b"]
    assert names("config-file=x/a.yaml,y/a.yaml") == ["x_a.yaml", "y_a.yaml"]
    assert names("A.SIZE=1,2", "B.SIZE=3,4")[0] == "A.SIZE=1,B.SIZE=3"
    assert names("A.PATH=../x,/y z") == ["PATH=x", "PATH=y_z"]
    long = names("A.B=" + "x" * 300 + "," + "x" * 299 + "y")
    assert len(set(long)) == 2
    assert max(map(len, long)) < 150


def test_only(tmp_path):
    (tmp_path / "runs.txt").write_text("A.B 1\nA.B 2 D.E 3\n")

    def runs(*options):
        expanded = expand_runs(parse_submission(["--config-file", "a.yaml", *options, "D.E", "0"]))
        return {run.name: run.values for run in expanded}

    sweep = ["--sweep", "A.NAME=x,y", "--sweep", "SEED=1,2"]
    only = ["--only", "A.NAME=y", "D.E 5 F 'a b'", "--only", "SEED=2", "G.E 6"]
    found = runs(*sweep, *only)
    assert list(found) == [
        "NAME=x,SEED=1",
        "NAME=x,SEED=2,G.E=6",
        "NAME=y,SEED=1,D.E=5,F=a_b",
        "NAME=y,SEED=2,D.E=5,F=a_b,G.E=6",
    ]
    last = found["NAME=y,SEED=2,D.E=5,F=a_b,G.E=6"]
    assert (last["D.E"], last["F"], last["G.E"]) == ("5", "a b", "6")
    assert found["NAME=x,SEED=1"]["D.E"] == "0" and "F" not in found["NAME=x,SEED=1"]
    # A part of the same sweep has the same folders.
    assert set(runs("--sweep", "A.NAME=y", "--sweep", "SEED=2", *only)) == {list(found)[3]}
    array = runs("--array", str(tmp_path / "runs.txt"), "--only", "A.B=1", "F 7")
    assert [each.get("F") for each in array.values()] == ["7", None]
    configs = runs("--sweep", "config-file=x.yaml,y.yaml", "--only", "config-file=y.yaml", "F 1")
    assert list(configs) == ["x", "y,F=1"]


@pytest.mark.parametrize(("change", "key"), [("0.3", "SOLVER.BASE_LR"), ("0.1", None)])
def test_a_sweep_goes_on_with_equal_settings_alone(no_slurm, capsys, change, key):
    base = str(REPOSITORY / "configs" / "imagenet" / "Base-plain.yaml")
    folder = no_slurm / "out" / "NAME=contnet_ti"
    folder.mkdir(parents=True)
    own = ["MODEL.CLASSIFIER.NAME", "contnet_ti", "OUTPUT_DIR", str(folder)]
    cfg = load_config(base, ["MODEL.DEVICE", "cpu", *own, "SOLVER.BASE_LR", change, "SEED", "7"])
    state = {"trainer": {"iteration": 1}, "contnet": {"config": cfg.dump()}}
    torch.save(state, folder / "model_0000001.pth")
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    argv = ["--config-file", base, "--sweep", "MODEL.CLASSIFIER.NAME=contnet_ti", "--resume"]
    said = error_of(
        capsys, *argv, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", "out", "SOLVER.BASE_LR", "0.1"
    )
    assert ("other settings" in said) == bool(key) and (key or "data set") in said
