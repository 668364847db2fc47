"""Tests tools/submit.py with a simulated SLURM: what is submitted, and what is refused."""

import json
import multiprocessing
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL
from submissions import ANNOTATIONS, GPU, JOB, LEAF, error_of, submit
from submitit.core.utils import DelayedSubmission

from contnet.config import load_config, load_finished_config
from contnet.config.nodes import flatten
from contnet.launch.run_lease import RunLease
from contnet.slurm.records import read_submissions
from contnet.slurm.submit import main

pytest_plugins = ["submissions"]


def snapshot_of_files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


# --- submissions ---------------------------------------------------------------------------------


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
    # The folder must exist, because SLURM opens the file when the job starts.
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
    assert "the set-up command failed: module load cuda" in done.stderr


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
    cfg = load_finished_config(job.config_file)
    assert cfg.SOLVER.BASE_LR == 0.005
    assert str(here / "weights.pth") == cfg.MODEL.WEIGHTS
    assert [["mine", str(here / "mine.json"), str(here / "images")]] == cfg.DATASETS.REGISTER
    assert str(here / "out") == cfg.OUTPUT_DIR
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80  # counted in the file
    assert job.num_gpus == 2
    assert job.notes == ("MODEL.ROI_HEADS.NUM_CLASSES 80: the number of classes of mine",)
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
            again = load_finished_config(str(tmp_path / "whole.yaml"))
            assert again.is_frozen()
            # As JSON, which has no tuples: nested tuples are loaded as lists.
            assert json.dumps(again) == json.dumps(cfg), path
            types = [dict(flatten(each, each)) for each in (again, cfg)]
            types = [{key: type(value) for key, value in each.items()} for each in types]
            assert types[0] == types[1], path


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
    assert "requeued at most 20 times, ended after 1800 s" in shown
    assert "on network ib0" in shown
    assert main([*argv, "--cpus-per-gpu", "5", "DATALOADER.NUM_WORKERS", "4"]) == 0
    assert "no --cpus-per-gpu" not in capsys.readouterr().out


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--machine-rank", "1"], ["--machine-rank", "remove it"]),
        (["--dist-url", "tcp://a:1"], ["--dist-url", "remove it"]),
        (["--partition", "gpux"], ["no partition gpux", "gpu, old, cpu, closed"]),
        (["--partition", "closed"], ["closed accepts no jobs"]),
        (
            ["--partition", "old", "--num-gpus", "8", "SOLVER.IMS_PER_BATCH", "8"],
            ["old has 8 GPUs", "at most 4", "partition closed, gpu has"],
        ),
        (["--gpu-type", "h100"], ["1 h100 GPU"]),
        (["--num-nodes", "4", "SOLVER.IMS_PER_BATCH", "4"], ["is 4", "gpu has 2 nodes"]),
        (["--partition", "old", "--timeout-hours", "13"], ["--timeout-hours is 13", "allows 12"]),
        (["--timeout-hours", "0"], ["Add --timeout-hours", "up to 48"]),
        (["--timeout-hours", "-1"], ["--timeout-hours is -1.0", "at least 0"]),
        (["--timeout-hours", "0.02"], ["--signal-delay 180 s leaves no time"]),
        (["OUTPUT_DIR", "50%j"], ["50%j contains a %"]),
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
        (["--sweep", "SEED=1", "--only", "SEED=1", "OUTPUT_DIR a"], ["its own OUTPUT_DIR"]),
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


def test_checkpoints_of_another_run(slurm, here, capsys):
    (here / "out").mkdir()
    (here / "out" / "last_checkpoint").write_text("model_0000001.pth")
    torch.save({"model": {}, "iteration": 1}, here / "out" / "model_0000001.pth")
    line = error_of(capsys, "--config-file", LEAF, *JOB, *GPU, "OUTPUT_DIR", "out")
    assert "already holds checkpoints" in line
    assert submit("--resume", *GPU, "OUTPUT_DIR", "out") == 0
    sent = here / "out" / "slurm" / "submission1" / "4242_submitted.pkl"
    assert DelayedSubmission.load(sent).function.resume


def test_a_job_goes_back_to_a_file_once(slurm, here, capsys):
    """Later attempts resume from the last checkpoint, which this file becomes."""
    out = here / "out"
    out.mkdir()
    for number in (1, 3):
        torch.save({"model": {}, "iteration": number}, out / f"model_{number:07d}.pth")
    (out / "last_checkpoint").write_text("model_0000003.pth")
    options = ["--resume-from", "out/model_0000001.pth", *GPU, "OUTPUT_DIR", "out"]
    assert submit("--dry-run", *options) == 0
    assert (out / "last_checkpoint").read_text() == "model_0000003.pth"
    line = error_of(capsys, "--config-file", LEAF, *JOB, *options, "--sweep", "SEED=1,2")
    assert "--resume-from" in line
    assert submit(*options) == 0
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    assert [path.name for path in (out / "set_aside").iterdir()] == ["model_0000003.pth"]
    sent = out / "slurm" / "submission1" / "4242_submitted.pkl"
    assert DelayedSubmission.load(sent).function.resume


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


def _train_until_told(folder, pipe):
    RunLease(folder).take()
    pipe.send("")
    pipe.recv()


def test_an_evaluation_is_not_sent_into_the_folder_of_a_training(slurm, here, capsys):
    """Its job would take the lease, like a training job."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_train_until_told, args=(here / "out", theirs)
    )
    process.start()
    ours.recv()
    try:
        argv = ["--config-file", LEAF, *JOB, *GPU, "--eval-only", "OUTPUT_DIR", "out"]
        assert f"in use by a training (process {process.pid}" in error_of(capsys, *argv)
    finally:
        ours.send("")
        process.join()


def test_sbatch_refuses(slurm, here, capsys):
    slurm.set("sbatch", 'echo "sbatch: error: Invalid qos specification" >&2; exit 1')
    line = error_of(capsys, "--config-file", LEAF, *JOB, *GPU, "OUTPUT_DIR", "out")
    assert "Invalid qos specification" in line
    assert "sbatch: error" not in line
    assert not list((here / "out" / "slurm").iterdir())
