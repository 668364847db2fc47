"""Tests that the annotation cache trusts only the user's own files, and never waits long."""

import fcntl
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from annotated import Drawn, usable_content
from detectron2.data import get_detection_dataset_dicts

from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.annotations import AnnotationCache, load_dataset_dicts
from contnet.data.pipeline.records import Records
from contnet.data.validation.dataset import check_datasets

pytest_plugins = ["annotated"]

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
STRANGER = 12345


def _told(caplog) -> list[str]:
    lines = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    return [line for line in lines if "are not cached" in line]


def _runs_without(drawn: Drawn, caplog, what: str) -> None:
    """Checks that a run continues without the cache, and logs this once."""
    check_datasets(drawn.cfg, ["drawn"])
    assert drawn.load() == get_detection_dataset_dicts("drawn", filter_empty=False)
    (line,) = _told(caplog)
    assert what in line and "\n" not in line


def test_the_folder_is_the_users_alone(usable):
    before = os.umask(0)
    try:
        usable.load()
    finally:
        os.umask(before)
    assert usable.cache.stat().st_mode & 0o777 == 0o700


def test_a_link_to_another_disk_is_followed(usable, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o700)
    usable.cache.symlink_to(scratch)
    assert isinstance(usable.load(), Records)
    assert list(scratch.glob("*.records"))


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_that_others_write_into_is_refused(usable, caplog, mode):
    usable.cache.mkdir()
    usable.cache.chmod(mode)
    _runs_without(usable, caplog, f"other users may write into it: chmod 700 {usable.cache}")
    assert not list(usable.cache.iterdir())


@pytest.mark.parametrize(("mode", "fine"), [(0o777, False), (0o1777, True)])
def test_folders_above_need_the_sticky_bit(tmp_path, caplog, mode, fine):
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(mode)
    drawn = Drawn(tmp_path, usable_content(), "DATASETS.CACHE_DIR", str(above / "between" / "mine"))
    if fine:
        assert isinstance(drawn.load(), Records)
    else:
        _runs_without(drawn, caplog, f"every user may write into {above}")


@AS_ROOT
@pytest.mark.parametrize("linked", [False, True])
def test_the_folder_of_another_user_is_refused(usable, tmp_path, caplog, linked):
    folder = tmp_path / "theirs" if linked else usable.cache
    folder.mkdir(mode=0o700)
    os.chown(folder, STRANGER, STRANGER)
    if linked:
        usable.cache.symlink_to(folder)
    _runs_without(usable, caplog, "it belongs to another user")


@AS_ROOT
def test_records_of_another_user_are_made_again(usable, caplog):
    usable.load()
    (path,) = usable.kept()
    os.chown(path, STRANGER, STRANGER)
    assert isinstance(usable.load(), Records)
    assert f"{path} is not used (it belongs to another user)" in _told(caplog)[0]
    assert path.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("ending", ["records", "checks"])
def test_links_in_the_folder_are_not_followed(usable, tmp_path, ending):
    check_datasets(usable.cfg, ["drawn"])
    (path,) = usable.kept(ending)
    away = tmp_path / "away"
    path.rename(away)
    path.symlink_to(away)
    before = away.read_bytes()
    check_datasets(usable.cfg, ["drawn"])
    assert path.is_file() and not path.is_symlink()
    assert away.read_bytes() == before


def _make_link(path: Path) -> None:
    target = path.parent.parent / "target"
    target.write_text("mine")
    path.symlink_to(target)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, _make_link])
def test_without_a_lock_file_it_goes_on(usable, caplog, make):
    usable.cache.mkdir(mode=0o700)
    make(usable.cache / "lock")
    _runs_without(usable, caplog, str(usable.cache / "lock"))


def test_waiting_for_a_lock_is_told_and_ends(usable, caplog, capsys, monkeypatch):
    usable.load()
    for path in usable.kept():
        path.unlink()
    lock = usable.cache / "lock"
    code = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print(flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        monkeypatch.setattr(AnnotationCache, "patience", 1.5)
        start = time.monotonic()
        assert isinstance(usable.load(), list)
        assert 1.5 < time.monotonic() - start < 10
    finally:
        holder.kill()
        holder.communicate()
    assert str(lock) in capsys.readouterr().err
    assert f"{lock} is not used (another process has locked it" in _told(caplog)[0]


def test_a_file_system_without_locks(usable, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    _runs_without(usable, caplog, "No locks available")


def test_a_long_name_is_kept(tmp_path):
    drawn = Drawn(tmp_path, usable_content())
    long = tmp_path / ("x" * 240 + ".json")
    drawn.file.rename(long)
    drawn.cfg.DATASETS.REGISTER = [["long", str(long), str(tmp_path / "images")]]
    register_datasets(drawn.cfg)
    assert isinstance(load_dataset_dicts(drawn.cfg, ["long"], False), Records)
