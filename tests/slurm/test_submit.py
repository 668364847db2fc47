"""tools/submit.py against a made-up SLURM, and for real on this machine."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, SMALL
from detectron2.data import MetadataCatalog
from submitit.core.utils import DelayedSubmission

from contnet.commands.results import collect_results, results_table
from contnet.config import load_config
from contnet.launch.arguments import parse_arguments
from contnet.slurm import snapshot
from contnet.slurm.attempt_folder import last_saved_iteration
from contnet.slurm.describe import describe_run
from contnet.slurm.executors import local_executor, submit_jobs
from contnet.slurm.jobs import process_start
from contnet.slurm.nodes import check_request, read_nodes
from contnet.slurm.records import read_submissions
from contnet.slurm.settings import ClusterSettings
from contnet.slurm.status import read_status
from contnet.slurm.submit import main, parse_submission
from contnet.slurm.sweep import expand_runs

ANNOTATIONS = "coco/annotations/instances_train2017.json"
LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
OTHER = str(REPOSITORY / "configs" / "faster_rcnn_r50.yaml")

# %P|%a|%G|%c|%m|%l|%N|%n
NODES = """\
gpu*|up|gpu:a100:8(S:0-1)|64|512000|2-00:00:00|node1|node1
gpu*|up|gpu:a100:8(S:0-1)|64|512000|2-00:00:00|node2|node2
old|up|gpu:1080ti:4|16|64000|12:00:00|node3|node3
cpu|up|(null)|32|128000|infinite|node4|node4
closed|drain|gpu:8|32|128000|infinite|node5|node5
"""
FAKES = {
    "sbatch": 'cp "$1" sent.sh && echo "Submitted batch job 4242"',
    "srun": "exit 1",
    "sinfo": "cat nodes",
    "squeue": 'if [ -s jobs ]; then cat jobs; else echo "slurm_load_jobs error: '
    'Invalid job id specified" >&2; exit 1; fi',
    "scancel": "echo scancel",
}


class FakeSlurm:
    """SLURM's clients as scripts that note their arguments and answer from files."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "nodes").write_text(NODES)
        for name, answer in FAKES.items():
            self.set(name, answer)

    def set(self, name: str, answer: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\ncd {self.folder}\necho "{name} $*" >> calls\n{answer}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def sent(self) -> list[str]:
        """The lines that sbatch was given."""
        return (self.folder / "sent.sh").read_text().splitlines()

    def show_jobs(self, text: str) -> None:
        (self.folder / "jobs").write_text(text)


@pytest.fixture
def here(coco_root, tmp_path, monkeypatch):
    """A working folder with the tiny COCO where this process, with Detectron2 imported, looks."""
    work = tmp_path / "work"
    root = work / MetadataCatalog.get("coco_2017_train").json_file.removesuffix(ANNOTATIONS)
    root.mkdir(parents=True, exist_ok=True)
    (root / "coco").symlink_to(coco_root / "coco")
    monkeypatch.chdir(work)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return work


@pytest.fixture
def no_slurm(here, tmp_path, monkeypatch):
    """A machine without SLURM, whatever this one has."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "git", "uname"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return here


@pytest.fixture
def slurm(here, tmp_path, monkeypatch):
    folder = tmp_path / "fake"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return FakeSlurm(folder)


GPU = [*SMALL, "MODEL.DEVICE", "cuda"]
JOB = ["--timeout-hours", "24", "--assume-shared"]


def submit(*options: str) -> int:
    return main(["--config-file", LEAF, *JOB, *options])


def error_of(capsys, *argv: str) -> str:
    """Runs main with a mistake in ``argv``; its one line."""
    assert main(list(argv)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def snapshot_of_files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


# --- what is sent --------------------------------------------------------------------------------


def test_sbatch_text(slurm, here):
    options = "--num-gpus 8 --num-nodes 2 --account vision --qos high --constraint ib --mem-gb 480"
    options += " --cpus-per-gpu 8 --gpu-type a100 --exclude node9 --signal-delay 120"
    setup = ["--setup", "module load cuda", "--sbatch", "mail-type=END", "--srun", "mpi=none"]
    batch = ["SOLVER.IMS_PER_BATCH", "32", "OUTPUT_DIR", "out"]
    assert submit(*options.split(), "--partition", "gpu", *setup, *GPU, *batch) == 0
    lines = slurm.sent
    flags = """
        account=vision constraint=ib cpus-per-task=8 exclude=node9 gpus-per-node=a100:8
        job-name=faster_rcnn_contti mail-type=END mem=491520M nodes=2 ntasks-per-node=8
        open-mode=append partition=gpu qos=high requeue signal=USR2@120 time=1440
    """
    for flag in flags.split():
        assert f"#SBATCH --{flag}" in lines
    # In no folder that has to be made first, for SLURM opens it when the job starts.
    folder = here / "out" / "slurm" / "submission1"
    assert f"#SBATCH --output={folder}/%j_0_log.out" in lines
    assert not [line for line in lines if "array" in line or "wckey" in line]
    (command,) = [line for line in lines if line.startswith("srun ")]
    words = shlex.split(command)
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=8", "--mpi=none"} <= set(words)
    assert words[-3:] == ["-m", "submitit.core._submit", str(folder)]
    code = f"{folder}/code/projects/ConTNet"
    exports = [line for line in lines if line.startswith("export ")]
    assert any(line.startswith(f"export PYTHONPATH={code}") for line in exports)
    assert f"export DETECTRON2_DATASETS={here}/datasets" in exports
    assert lines.index("module load cuda") > lines.index("export PYTHONSAFEPATH=1")
    # A failing set-up command ends the job.
    script = "\n".join(lines[lines.index("# setup") : lines.index("# command")])
    done = subprocess.run(["bash", "-c", script + "\necho on"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "this set-up command failed: module load cuda" in done.stderr


def test_a_job_on_cpus_asks_for_no_gpus(slurm):
    assert submit("--num-gpus", "2", "--partition", "cpu", *SMALL) == 0
    assert not [line for line in slurm.sent if "gpus" in line]
    assert "#SBATCH --ntasks-per-node=2" in slurm.sent


def test_requeues_are_not_bounded_by_submitit(slurm, here):
    options = ["--max-requeues", "7", "--hang-timeout", "90", "--interface", "ib0"]
    assert submit("--num-gpus", "2", *options, *GPU, "OUTPUT_DIR", "out") == 0
    folder = here / "out" / "slurm" / "submission1"
    sent = DelayedSubmission.load(folder / "4242_submitted.pkl")
    assert sent._timeout_countdown > 10**6
    job = sent.function
    assert (job.max_requeues, job.hang_timeout, job.interface) == (7, 90.0, "ib0")
    assert job.signal_delay == 180
    assert job.run_folder == str(here / "out")


def test_the_config_is_frozen_and_paths_keep_their_meaning(slurm, here, coco_root):
    (here / "weights.pth").write_text("")
    shutil.copy(coco_root / ANNOTATIONS, here / "mine.json")
    (here / "images").symlink_to(coco_root / "coco" / "train2017")
    (here / "mine.yaml").write_text(f"_BASE_: {LEAF}\nSOLVER:\n  BASE_LR: 0.005\n")
    register = "[['mine', 'mine.json', 'images']]"
    more = ["MODEL.WEIGHTS", "weights.pth", "DATASETS.REGISTER", register]
    more += ["DATASETS.TRAIN", "('mine',)", "OUTPUT_DIR", "./out"]
    argv = ["--config-file", "mine.yaml", *JOB, "--num-gpus", "2", *GPU, *more]
    assert main(argv) == 0
    (here / "mine.yaml").write_text("SOLVER: {BASE_LR: 7.0}")
    (record,) = read_submissions(here / "out")
    job = DelayedSubmission.load(Path(record["job_folder"]) / "4242_submitted.pkl").function
    args = parse_arguments(job.argv)
    cfg = load_config(args.config_file, args.opts)
    assert cfg.SOLVER.BASE_LR == 0.005
    assert str(here / "weights.pth") == cfg.MODEL.WEIGHTS
    assert [["mine", str(here / "mine.json"), str(here / "images")]] == cfg.DATASETS.REGISTER
    assert str(here / "out") == cfg.OUTPUT_DIR
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80  # was counted in the file
    assert args.num_gpus == 2
    assert record["job_id"] == "4242"
    assert record["command"][1:] == argv
    assert record["folder"] == str(here)
    assert len(record["git_commit"]) >= 40 or not (REPOSITORY / ".git").exists()


def test_every_config_can_be_written_and_read_again(tmp_path):
    """A job reads the whole config that its submission wrote."""
    for path in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        if not path.name.startswith("Base"):
            cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
            (tmp_path / "whole.yaml").write_text(cfg.dump())
            again = load_config(str(tmp_path / "whole.yaml"))
            # As JSON, which has no tuples: those within tuples come back as lists.
            assert json.dumps(again) == json.dumps(cfg), path


def test_scaled_recipe(slurm, here, capsys):
    options = ["--num-gpus", "8", "--num-nodes", "2", *GPU, "SOLVER.IMS_PER_BATCH", "24"]
    line = error_of(capsys, "--config-file", LEAF, *JOB, *options, "SOLVER.STEPS", "(60000,)")
    assert "SOLVER.IMS_PER_BATCH 24 does not divide over 16 processes" in line
    assert "SOLVER.REFERENCE_WORLD_SIZE 8" in line
    assert "SOLVER.IMS_PER_BATCH 48, SOLVER.BASE_LR 0.04, SOLVER.MAX_ITER 45000" in line
    assert "SOLVER.STEPS (30000,)" in line
    assert submit(*options, "SOLVER.REFERENCE_WORLD_SIZE", "8", "OUTPUT_DIR", "out") == 0
    assert "batch 48 = 2 nodes x 8 processes x 3 images" in capsys.readouterr().out
    config = here / "out" / "slurm" / "submission1" / "config.yaml"
    assert load_config(str(config)).SOLVER.IMS_PER_BATCH == 48


def test_dry_run_shows_all_and_writes_nothing(slurm, here, capsys):
    before = snapshot_of_files(here)
    options = ["--num-gpus", "2", "--dry-run", *GPU, "OUTPUT_DIR", "out"]
    assert submit(*options) == 0
    shown = capsys.readouterr().out
    for part in ("#SBATCH --gpus-per-node=2", "srun ", "nothing is submitted", str(here / "out")):
        assert part in shown
    assert snapshot_of_files(here) == before
    assert not [call for call in slurm.calls if call.startswith("sbatch")]
    assert submit(*[each for each in options if each != "--dry-run"]) == 0
    assert "\n".join(slurm.sent) in shown


def test_dry_run_without_slurm(no_slurm, capsys):
    argv = ["--config-file", LEAF, "--cluster", "slurm", "--timeout-hours", "1", "--num-gpus", "2"]
    argv += ["--assume-shared", "--dry-run", *GPU]
    assert main([*argv, "--interface", "ib0", "DATALOADER.NUM_WORKERS", "4"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=2" in shown
    assert "are not checked" in shown
    assert "no --cpus-per-gpu: each process and its loader workers" in shown
    assert "requeued at most 20 times, given up after 1800 s" in shown
    assert "on network ib0" in shown
    assert main([*argv, "--cpus-per-gpu", "5", "DATALOADER.NUM_WORKERS", "4"]) == 0
    assert "no --cpus-per-gpu" not in capsys.readouterr().out


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--machine-rank", "1"], ["--machine-rank", "leave it out"]),
        (["--dist-url", "tcp://a:1"], ["--dist-url", "leave it out"]),
        (["--partition", "gpux"], ["no partition gpux", "gpu, old, cpu, closed"]),
        (["--partition", "closed"], ["closed takes no jobs"]),
        (
            ["--partition", "old", "--num-gpus", "8", "SOLVER.IMS_PER_BATCH", "8"],
            ["old has 8 GPUs", "at most 4", "partition closed, gpu has"],
        ),
        (["--gpu-type", "h100"], ["1 h100 GPU"]),
        (["--num-nodes", "4", "SOLVER.IMS_PER_BATCH", "4"], ["is 4", "gpu has 2 nodes"]),
        (["--partition", "old", "--timeout-hours", "13"], ["--timeout-hours is 13", "allows 12"]),
        (["--timeout-hours", "0"], ["Add --timeout-hours", "up to 48"]),
        (["--timeout-hours", "-1"], ["--timeout-hours is -1.0", "at least 0"]),
        (["--timeout-hours", "0.02"], ["--signal-delay 180 s leaves nothing"]),
        (["OUTPUT_DIR", "50%j"], ["50%j has a % in it"]),
        (["--mem-gb", "600"], ["--mem-gb 600", "at most 500 GB"]),
        (["--cpus-per-gpu", "65"], ["65 cores", "at most 64"]),
        (["--sbatch", "array=1-2"], ["--sbatch array", "--sweep"]),
        (["--sbatch", "=x"], ["KEY=VALUE"]),
        (["--cluster-file", "none"], ["--cluster-file none", "none.yaml"]),
        (["--max-parallel", "2"], ["--max-parallel"]),
        (["MODEL.WEIGHTS", "gone.pth"], ["gone.pth", "not a file"]),
        (["DATASETS.TRAIN", "('coco_2017_trian',)"], ["coco_2017_trian", "coco_2017_train"]),
        (["MODEL.CONTNET.TAPS", "all"], ["MODEL.CONTNET.TAPS"]),
        (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE", "cuda or cpu"]),
        (["OUTPUT_DIR", "/dev/null/run"], ["OUTPUT_DIR /dev/null/run", "choose another"]),
        (["--sweep", "SOLVER.BASE_LR"], ["--sweep", "KEY=VALUE,VALUE"]),
        (["--sweep", "SEED=1,1"], ["value 1 twice"]),
        (["--sweep", "SOLVER.BASE_LR=0.1,many"], ["run 2 of 2 (BASE_LR=many)", "SOLVER.BASE_LR"]),
        (["--array", "gone.txt"], ["gone.txt cannot be read"]),
        (["--only", "SEED=1", "LOG_PERIOD 1"], ["--only is for --array and --sweep"]),
        (["--sweep", "SEED=1,2", "--only", "SEED", "LOG_PERIOD 1"], ["write KEY=VALUE"]),
        (["--sweep", "SEED=1,2", "--only", "SEED=3", "LOG_PERIOD 1"], ["no run", "SEED is 1 or 2"]),
        (["--sweep", "SEED=1", "--only", "SEEED=1", "LOG_PERIOD 1"], ["SEEED is not swept"]),
        (["--sweep", "SEED=1", "--only", "SEED=1", "LOG_PERIOD"], ["'LOG_PERIOD'", "pairs"]),
        (["--sweep", "SEED=1", "--only", "SEED=1", ""], ["''", "pairs"]),
        (["--sweep", "SEED=1", "--only", "SEED=1", "'a"], ["No closing quotation"]),
        (["--sweep", "SEED=1", "--only", "SEED=1", "SEED 2"], ["SEED is set by --sweep"]),
        (["--sweep", "SEED=1", "--only", "SEED=1", "OUTPUT_DIR a"], ["OUTPUT_DIR of its own"]),
        (["--sweep", "SEED=1", "--only", "SEED=1", "LOG_PERIODS 2"], ["run 1 of 1", "LOG_PERIOD"]),
        (["--num-gpus"], ["--num-gpus"]),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_is_sent(slurm, here, capsys, options, said):
    before = snapshot_of_files(here)
    line = error_of(capsys, "--config-file", LEAF, *JOB, *GPU, *options)
    for part in said:
        assert part in line
    assert snapshot_of_files(here) == before
    assert not [call for call in slurm.calls if call.startswith("sbatch")]


def test_no_config_file(slurm, capsys):
    assert "--config-file" in error_of(capsys)


def test_folders_that_nodes_do_not_share(slurm, here, tmp_path, capsys):
    argv = ["--config-file", LEAF, "--timeout-hours", "24", *GPU]
    line = error_of(capsys, *argv, "OUTPUT_DIR", "/dev/shm/out")
    assert "the run folder /dev/shm/out is under /dev/shm" in line
    assert "--assume-shared" in line
    # A cluster that is this machine alone shares everything.
    host = os.uname().nodename
    (slurm.folder / "nodes").write_text(f"one*|up|gpu:2|8|16000|infinite|one|{host}\n")
    assert main([*argv, "OUTPUT_DIR", str(tmp_path / "out")]) == 0


def test_checkpoints_of_another_run(slurm, here, capsys):
    (here / "out").mkdir()
    (here / "out" / "last_checkpoint").write_text("model_0000001.pth")
    line = error_of(capsys, "--config-file", LEAF, *JOB, *GPU, "OUTPUT_DIR", "out")
    assert "already holds checkpoints" in line
    assert submit("--resume", *GPU, "OUTPUT_DIR", "out") == 0
    sent = here / "out" / "slurm" / "submission1" / "4242_submitted.pkl"
    assert "--resume" in DelayedSubmission.load(sent).function.argv


def test_run_folder_in_use(slurm, here, capsys):
    assert submit(*GPU, "OUTPUT_DIR", "out") == 0
    slurm.show_jobs("4242|RUNNING|None\n")
    (here / "out" / "last_checkpoint").write_text("model_0000001.pth")
    line = error_of(capsys, "--config-file", LEAF, *JOB, *GPU, "OUTPUT_DIR", "out")
    assert "in use by job 4242 (RUNNING)" in line
    (here / "out" / "last_checkpoint").unlink()
    slurm.show_jobs("4242|COMPLETED|None\n")
    assert submit(*GPU, "OUTPUT_DIR", "out") == 0
    assert [each["job_id"] for each in read_submissions(here / "out")] == ["4242", "4242"]
    assert (here / "out" / "slurm" / "submission2" / "config.yaml").exists()


def test_sbatch_refuses(slurm, here, capsys):
    slurm.set("sbatch", 'echo "sbatch: error: Invalid qos specification" >&2; exit 1')
    line = error_of(capsys, "--config-file", LEAF, *JOB, *GPU, "OUTPUT_DIR", "out")
    assert "Invalid qos specification" in line
    assert "sbatch: error" not in line
    assert not list((here / "out" / "slurm").iterdir())


def test_slurm_does_not_answer(slurm, capsys):
    slurm.set("sinfo", 'echo "Unable to contact slurm controller" >&2; exit 1')
    line = error_of(capsys, "--config-file", LEAF, *JOB, *GPU)
    assert "sinfo failed: Unable to contact slurm controller" in line


# --- cluster files -------------------------------------------------------------------------------


def test_cluster_file_is_found_by_name(slurm, here, monkeypatch, tmp_path):
    (here / "clusters").mkdir()
    content = {
        "partition": "gpu",
        "cpus_per_gpu": 4,
        "timeout_hours": 12,
        "setup": ["first"],
        "sbatch": {"mail_type": "END", "comment": "from the file"},
    }
    (here / "clusters" / "ours.yaml").write_text(yaml.safe_dump(content))
    options = ["--cluster-file", "ours", "--setup", "second", "--sbatch", "comment=from here"]
    argv = ["--config-file", LEAF, "--assume-shared", *options, *GPU]
    assert main([*argv, "--timeout-hours", "0.5", "OUTPUT_DIR", "a"]) == 0
    assert {"#SBATCH --time=30", "#SBATCH --cpus-per-task=4"} <= set(slurm.sent)
    assert {"#SBATCH --mail-type=END", "#SBATCH --comment='from here'"} <= set(slurm.sent)
    assert slurm.sent.index("first") < slurm.sent.index("second")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    shutil.move(here / "clusters", tmp_path / "contnet")
    assert main([*argv, "OUTPUT_DIR", "b"]) == 0
    assert "#SBATCH --time=720" in slurm.sent


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("partitoin: gpu", "no key partitoin, the nearest is partition"),
        ("mem_gb: lots", "mem_gb is 'lots', it must be a number"),
        ("setup: {a: b}", "setup is {'a': 'b'}, it must be a list of texts"),
        ("sbatch: {nodes: 3}", "--num-nodes"),
        ("partition: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("- partition", "KEY: value"),
    ],
)
def test_wrong_cluster_files(slurm, here, capsys, content, said):
    (here / "bad.yaml").write_text(content)
    argv = ["--config-file", LEAF, *JOB, *GPU, "--cluster-file", "bad.yaml"]
    assert said in error_of(capsys, *argv)


def test_the_example_of_a_cluster_file_is_complete():
    path = REPOSITORY / "clusters" / "example.yaml"
    keys = {line.lstrip("# ").partition(":")[0] for line in path.read_text().splitlines()}
    assert set(ClusterSettings.__dataclass_fields__) <= keys
    args = parse_submission(["--cluster-file", str(path)])
    assert args.cluster_file == str(path)
    yaml.safe_load(path.read_text())


def test_nodes_are_read(slurm):
    nodes = read_nodes()
    assert [node.gpus for node in nodes] == [{"a100": 8}, {"a100": 8}, {"1080ti": 4}, {}, {"": 8}]
    assert [node.limit_hours for node in nodes] == [48, 48, 12, float("inf"), float("inf")]
    assert [node.default for node in nodes] == [True, True, False, False, False]
    fit = check_request(nodes, ClusterSettings(timeout_hours=1), 2, 8, 8)
    assert {node.name for node in fit} == {"node1", "node2"}


# --- arrays --------------------------------------------------------------------------------------


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
        args = parse_arguments(job.argv)
        cfg = load_config(args.config_file, args.opts)
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--num-gpus 4", "runs.txt, line 1"),
        ("SOLVER.BASE_LR", "runs.txt, line 1"),
        ("'SOLVER.BASE_LR", "runs.txt, line 1"),
        ("OUTPUT_DIR x", "OUTPUT_DIR of its own"),
        ("SEED 1\nSEED 1", "runs 1 and 2 of 2 do not differ"),
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

    # Also one value alone, so that a second one comes into the same folders.
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
    # Part of the same sweep has the same folders.
    assert set(runs("--sweep", "A.NAME=y", "--sweep", "SEED=2", *only)) == {list(found)[3]}
    array = runs("--array", str(tmp_path / "runs.txt"), "--only", "A.B=1", "F 7")
    assert [each.get("F") for each in array.values()] == ["7", None]
    configs = runs("--sweep", "config-file=x.yaml,y.yaml", "--only", "config-file=y.yaml", "F 1")
    assert list(configs) == ["x", "y,F=1"]


# --- after the submission ------------------------------------------------------------------------


def test_status_and_cancel(slurm, here, capsys):
    assert submit(*GPU, "OUTPUT_DIR", "out") == 0
    slurm.show_jobs("4242|PENDING|Priority\n")
    capsys.readouterr()
    assert main(["--status", "out"]) == 0
    shown = capsys.readouterr().out
    assert "job      4242 on slurm" in shown
    assert "pending (priority)" in shown
    assert main(["--cancel", "out"]) == 0
    assert "cancelled job 4242" in capsys.readouterr().out
    assert "scancel 4242" in slurm.calls
    slurm.show_jobs("")
    assert "nothing to cancel" in error_of(capsys, "--cancel", "out")
    assert "nothing was submitted" in error_of(capsys, "--status", ".")
    assert main(["--status", "out"]) == 0
    assert "state    cancelled" in capsys.readouterr().out
    assert "not allowed with" in error_of(capsys, "--status", "out", "--cancel", "out")


def test_status_and_cancel_of_an_array(slurm, here, capsys):
    assert submit("--sweep", "SEED=1,2,3", *GPU, "OUTPUT_DIR", "out") == 0
    slurm.show_jobs("4242_1|RUNNING|None\n4242_2|PENDING|JobArrayTaskLimit\n42421|RUNNING|None\n")
    capsys.readouterr()
    assert main(["--status", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("SEED=2")] == ["running"]
    assert any(line.startswith("SEED=1") and "never started" in line for line in lines)
    assert main(["--cancel", "out/SEED=2"]) == 0
    assert "scancel 4242_1" in slurm.calls
    assert main(["--cancel", "out"]) == 0
    assert "scancel 4242" in slurm.calls
    assert "42421" not in capsys.readouterr().out


def test_results_table(slurm, here, capsys):
    assert submit("--sweep", "SEED=1,2,3", *GPU, "OUTPUT_DIR", "out") == 0
    done, failed = here / "out" / "SEED=1", here / "out" / "SEED=2"
    scores = {"bbox": {"AP": 12.3456, "AP50": 30.0, "AP-person": 5.0}}
    result = {"dataset": "coco_2017_val", "weights": None, "ema": False, "metrics": scores}
    (done / "results.json").write_text(json.dumps([{**result, "iteration": 9}]))
    (done / "metrics.json").write_text('{"iteration": 9, "total_loss": 1.5}\n')
    (done / "model_final.pth").write_text("")
    (failed / "metrics.json").write_text('{"iteration": 3, "total_loss": 2.5}\n{"iter')
    table = results_table(collect_results([here / "out"])).splitlines()
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in table}
    assert cells["run"] == ["state", "loss", "iteration", "bbox/AP", "bbox/AP50"]
    assert cells["SEED=1"] == ["finished", "1.5", "10", "12.35", "30.00"]
    assert cells["SEED=2"] == ["not finished", "2.5", "4", "", ""]
    assert cells["SEED=3"] == ["never started", "", "0", "", ""]
    rows = collect_results([here / "out"], ["bbox/AP-person"])
    assert [row["metrics"] for row in rows] == [{"bbox/AP-person": 5.0}, {}, {}]


# --- snapshots -----------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a package of this project's shape."""
    root = tmp_path / "repository"
    package = root / "projects" / "contnet"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("value = 1\n")
    (root / ".gitignore").write_text("ignored.txt\n")
    for name in ("ignored.txt", "new.txt", "gone.txt"):
        (root / name).write_text(name)
    (root / "link").symlink_to("new.txt")
    (root / "data").symlink_to("../elsewhere")
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "projects", ".gitignore", "gone.txt"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (root / "gone.txt").unlink()
    monkeypatch.setattr(snapshot, "_PACKAGE", package)
    return root


def test_snapshot_of_a_repository(repository, tmp_path):
    with open(repository / "large.bin", "wb") as file:
        file.truncate(snapshot.LARGEST_FILE + 1)
    path = snapshot.take_snapshot(tmp_path / "copy")
    copied = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*")}
    files = {"projects/contnet/__init__.py", ".gitignore", "new.txt", "link", "data"}
    assert copied == {"projects", "projects/contnet", *files}
    assert snapshot.list_code()[2] == ["large.bin"]
    assert os.readlink(tmp_path / "copy" / "link") == "new.txt"
    assert os.readlink(tmp_path / "copy" / "data") == str(tmp_path / "elsewhere")
    assert path == tmp_path / "copy" / "projects"
    (repository / "projects" / "contnet" / "__init__.py").write_text("value = 2\n")
    command = [sys.executable, "-c", "import contnet; print(contnet.value)"]
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    where = repository / "projects"  # has a package contnet too
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_snapshot_outside_git(repository, tmp_path):
    shutil.rmtree(repository / ".git")
    snapshot.take_snapshot(tmp_path / "copy")
    copied = [p for p in (tmp_path / "copy").rglob("*") if p.is_file()]
    assert copied == [tmp_path / "copy" / "contnet" / "__init__.py"]


# --- this machine --------------------------------------------------------------------------------


def test_local_takes_one_machine(no_slurm, capsys):
    options = ["--num-nodes", "2", *SMALL]
    line = error_of(capsys, "--config-file", LEAF, *options)
    assert "--num-nodes is 2" in line
    line = error_of(capsys, "--config-file", LEAF, "--cluster", "slurm", *SMALL)
    assert "--cluster local" in line


IMAGES_OPTIONS = """
MODEL.DEVICE cpu MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 56 DATALOADER.NUM_WORKERS 0
INPUT.CLASSIFIER.RESIZE_TEST 64 INPUT.CLASSIFIER.CROP_TEST 56 SOLVER.IMS_PER_BATCH 4
SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 LOG_PERIOD 1
"""
IMAGES = IMAGES_OPTIONS.split()
QUICK = [*SMALL, "SOLVER.BASE_LR", "0.0001", "SOLVER.STEPS", "()", "LOG_PERIOD", "1"]


def run_tool(tool: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """A tool in a process of its own, as on a machine without SLURM."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / tool), *argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )


def processes_of(folder: Path) -> list[str]:
    """Those whose command line names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command and int(path.name) != os.getpid():
            found.append(command)
    return found


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the package and the tools, to be edited."""
    root = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "projects" / "ConTNet", root, ignore=ignored)
    return root


@pytest.mark.slow
def test_the_snapshot_runs_here_in_two_processes(no_slurm, coco_root, project, capsys):
    """Submitted, then the code is broken: the job does not notice, and says how it did."""
    out = no_slurm / "out"
    options = [
        "--num-gpus",
        "2",
        "SOLVER.MAX_ITER",
        "3",
        "OUTPUT_DIR",
        "out",
        "--max-requeues",
        "2",
    ]
    options += ["--setup", "export OF_THE_SETUP=1", "--setup", "echo from the setup"]
    environment = {"PYTHONPATH": str(project), "DETECTRON2_DATASETS": str(coco_root)}
    done = run_tool("submit.py", "--config-file", LEAF, *QUICK, *options, **environment)
    assert done.returncode == 0, done.stderr
    assert "there is no sbatch here: running on this machine" in done.stdout
    (project / "contnet" / "__init__.py").write_text("raise RuntimeError('edited')\n")
    status = main(["--status", "out", "--watch"])
    followed = capsys.readouterr().out
    assert status == 0, followed[-3000:]
    assert "iter: 2" in followed
    assert followed.splitlines()[-1].endswith("finished")
    (start,) = json.loads((out / "run.json").read_text())
    assert start["processes"] == 2
    (record,) = read_submissions(out)
    assert "from the setup" in (out / "slurm" / "submission1" / "setup.log").read_text()
    assert record["code"].startswith(str(out))
    assert main(["--status", "out"]) == 0
    shown = capsys.readouterr().out
    assert "state    finished" in shown and "iteration 3 of 3" in shown
    wait_for(lambda: not processes_of(out))


@pytest.mark.slow
def test_without_snapshot_the_code_is_as_the_job_finds_it(no_slurm, coco_root, project):
    environment = {"PYTHONPATH": str(project), "DETECTRON2_DATASETS": str(coco_root)}
    broken = "--setup", f"echo 'raise RuntimeError(1)' > {project}/contnet/slurm/job.py"
    argv = ["--config-file", LEAF, *QUICK, "--no-snapshot", *broken, "OUTPUT_DIR", "out", "--watch"]
    done = run_tool("submit.py", *argv, **environment)
    assert done.returncode == 1
    assert not (no_slurm / "out" / "slurm" / "submission1" / "code").exists()
    assert "RuntimeError: 1" in done.stdout


@pytest.mark.slow
def test_cancel_on_this_machine_leaves_nothing(no_slurm, capsys):
    out = no_slurm / "out"
    argv = ["--config-file", LEAF, *QUICK, "--num-gpus", "2", "SOLVER.MAX_ITER", "9999"]
    argv += ["OUTPUT_DIR", "out"]
    assert main(argv) == 0
    wait_for(lambda: (out / "metrics.json").exists())
    assert len(processes_of(out)) >= 3  # submitit's, and two tasks
    assert "in use by job" in error_of(capsys, *argv)
    assert main(["--cancel", "out"]) == 0
    assert "cancelled job" in capsys.readouterr().out
    wait_for(lambda: not processes_of(out))
    # It has saved what it had done, and does not come back.
    status = read_status(out)
    saved = f"saved after iteration {status['iteration']}; not requeued"
    assert status["state"] == "stopped" and saved in status["exit"]["reason"]
    assert last_saved_iteration(out) == status["iteration"] and not status["requeues"]
    assert main(["--status", "out"]) == 0
    assert f"state    cancelled: {saved}" in capsys.readouterr().out
    assert "nothing to cancel" in error_of(capsys, "--cancel", "out")


def test_attempts_on_this_machine_are_bounded_by_the_user_alone(no_slurm):
    """submitit's own bound is six."""
    settings = ClusterSettings(max_requeues=7)
    python = shlex.quote(sys.executable)
    options = {"tasks": 1, "gpus": [], "environment": {}, "python": python}
    executor = local_executor(no_slurm / "jobs", settings, **options)
    start = "open('attempts', 'a').write('x'); import sys; sys.exit(144)"
    (job_id,) = submit_jobs(executor, [partial(exec, start)])
    wait_for(lambda: not process_start(int(job_id)))
    assert (no_slurm / "attempts").read_text() == 8 * "x"


@pytest.mark.slow
def test_a_failing_setup_is_in_the_status(no_slurm, capsys):
    argv = ["--config-file", LEAF, *QUICK, "--setup", "no-such-module", "OUTPUT_DIR", "out"]
    assert main([*argv, "--no-snapshot", "--watch"]) == 1
    assert main(["--status", "out"]) == 0
    shown = capsys.readouterr().out
    assert "state    never started" in shown
    assert "this set-up command failed: no-such-module" in shown


@pytest.mark.slow
def test_a_killed_process_ends_the_others(no_slurm):
    """Also before they have found each other."""
    out = no_slurm / "out"
    argv = ["--config-file", LEAF, *QUICK, "--num-gpus", "2", "OUTPUT_DIR", "out"]
    assert main([*argv, "--no-snapshot"]) == 0
    wait_for(lambda: 1 in read_status(out).get("ranks", {}))
    os.kill(read_status(out)["ranks"][1]["pid"], signal.SIGKILL)
    wait_for(lambda: not processes_of(out))
    assert describe_run(out).startswith("failed: rank 1 (process")


@pytest.mark.slow
def test_sweep_on_this_machine(no_slurm, capsys):
    """One run fails; the others go on, and the table says why."""
    bad = "SOLVER.BASE_LR=0.0001,1e30"
    argv = ["--config-file", LEAF, *QUICK, "SOLVER.MAX_ITER", "3", "SOLVER.WARMUP_ITERS", "0"]
    argv += ["--sweep", bad, "--max-parallel", "2", "OUTPUT_DIR", "out"]
    assert main(argv) == 1
    assert "BASE_LR=0.0001: finished" in capsys.readouterr().out
    table = run_tool("results.py", "out").stdout.splitlines()
    assert len(table) == 4
    assert [line for line in table if "BASE_LR=0.0001 | finished" in line and "| 3 |" in line]
    assert [line for line in table if "1e30 | failed: the loss is not finite" in line]


@pytest.mark.slow
def test_a_classifier_trains_here_too(no_slurm, imagenet_root, monkeypatch, capsys):
    leaf = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
    status = main(["--config-file", leaf, *IMAGES, "OUTPUT_DIR", "out", "--watch"])
    assert status == 0, capsys.readouterr().out[-3000:]
    (record,) = json.loads((no_slurm / "out" / "results.json").read_text())
    assert record["metrics"]["classification"].keys() == {"top1", "top5"}


def wait_for(condition) -> None:
    """For two processes' start-up, say, on a busy machine."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.parametrize(("change", "key"), [("0.3", "SOLVER.BASE_LR"), ("0.1", None)])
def test_a_sweep_goes_on_with_equal_settings_alone(no_slurm, capsys, change, key):
    base = str(REPOSITORY / "configs" / "imagenet" / "Base-plain.yaml")
    folder = no_slurm / "out" / "NAME=contnet_ti"
    folder.mkdir(parents=True)
    own = ["MODEL.CLASSIFIER.NAME", "contnet_ti", "OUTPUT_DIR", str(folder)]
    cfg = load_config(base, ["MODEL.DEVICE", "cpu", *own, "SOLVER.BASE_LR", change, "SEED", "7"])
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    argv = ["--config-file", base, "--sweep", "MODEL.CLASSIFIER.NAME=contnet_ti", "--resume"]
    said = error_of(
        capsys, *argv, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", "out", "SOLVER.BASE_LR", "0.1"
    )
    assert ("other settings" in said) == bool(key) and (key or "data set") in said
