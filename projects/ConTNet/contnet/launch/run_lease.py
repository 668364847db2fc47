"""The lease of a run's folder: which process may write into it.

``lease/000001`` is the first lease, and the one with the highest number is valid. A process takes a
lease by renaming a complete folder to the next number, which succeeds for only one process. The
folder contains ``owner.json``, which the owner touches every few seconds; ``lock``, on which the
owner holds a record lock as long as it lives (processes that it forks do not); and, after a normal
end, ``released``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import msgspec

from contnet.launch.environment import DistributedEnvironment
from contnet.utils.errors import UserError
from contnet.utils.files import WriteGuard, explain_os_error, set_aside
from contnet.utils.processes import machine_id, process_start
from contnet.utils.records import warn_once
from contnet.utils.text import printable

__all__ = ["LeaseLost", "Owner", "RunLease", "newest_lease"]

logger = logging.getLogger(__name__)

LEASE_FOLDER = "lease"
_OWNER, _LOCK, _RELEASED = "owner.json", "lock", "released"
_NUMBER = re.compile("[0-9]{6}")
# Seconds between two heartbeats.
_INTERVAL = 5.0
# Seconds that the memory of a killed process may take to be given back.
_ENDING = 2.0
# Bytes of owner.json that are read; it has some hundred.
_LONGEST = 10_000


class LeaseLost(BaseException):
    """Another process owns the run, so this one must end; not an error of the training."""


@dataclass(frozen=True)
class Owner:
    """The owner of a lease.

    Attributes:
        machine: its machine, from :func:`contnet.utils.processes.machine_id`.
        host: the machine's name, for messages.
        pid, process_start: id and start time of the process.
        cluster, job_id, restart: its job, as in :class:`DistributedEnvironment`.
        time: when it took the lease, for messages.
        locked: whether it holds a lock on the lease; the file system may not support locks.
    """

    machine: str
    host: str
    pid: int
    process_start: str
    cluster: str
    job_id: str
    restart: int
    time: str
    locked: bool = True

    def __post_init__(self):
        if not re.fullmatch(r"[\w-]*", self.job_id):
            raise ValueError("job_id would lead out of a folder")

    @property
    def attempt(self) -> tuple[str, str, int]:
        """Job and attempt of the owner."""
        return self.cluster, self.job_id, self.restart

    @property
    def process(self) -> tuple[str, int, str]:
        """Machine and process of the owner."""
        return self.machine, self.pid, self.process_start

    def precedes(self, other: Owner) -> bool:
        """Whether it is an earlier attempt of the other one's job."""
        if not self.job_id or self.attempt[:2] != other.attempt[:2]:
            return False
        # Without SLURM, jobs have the numbers of processes.
        comparable = self.cluster == "slurm" or self.machine == other.machine
        return comparable and self.restart < other.restart


def _open(path: Path) -> IO[bytes]:
    """Opens a file that another user may have replaced: a pipe does not block it."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def _newest_number(folder: Path) -> int:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(name) for name in names if _NUMBER.fullmatch(name)), default=0)


def _read_owner(path: Path) -> Owner | None:
    """The owner of a lease; None if its file is damaged or missing.

    Raises:
        OSError: if it cannot be read now, so the owner is unknown.
    """
    try:
        with _open(path / _OWNER) as file:
            return msgspec.json.decode(file.read(_LONGEST), type=Owner)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _heartbeat(path: Path) -> int:
    """A number that changes with each heartbeat."""
    try:
        with _open(path / _OWNER) as file:  # opened, so that a network file system asks its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a lease, as far as locks are visible."""
    try:
        with _open(path / _LOCK) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def _lock(file: IO) -> bool:
    """Locks a new file; returns whether the file system supports locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class _Taken:
    """A lease that this process has taken.

    Args:
        path: path of its folder.
        lock: its open lock file.
    """

    def __init__(self, path: Path, lock: IO):
        self.path, self.lock = path, lock
        self.number = int(path.name)
        self._file = os.fstat(lock.fileno())

    def is_there(self) -> bool:
        """Whether it still exists, and its folder was not replaced."""
        try:
            return os.path.samestat(self._file, os.stat(self.path / _LOCK))
        except FileNotFoundError:
            return False


class _Watch:
    """Checks, with its own clock, whether an owner on another machine sends heartbeats.

    Args:
        silence: seconds without a heartbeat after which the owner has ended.
    """

    def __init__(self, silence: float):
        self.silence = silence
        self._seen: tuple[Path, int] | None = None
        self._since = 0.0

    def is_alive(self, path: Path) -> bool | None:
        """Whether the owner of a lease is alive; None if it is unknown yet."""
        before, self._seen = self._seen, (path, _heartbeat(path))
        now = time.monotonic()
        if before == self._seen:
            return None if now - self._since < self.silence else False
        self._since = now
        if before is None or before[0] != path:
            logger.warning(
                f"{path.parent} was locked on another machine: waiting up to "
                f"{self.silence:.0f} s to see whether the training there has ended"
            )
            return None
        return True


def newest_lease(run_folder: str | Path) -> tuple[Owner, float] | None:
    """The owner of the newest lease of a run, and the time of its last heartbeat; None if none."""
    folder = Path(run_folder, LEASE_FOLDER)
    path = folder / f"{_newest_number(folder):06d}"
    owner = _read_owner(path)
    if owner is None:
        if path.exists():
            warn_once(f"{path / _OWNER} is damaged: it is ignored")
        return None
    return owner, _heartbeat(path) / 1e9


class RunLease(WriteGuard):
    """Only the process with the newest lease may write into a run's folder.

    A later attempt of a job takes the lease from an earlier one, which checks before each file, and
    ends. From other runs, it is taken only when they have ended. Their lock shows this, and their
    process if it is on the same machine; on another machine, where locks may not be visible,
    missing heartbeats. Clocks of different machines are never compared.

    Args:
        run_folder: OUTPUT_DIR.
        cluster, job_id, restart: this process's job.

    Attributes:
        silence: seconds without a heartbeat after which a process of another machine has ended.
    """

    silence = 60.0

    def __init__(
        self, run_folder: str | Path, cluster: str = "", job_id: str = "", restart: int = 0
    ):
        self.run_folder = Path(run_folder)
        self.folder = self.run_folder / LEASE_FOLDER
        self.owner = Owner(
            machine_id(),
            socket.gethostname(),
            os.getpid(),
            process_start(os.getpid()),
            cluster,
            job_id,
            restart,
            time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        self._number = 0  # of this attempt's lease
        self._taken: _Taken | None = None  # by this process
        self._released = threading.Event()

    @classmethod
    def of(cls, run_folder: str | Path, env: DistributedEnvironment) -> RunLease:
        """The lease for a process with this environment."""
        return cls(run_folder, env.cluster, env.job_id, env.restart)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def lost(self) -> bool:
        """Whether another attempt owns the run now, or a later one has owned it."""
        taken = self._taken  # before the folder is read: another thread may take it meanwhile
        number = _newest_number(self.folder)
        if taken is not None:
            # Where the folder is gone, whoever writes there says so.
            return self.run_folder.is_dir() and (number != taken.number or not taken.is_there())
        if number <= self._number:
            return False
        owner = _read_owner(self._path(number))
        if owner is not None and owner.attempt == self.owner.attempt:
            self._number = number  # which rank 0 has taken
            return False
        return self._number > 0 or (owner is not None and self.owner.precedes(owner))

    def wait(self, patience: float) -> None:
        """On other ranks: waits until rank 0 has taken the lease, or for this many seconds.

        Raises:
            LeaseLost: as in :meth:`check`.
        """
        end = time.monotonic() + patience
        self.check()
        while not self._number and time.monotonic() < end:
            time.sleep(0.2)
            self.check()

    def check(self) -> None:
        """Raises LeaseLost if another attempt owns the run."""
        if self.lost():
            raise LeaseLost(
                f"{self.run_folder} no longer belongs to this training: another process writes "
                "into it, or the folder was moved or deleted"
            )

    def check_free(self) -> None:
        """Raises UserError if another training writes into the folder.

        Waits a moment for one that was just killed: its lock ends with its last thread.
        """
        end = time.monotonic() + _ENDING
        while True:
            _, owner, alive = self._look()
            if not alive:
                return
            if time.monotonic() >= end:
                raise self._in_use(owner)
            time.sleep(0.1)

    def _in_use(self, owner: Owner | None) -> UserError:
        who = "whose lease is damaged"
        if owner is not None:
            job = f"job {printable(owner.job_id, 40)}, " if owner.job_id else ""
            who = (
                f"({job}process {owner.pid} on host {printable(owner.host, 80)}, since "
                f"{printable(owner.time, 40)})"
            )
        return UserError(
            f"OUTPUT_DIR {self.run_folder} is in use by a training {who}: wait, end it, or choose "
            "another OUTPUT_DIR"
        )

    def _look(self, watch: _Watch | None = None) -> tuple[int, Owner | None, bool | None]:
        """The newest lease, its owner, and whether it is alive (None if unknown yet)."""
        try:
            number = _newest_number(self.folder)
            owner = _read_owner(self._path(number))
            alive = self._is_alive(number, owner)
            if alive is None and watch is not None:
                alive = watch.is_alive(self._path(number))
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be read ({explain_os_error(error, self.folder)})"
            ) from error
        return number, owner, alive

    def _is_alive(self, number: int, owner: Owner | None) -> bool | None:
        """Whether the owner of a lease is alive; None if only its heartbeats can show it."""
        path = self._path(number)
        if not number or (path / _RELEASED).exists():
            return False
        if owner is not None and (
            owner.process == self.owner.process or owner.precedes(self.owner)
        ):
            return False
        if _is_locked(path):
            return True
        if owner is None:
            return False
        if owner.machine == self.owner.machine:
            # The lock has told of an owner that had one; a copied folder has no locks.
            return not owner.locked and process_start(owner.pid) == owner.process_start
        return None

    def take(self, patience: float = 0.0) -> None:
        """Takes the lease when its owner has ended.

        Args:
            patience: seconds to wait for that.

        Raises:
            UserError: if the owner is still alive, or the lease cannot be written.
            LeaseLost: if a later attempt of this job owns the run.
        """
        begun, watch = time.monotonic(), _Watch(self.silence)
        while True:
            number, owner, alive = self._look(watch)
            if owner is not None and self.owner.precedes(owner):
                raise LeaseLost(f"a later attempt of the job owns {self.run_folder}")
            if alive and time.monotonic() - begun >= patience:
                raise self._in_use(owner)
            if alive is False and self._create(number + 1):
                return
            if alive is not False:
                time.sleep(0.5)

    def _create(self, number: int) -> bool:
        """Creates the lease with a number; returns whether it succeeded before other processes."""
        own = self.folder / f"new-{uuid.uuid4().hex}"
        try:
            if os.path.lexists(self.folder) and not self.folder.is_dir():  # in this order
                set_aside(self.folder)
            own.mkdir(parents=True)
            # Never to be opened again by this process, which would drop the lock.
            lock = open(own / _LOCK, "wb")  # noqa: SIM115
            self.owner = replace(self.owner, locked=_lock(lock))
            (own / _OWNER).write_bytes(msgspec.json.encode(self.owner))
            taken = self._rename(own, number)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({explain_os_error(error, own)})"
            ) from error
        if not taken:
            lock.close()
            shutil.rmtree(own, ignore_errors=True)
            return False
        self._number, self._taken = number, _Taken(self._path(number), lock)
        self.writer = self.writer or f"lease{number}"
        threading.Thread(target=self._beat, name="contnet-lease", daemon=True).start()
        return True

    def _rename(self, own: Path, number: int) -> bool:
        try:
            os.rename(own, self._path(number))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
            # A file server that was asked twice says so of what it has done.
            return _read_owner(self._path(number)) == self.owner
        return True

    def _beat(self) -> None:
        taken = self._taken
        while not self._released.wait(_INTERVAL):
            with contextlib.suppress(OSError):  # the folder may fail for a while
                if not taken.is_there():
                    return
                os.utime(taken.path / _OWNER)
                # Has a network file system list the folder anew, which shows later leases.
                os.utime(self.folder)

    def release(self) -> None:
        """Releases the lease at a normal end, so the next process need not wait."""
        self._released.set()
        taken, self._taken = self._taken, None
        if taken is None:
            return
        with contextlib.suppress(OSError):  # the end of the process says the same
            if taken.is_there():
                (taken.path / _RELEASED).touch()
        taken.lock.close()
