"""Tests atomic writes, also in a process that has lost its permission to write."""

import errno
import os
import shutil

import pytest

from contnet.utils.errors import UserError
from contnet.utils.files import WriteError, WriteGuard, atomic_write, explaining_disk, writing


class Lost(BaseException):
    """An exception that no code handles."""


class Limited(WriteGuard):
    """Allows a process to write until it has checked a number of times."""

    writer = "first"

    def __init__(self, allowed):
        self.allowed = allowed

    def check(self):
        if self.allowed == 0:
            raise Lost
        self.allowed -= 1


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_refused_write_leaves_the_old_file_alone(tmp_path, allowed):
    """The guard refuses before the file is opened, or before it is renamed."""
    path = tmp_path / "file"
    path.write_text("old")
    begun = False
    with pytest.raises(Lost), atomic_write(path, "w", Limited(allowed)) as file:
        begun = True
        file.write("new")
    assert begun == (allowed == 1)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_writers_do_not_share_an_unfinished_file(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path, "w", Limited(2)) as first, atomic_write(path, "w") as second:
        assert sorted(each.name for each in tmp_path.iterdir()) == ["file.first.tmp", "file.tmp"]
        first.write("first")
        second.write("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise OSError("the disk is full")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path):
    """The error names the written file, even if it is raised at the end without a file name."""
    path = tmp_path / "file"
    path.symlink_to("/dev/full")
    with pytest.raises(WriteError) as caught, writing(path), open(path, "w") as file:
        file.write("some")
    assert str(path) in str(caught.value) and "MiB are free there" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)


def test_a_folder_that_has_gone_is_told(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(UserError, match="moved or deleted"), atomic_write(folder / "file") as file:
        shutil.rmtree(folder)
        file.write(b"some")
    assert not folder.exists()


def test_an_error_of_reading_is_not_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file") as file:
        file.write((tmp_path / "missing").read_bytes())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [None, "/data/image.jpg"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ESTALE])
def test_errors_of_the_disk_are_one_line(tmp_path, number, name):
    with pytest.raises(UserError) as caught, explaining_disk(tmp_path):
        raise OSError(number, os.strerror(number), name)
    assert (name or str(tmp_path)) in str(caught.value)
    assert os.strerror(number) in str(caught.value) and "\n" not in str(caught.value)


def test_other_errors_keep_their_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), explaining_disk(tmp_path):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(UserError, match="moved or deleted"), explaining_disk(tmp_path / "gone"):
        (tmp_path / "gone" / "missing").read_bytes()
