"""Files that are whole or not there, also of a process that may write no longer."""

import pytest

from contnet.utils.files import WriteGuard, atomic_write


class Lost(BaseException):
    """Not an error that anybody would handle."""


class Limited(WriteGuard):
    """Lets a process write until it has asked a number of times."""

    writer = "first"

    def __init__(self, allowed):
        self.allowed = allowed

    def check(self):
        if self.allowed == 0:
            raise Lost
        self.allowed -= 1


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_refused_write_leaves_the_old_file_alone(tmp_path, allowed):
    """Whether the guard refuses before the file is begun, or before it takes its name."""
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
