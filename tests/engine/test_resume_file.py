"""Tests which checkpoint a run resumes from: the last complete one, or a given one."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import QUICK, REPOSITORY, finish, metrics_of

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.engine.resume_file import ResumeFile, choose_checkpoint, make_last
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.main import main
from contnet.launch.preflight import check_run
from contnet.launch.run import run
from contnet.utils.errors import UserError


def save(folder, name, images, iteration=None):
    """Saves a small checkpoint."""
    iteration = images if iteration is None else iteration
    trainer = {"iteration": iteration, "stream": {"images_seen": images}}
    torch.save({"model": {"weight": torch.randn(4096)}, "trainer": trainer}, folder / f"{name}.pth")


def flip(path):
    """Flips a bit of a tensor."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda part: part.file_size))
    content[content.index(tensor) + len(tensor) // 2] ^= 1
    path.write_bytes(content)


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


@pytest.fixture
def folder(tmp_path):
    """Makes a run's folder with checkpoints after images 1, 3, 5 and 7; the last one is final."""
    for number in (1, 3, 5):
        save(tmp_path, f"model_{number:07d}", number)
    save(tmp_path, "model_final", 7)
    save(tmp_path, "model_best", 3)
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    return tmp_path


# --- the choice ----------------------------------------------------------------------------------

DAMAGE = {
    "bit": flip,
    "hole": lambda path: path.write_bytes(bytes(512) + path.read_bytes()[512:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_one_before_a_damaged_one_is_used(folder, damage):
    assert choose_checkpoint(folder).path == str(folder / "model_0000005.pth")
    DAMAGE[damage](folder / "model_0000005.pth")
    chosen = choose_checkpoint(folder)
    assert chosen.path == str(folder / "model_0000003.pth")
    (warning,) = chosen.warnings
    assert "model_0000005.pth" in warning and "model_0000003.pth" in warning
    assert "\n" not in warning
    flip(folder / "model_0000003.pth")
    assert choose_checkpoint(folder).path == str(folder / "model_0000001.pth")
    flip(folder / "model_0000001.pth")
    with pytest.raises(UserError, match=r"model_0000005\.pth .*--resume-from") as error:
        choose_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_before_a_damaged_final_one_comes_the_last_numbered_one(folder, damage):
    (folder / "last_checkpoint").write_text("model_final.pth")
    DAMAGE[damage](folder / "model_final.pth")
    assert choose_checkpoint(folder).path == str(folder / "model_0000005.pth")


def test_images_count_where_numbers_have_fallen(tmp_path):
    """With twice the batch, iteration 3 is after 32 images, and the older iteration 5 after 24."""
    save(tmp_path, "model_0000005", 24)
    save(tmp_path, "model_0000001", 16)
    save(tmp_path, "model_0000003", 32)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    flip(tmp_path / "model_0000003.pth")
    assert choose_checkpoint(tmp_path).path == str(tmp_path / "model_0000005.pth")


def test_without_last_checkpoint(folder):
    (folder / "last_checkpoint").unlink()
    flip(folder / "model_final.pth")
    path = folder / "model_0000005.pth"
    with pytest.raises(UserError, match=rf"--resume-from {path}"):
        choose_checkpoint(folder)
    # A kill between renaming the first checkpoint and this file leaves this state.
    (folder / "last_checkpoint.tmp").write_text("")
    assert choose_checkpoint(folder).path == str(path)
    for each in folder.glob("*.pth"):
        each.unlink()
    assert choose_checkpoint(folder) == ResumeFile()


SAVER = """
import os, signal, sys, torch
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.utils.files import WriteGuard

class Kill(WriteGuard):
    writer = "job"
    def __init__(self, steps):
        self.steps = steps
    def check(self):
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), 9)

for steps, folder in enumerate(sys.argv[1:], 1):
    if os.fork() == 0:
        checkpointer = Checkpointer(torch.nn.Linear(1, 1), folder, guard=Kill(steps))
        checkpointer.save("model_0000001")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.slow
def test_a_first_save_that_is_killed_at_any_step(tmp_path):
    """The run resumes from the files that exist."""
    folders = [tmp_path / str(step) for step in range(1, 6)]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, "-c", SAVER, *map(str, folders)]
    status = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    assert status == [str(-signal.SIGKILL)] * 4 + ["0"]
    found = [(bool(names(folder)), bool(choose_checkpoint(folder).path)) for folder in folders]
    # The last kill is between the two renames.
    assert found == [*[(False, False)] * 3, (True, True), (True, True)]


HOSTILE = {
    "empty": b"",
    "blank": b" \n",
    "binary": bytes(range(256)),
    "no text": b"model_\xff.pth",
    "other folder": b"../other/model_0000005.pth",
    "absolute": b"/etc/model_0000005.pth",
    "below": b"set_aside/model_0000005.pth",
    "parent": b"..",
    "two lines": b"model_0000001.pth\nmodel_0000005.pth",
    "escapes": b"\x1b[31mmodel.pth",
    "long": b"m" * 10_000_000 + b".pth",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_last_checkpoint_that_names_no_file_of_the_folder(folder, content):
    other = folder.parent / "other"
    for place in (other, folder / "set_aside"):
        place.mkdir(exist_ok=True)
        shutil.copy(folder / "model_0000005.pth", place)
    (folder / "last_checkpoint").write_bytes(content)
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(folder))
    for choose in (lambda: choose_checkpoint(folder), checkpointer.get_checkpoint_file):
        with pytest.raises(UserError, match="last_checkpoint") as error:
            choose()
        assert str(error.value).isprintable() and len(str(error.value)) < 500
    # With a given file, a run does not need it.
    file = str(folder / "model_0000003.pth")
    assert choose_checkpoint(folder, file).path == file
    make_last(folder, file)
    assert choose_checkpoint(folder).path == file


# --- later checkpoints ---------------------------------------------------------------------------


def test_later_ones_are_set_aside(folder, caplog):
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    (folder / "mine.pth").write_text("not a checkpoint of the run")
    with caplog.at_level(logging.WARNING):
        assert make_last(folder, str(folder / "model_0000001.pth")) == [
            folder / "model_0000001.pth"
        ]
    assert names(folder) == ["mine.pth", "model_0000001.pth"]
    aside = names(folder / "set_aside")
    assert aside == [f"model_{name}.pth" for name in ("0000003", "0000005", "best", "final")]
    (line,) = caplog.messages
    assert all(name in line for name in aside)


def test_going_on_as_usual_sets_nothing_aside(folder):
    (folder / "last_checkpoint").write_text("model_final.pth")
    before = names(folder)
    assert len(make_last(folder, str(folder / "model_final.pth"))) == 5
    assert names(folder) == before and not (folder / "set_aside").exists()


@pytest.mark.parametrize(
    "source", ["other/any_name", "run/set_aside/model_final", "run/model_best"]
)
def test_a_file_from_elsewhere_becomes_the_last_one(tmp_path, source):
    folder = tmp_path / "run"
    (folder / "set_aside").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for number in (2, 4, 6):
        save(folder, f"model_{number:07d}", 10 * number)
    save(tmp_path, source, 40, iteration=4)
    file = tmp_path / f"{source}.pth"
    content = file.read_bytes()
    make_last(folder, str(file))
    assert (folder / "last_checkpoint").read_text() == "model_0000004.pth"
    assert (folder / "model_0000004.pth").read_bytes() == content == file.read_bytes()
    assert {"model_0000002.pth", "model_0000004.pth"} <= set(names(folder))
    assert {"model_0000004.pth", "model_0000006.pth"} <= set(names(folder / "set_aside"))


def test_a_damaged_file_is_not_gone_on_from(folder):
    flip(folder / "model_0000003.pth")
    with pytest.raises(UserError, match=r"model_0000003\.pth"):
        choose_checkpoint(folder, str(folder / "model_0000003.pth"))
    with pytest.raises(UserError, match=r"missing\.pth does not exist"):
        choose_checkpoint(folder, str(folder / "missing.pth"))


# --- runs ----------------------------------------------------------------------------------------

OPTIONS = """
MODEL.CLASSIFIER.NUM_CLASSES 7 INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 6 SOLVER.CHECKPOINT_PERIOD 2
TEST.EVAL_PERIOD 3 LOG_PERIOD 1 SOLVER.WARMUP_FACTOR 0.1 SOLVER.CHECKPOINTS_KEPT 2
"""
LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
pytestmark = pytest.mark.usefixtures("imagenet_here")


def arguments(folder, *more):
    return ["--config-file", LEAF, *QUICK, *OPTIONS.split(), "OUTPUT_DIR", str(folder), *more]


@pytest.fixture(scope="module")
def uncut(imagenet_root, tmp_path_factory):
    """Returns a whole run with checkpoints after iterations 1 and 3, evaluated after 2 and 5."""
    folder = tmp_path_factory.mktemp("uncut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(imagenet_root))
        run(check_run(build_run_settings(parse_arguments(arguments(folder)))))
    return folder


def same_end(folder, uncut):
    """Returns whether two runs ended bit for bit equal."""
    final = [torch.load(each / "model_final.pth")["model"] for each in (folder, uncut)]
    assert metrics_of(folder) == metrics_of(uncut)
    results = [(each / "results.json").read_text() for each in (folder, uncut)]
    return results[0] == results[1] and all(
        torch.equal(value, final[1][name]) for name, value in final[0].items()
    )


def test_a_run_goes_on_from_the_one_before_a_damaged_one(uncut, tmp_path):
    folder = shutil.copytree(uncut, tmp_path / "run")
    flip(folder / "model_final.pth")
    assert main(arguments(folder, "--resume")) == 0
    assert same_end(folder, uncut) and names(folder) == names(uncut)
    assert {"model_final.pth"} <= set(names(folder / "set_aside"))
    log = (folder / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if "newest complete one before it" in line]
    assert "WARNING" in line and "model_final.pth" in line and "model_0000003.pth" in line


def test_a_run_goes_back_to_a_file(uncut, tmp_path):
    """Later checkpoints are kept, new ones stay, and the next resume starts from the newest one."""
    folder = shutil.copytree(uncut, tmp_path / "run")
    file = str(folder / "model_0000001.pth")
    settings = build_run_settings(parse_arguments(arguments(folder, "--resume-from", file)))
    run(check_run(settings))
    assert same_end(folder, uncut)
    assert names(folder) == names(uncut)
    assert {"model_0000003.pth", "model_final.pth"} <= set(names(folder / "set_aside"))
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert main(arguments(folder, "--resume")) == 0
    assert "Training has finished" in (folder / "log.txt").read_text()


def test_evaluation_alone_warns_of_a_damaged_checkpoint(uncut, tmp_path, capsys):
    folder = shutil.copytree(uncut, tmp_path / "run")
    flip(folder / "model_final.pth")
    before = names(folder)
    assert main(arguments(folder, "--resume", "--eval-only")) == 0
    record = json.loads((folder / "results.json").read_text())[-1]
    assert record["weights"] == str(folder / "model_0000003.pth")
    assert any("model_final.pth" in line for line in record["warnings"])
    assert names(folder) == before
    assert main(arguments(folder, "--resume-from", "model.pth", "--eval-only")) != 0
    assert "MODEL.WEIGHTS FILE" in capsys.readouterr().err


def test_resume_without_last_checkpoint_leaves_everything(uncut, tmp_path, capsys):
    folder = shutil.copytree(uncut, tmp_path / "run")
    (folder / "last_checkpoint").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(arguments(folder, "--resume")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--resume-from {folder}/model_final.pth" in line
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_in_an_evaluation_and_damaged(train_net, imagenet_root, uncut, tmp_path, processes):
    """SIGKILL during the evaluation after iteration 2; then the newest checkpoint is damaged."""
    root = {"DETECTRON2_DATASETS": str(imagenet_root)}
    folder, expected = tmp_path / "run", uncut

    def start(out, *more):
        words = f"--config-file configs/imagenet/contti.yaml --num-gpus {processes}"
        return train_net(words, *OPTIONS.split(), "OUTPUT_DIR", str(out), *more, **root)

    if processes > 1:
        expected = tmp_path / "uncut"
        finish(start(expected))
    process = start(folder)
    pointer = folder / "last_checkpoint"
    while not (pointer.exists() and pointer.read_text() == "model_0000002.pth"):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "unfinished" in torch.load(folder / "model_0000002.pth")
    assert [line["iteration"] for line in metrics_of(folder)] == [0, 1]
    if processes > 1:
        flip(folder / "model_0000002.pth")
    finish(start(folder, "--resume"))
    assert same_end(folder, expected)
    assert (folder / "set_aside").exists() == (processes > 1)
