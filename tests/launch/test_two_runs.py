"""Tests two runs in one OUTPUT_DIR: the second one is refused, unless it only evaluates."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, finish, metrics_of

from contnet.engine.hooks import LauncherHook
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.main import main
from contnet.launch.run import run
from contnet.launch.run_lease import RunLease
from contnet.utils.errors import UserError
from contnet.utils.processes import process_start

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
OPTIONS = [
    "LOG_PERIOD",
    "1",
    "SOLVER.CHECKPOINT_PERIOD",
    "2",
    "TEST.EVAL_PERIOD",
    "0",
    "SOLVER.BASE_LR",
    "1e-4",
]


@pytest.fixture(autouse=True)
def data_here(coco_here, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def run_here(folder, *options):
    return main(["--config-file", LEAF, *SMALL, *OPTIONS, "OUTPUT_DIR", str(folder), *options])


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)


def error_of(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def contents(folder):
    """Returns the contents of files by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_the_second_training_is_refused_and_the_first_ends_whole(train_net, tmp_path, capsys):
    """The process that was started is not the one that writes."""
    folder = tmp_path / "run"
    more = ["SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "1000"]
    start = f"--config-file {LEAF} --num-gpus 2 OUTPUT_DIR {folder}"
    first = train_net(start, *OPTIONS, *more)
    wait_for((folder / "metrics.json").exists, first)
    os.killpg(first.pid, signal.SIGSTOP)
    before = contents(folder)
    for options in ([], ["--resume"]):
        assert run_here(folder, *options, *more) == 1
        assert f"OUTPUT_DIR {folder} is in use by a training (process " in error_of(capsys)
    assert contents(folder) == before
    os.killpg(first.pid, signal.SIGCONT)
    finish(first)
    assert [line["iteration"] for line in metrics_of(folder)] == [0, 1, 2, 3]
    assert len(json.loads((folder / "run.json").read_text())) == 1


def short_settings(folder):
    options = ["SOLVER.MAX_ITER", "9", "DATASETS.TEST", "()", "OUTPUT_DIR", str(folder)]
    argv = ["--config-file", LEAF, *SMALL, *OPTIONS, *options]
    return build_run_settings(parse_arguments(argv))


class TakeOver(LauncherHook):
    """Simulates that another process takes the run's folder after the second iteration."""

    def after_step(self):
        if self.trainer.iter == 1:
            Path(self.trainer.cfg.OUTPUT_DIR, "lease", "000002").mkdir()
            self.files = contents(Path(self.trainer.cfg.OUTPUT_DIR))


def test_a_training_whose_folder_was_taken_writes_nothing_more(tmp_path):
    settings, launcher = short_settings(tmp_path / "run"), TakeOver()
    with pytest.raises(UserError, match="another process writes"):
        run(settings, launcher)
    after = contents(tmp_path / "run")
    written = {name for name, content in after.items() if content != launcher.files.get(name)}
    assert not [name for name in written if not name.startswith(("log", "events", "lease"))]
    assert "model_0000003.pth" not in after


class MovedAway(TakeOver):
    """Simulates that the run's folder is moved, and another run starts in its place."""

    def after_step(self):
        folder = Path(self.trainer.cfg.OUTPUT_DIR)
        if self.trainer.iter == 1:
            folder.rename(folder.with_name("old"))
            RunLease(folder).take()
            self.files = contents(folder)


def test_a_training_does_not_write_into_the_run_that_is_in_its_folders_place(tmp_path):
    settings, launcher = short_settings(tmp_path / "run"), MovedAway()
    with pytest.raises(UserError, match="the folder was moved"):
        run(settings, launcher)
    assert contents(tmp_path / "run") == launcher.files


@pytest.mark.parametrize("saved", ["model_0000003.pth", "model_final.pth"])
def test_what_was_saved_since_a_start_looked_is_not_lost(tmp_path, saved):
    folder = tmp_path / "run"
    settings = short_settings(folder)
    folder.mkdir()
    (folder / "last_checkpoint").write_text(saved)
    with pytest.raises(UserError, match=f"another training has saved {saved}"):
        run(settings)
    assert {path.name for path in folder.iterdir()} == {"last_checkpoint", "lease"}


@pytest.mark.long
def test_beside_a_training_and_after_its_end(train_net, tmp_path, capsys):
    """An evaluation may run beside it; a run's workers end with it, and do not block the next."""
    folder = tmp_path / "run"
    more = ["DATALOADER.NUM_WORKERS", "1"]
    start = f"--config-file {LEAF} OUTPUT_DIR {folder}"
    first = train_net(start, *OPTIONS, *more, "SOLVER.MAX_ITER", "999", "DATASETS.TEST", "()")
    wait_for((folder / "last_checkpoint").exists, first)
    os.killpg(first.pid, signal.SIGSTOP)
    saved = int((folder / "last_checkpoint").read_text()[6:13])
    more += ["--resume", "SOLVER.MAX_ITER", str(saved + 2)]
    try:
        assert run_here(folder, *more) == 1
        assert "is in use by a training" in error_of(capsys)
        assert run_here(folder, "--eval-only", *more) == 0
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        first.kill()
        first.wait()
        assert run_here(folder, *more, "DATASETS.TEST", "()") == 0
        # They were stopped, so they could not notice that their parent was gone.
        assert children and not any(map(process_start, children))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    assert [line["iteration"] for line in metrics_of(folder)] == list(range(saved + 2))
    assert len(json.loads((folder / "results.json").read_text())) == 1
