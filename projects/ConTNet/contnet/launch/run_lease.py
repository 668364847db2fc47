"""The lease of a run's folder: only the process that owns it may write into the folder.

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
# Seconds that the system may take to free the memory of a killed process.
_ENDING = 2.0
# Maximum number of bytes read from owner.json, which has a few hundred.
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
        """Whether this owner is an earlier attempt of the other owner's job."""
        if not self.job_id or self.attempt[:2] != other.attempt[:2]:
            return False
        # Without SLURM, job ids are process ids, which are only unique on one machine.
        comparable = self.cluster == "slurm" or self.machine == other.machine
        return comparable and self.restart < other.restart


def _open(path: Path) -> IO[bytes]:
    """Opens a file without blocking, because another user may have replaced it by a pipe."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def _newest_number(folder: Path) -> int:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(name) for name in names if _NUMBER.fullmatch(name)), default=0)


def _read_owner(path: Path) -> Owner | None:
    """Reads the owner of a lease; None if its file is damaged or missing.

    Raises:
        OSError: if the file cannot be read now, so that the owner is unknown.
    """
    try:
        with _open(path / _OWNER) as file:
            return msgspec.json.decode(file.read(_LONGEST), type=Owner)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _heartbeat(path: Path) -> int:
    """Returns a number that changes with each heartbeat; 0 if there is no owner file."""
    try:
        with _open(path / _OWNER) as file:  # opening makes a network file system ask its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a lease; False if locks are not visible."""
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
        """Whether the lease still exists, and its folder was not replaced."""
        try:
            return os.path.samestat(self._file, os.stat(self.path / _LOCK))
        except FileNotFoundError:
            return False


class _Watch:
    """Checks, with its own clock, whether an owner on another machine sends heartbeats.

    Args:
        silence: seconds without a heartbeat after which the owner is considered ended.
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
    """Returns owner and last heartbeat (Unix time) of a run's newest lease; None if none."""
    folder = Path(run_folder, LEASE_FOLDER)
    path = folder / f"{_newest_number(folder):06d}"
    owner = _read_owner(path)
    if owner is None:
        if path.exists():
            warn_once(f"{path / _OWNER} is damaged: it is ignored")
        return None
    return owner, _heartbeat(path) / 1e9


class RunLease(WriteGuard):
    """A guard that lets only the process with the newest lease write into a run's folder.

    A later attempt of a job takes the lease from an earlier attempt, which checks the lease before
    each file, and ends. The lease of another run is taken only after that run has ended. This is
    shown by its lock, by its process if it is on the same machine, and by missing heartbeats if it
    is on another machine, whose locks may not be visible. Clocks of machines are never compared.

    Args:
        run_folder: OUTPUT_DIR.
        cluster, job_id, restart: job of this process.

    Attributes:
        silence: seconds without a heartbeat after which another machine's owner has ended.
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
        self._number = 0  # number of this attempt's lease
        self._taken: _Taken | None = None  # the lease that this process has taken
        self._released = threading.Event()

    @classmethod
    def of(cls, run_folder: str | Path, env: DistributedEnvironment) -> RunLease:
        """Creates the lease for a process with this environment."""
        return cls(run_folder, env.cluster, env.job_id, env.restart)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def lost(self) -> bool:
        """Whether another attempt owns the run now, or this process's lease was removed."""
        taken = self._taken  # read first, as another thread may take a lease meanwhile
        number = _newest_number(self.folder)
        if taken is not None:
            # If the whole folder is missing, the next write reports it.
            return self.run_folder.is_dir() and (number != taken.number or not taken.is_there())
        if number <= self._number:
            return False
        owner = _read_owner(self._path(number))
        if owner is not None and owner.attempt == self.owner.attempt:
            self._number = number  # taken by rank 0
            return False
        return self._number > 0 or (owner is not None and self.owner.precedes(owner))

    def wait(self, patience: float) -> None:
        """Waits, on other ranks, until rank 0 has taken the lease, at most ``patience`` seconds.

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

        Waits a moment for a process that was just killed, whose lock ends with its last thread.
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
        """Returns the newest lease's number, its owner, and whether it is alive (None: unknown)."""
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
            # An owner with a lock is not alive without it, for example in a copied folder.
            return not owner.locked and process_start(owner.pid) == owner.process_start
        return None

    def take(self, patience: float = 0.0) -> None:
        """Takes the lease when its owner has ended.

        Args:
            patience: seconds to wait for the end of the owner.

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
        """Creates the lease with a number; returns False if another process was faster."""
        own = self.folder / f"new-{uuid.uuid4().hex}"
        try:
            # In this order, because another process may create the folder meanwhile.
            if os.path.lexists(self.folder) and not self.folder.is_dir():
                set_aside(self.folder)
            own.mkdir(parents=True)
            # This process must not open the file again, since closing it would drop the lock.
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
            # A file server that gets a request twice reports an error even if it succeeded.
            return _read_owner(self._path(number)) == self.owner
        return True

    def _beat(self) -> None:
        taken = self._taken
        while not self._released.wait(_INTERVAL):
            with contextlib.suppress(OSError):  # the file system may fail for a while
                if not taken.is_there():
                    return
                os.utime(taken.path / _OWNER)
                # Makes a network file system list the folder again, which shows later leases.
                os.utime(self.folder)

    def release(self) -> None:
        """Releases the lease at a normal end, so that the next process does not have to wait."""
        self._released.set()
        taken, self._taken = self._taken, None
        if taken is None:
            return
        with contextlib.suppress(OSError):  # the end of the process also releases it
            if taken.is_there():
                (taken.path / _RELEASED).touch()
        taken.lock.close()
