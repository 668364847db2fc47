"""Which process of which run this one is, and how the processes of a run find each other.

torchrun, SLURM's srun (with or without submitit) and submitit's local executor each start all
processes themselves and say in environment variables who is who. Nothing else is asked for: no
``scontrol``, and no free port on the machine that submits.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from contnet.utils.errors import UserError

__all__ = ["Place", "find_place", "first_host", "meet", "ports"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_LOCAL = ("SUBMITIT_LOCAL_JOB_ID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_GLOBALID")
# Ports that Linux gives out by itself start above these.
_FIRST_PORT, _NUM_PORTS, _TRIES = 20000, 12000, 16
_GREETING = "contnet"
# How long a port may stay silent before the next one is tried, in seconds.
_ANSWER_TIMEOUT = 3.0


@dataclass(frozen=True)
class Place:
    """One process among those of a run.

    Attributes:
        launcher: what started it: "torchrun", "slurm" or "local".
        rank, world_size: of all processes.
        local_rank, local_size: of those on this machine.
        host: name of rank 0's machine; "" under torchrun, which brings its own meeting point.
        start: names this start of the run, as no other start is named.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    host: str = ""
    start: str = ""


def _need(environ: Mapping[str, str], names: tuple[str, ...], sign: str) -> list[str]:
    if missing := [name for name in names if name not in environ]:
        raise UserError(
            f"{sign} is set, but {', '.join(missing)} is not: unset {sign}, or set all of "
            f"{', '.join(names)}"
        )
    return [environ[name] for name in names]


def first_host(nodes: str) -> str:
    """The first of a list in SLURM's notation, such as ``gpu[07-09,12],login1``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no machine")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _torchrun(environ: Mapping[str, str]) -> Place:
    values = _need(environ, _TORCHRUN, "RANK")
    rank, world_size, local_rank, local_size = map(int, values[:4])
    return Place("torchrun", rank, world_size, local_rank, local_size)


def _slurm(environ: Mapping[str, str]) -> Place | None:
    sign = "SLURM_STEP_ID" if "SLURM_STEP_ID" in environ else "SLURM_STEP_NUM_TASKS"
    job, step, tasks, nodes, per_node, rank, local_rank = _need(environ, _SLURM, sign)
    rank, world_size, local_rank = int(rank), int(tasks), int(local_rank)
    if world_size == 1:  # also a shell that was opened by srun
        return None
    sizes = {int(size) for size in re.findall(r"(\d+)(?:\(x\d+\))?", per_node)}
    if len(sizes) > 1:
        raise UserError(
            f"SLURM placed {per_node} tasks per node: ask for the same number on each, by "
            "--ntasks-per-node"
        )
    (local_size,) = sizes
    if local_rank != rank % local_size:
        raise UserError(
            "SLURM dealt the tasks out to the nodes in turn: start them with --distribution=block"
        )
    start = f"{job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    # Two clusters may count the same jobs on the same machines; srun's port is one of their steps.
    if srun := environ.get("SLURM_STEP_LAUNCHER_PORT"):
        start += f".{srun}"
    return Place("slurm", rank, world_size, local_rank, local_size, first_host(nodes), start)


def _local(environ: Mapping[str, str]) -> Place | None:
    job, tasks, rank = _need(environ, _LOCAL, "SUBMITIT_EXECUTOR local")
    if tasks == "1":
        return None
    # The executor's process is the parent of all tasks, and a restart has the same parent: what
    # an earlier start left behind has ended before the next one begins.
    rank, tasks = int(rank), int(tasks)
    return Place("local", rank, tasks, rank, tasks, "127.0.0.1", f"{job}.0.0")


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place; None where nothing has started several.

    A shell inside an allocation (salloc, or ``srun --pty``) is such a place, too: what is typed
    there starts its own processes.

    Raises:
        UserError: if some of the variables are missing, or the tasks are spread in a way that
            Detectron2's local process groups do not know.
    """
    if "RANK" in environ:
        return _torchrun(environ)
    if environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_JOB_ID" in environ:
        return _local(environ)
    if "SLURM_STEP_ID" in environ or "SLURM_STEP_NUM_TASKS" in environ:
        return _slurm(environ)
    return None


def ports(start: str) -> list[int]:
    """Where rank 0 of a start may listen, first choice first; a function of job and step alone."""
    job, step = start.split(".")[:2]
    first = int(job) * 37 + int(step) * 7919
    return [_FIRST_PORT + (first + 1009 * k) % _NUM_PORTS for k in range(_TRIES)]


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _serve(server: socket.socket, answer: bytes) -> None:
    """Tells all who ask, as long as this process lives."""
    while True:
        connection, _ = server.accept()
        with contextlib.suppress(OSError), connection:
            connection.sendall(answer)


def _open_store(place: Place) -> TCPStore:
    """Rank 0: answers on the first port that nobody else has where the store is."""
    for port in ports(place.start):
        try:
            server = _listen(port)
        except OSError:
            continue
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        answer = f"{_GREETING} {place.start} {store.port}\n".encode()
        threading.Thread(target=_serve, args=(server, answer), daemon=True).start()
        return store
    raise UserError(f"all of the ports {ports(place.start)} of {socket.gethostname()} are taken")


def _find_store(place: Place, port: int) -> TCPStore:
    """The other ranks: what does not answer by the name of this very start is something else."""
    with socket.create_connection((place.host, port), timeout=_ANSWER_TIMEOUT) as connection:
        words = connection.makefile().readline(200).split()
    if words[:2] != [_GREETING, place.start]:
        raise ConnectionError(f"port {port} is something else's")
    return TCPStore(place.host, int(words[2]), is_master=False, wait_for_workers=False)


def meet(place: Place, patience: float = 600.0, timeout: float = 1800.0) -> TCPStore:
    """A store that all processes of this start share, on a port that they agree on.

    Rank 0 answers on the first free port of a list that follows from the job's number; the others
    go through the list until they are answered by the name of their start.

    Args:
        place: under SLURM or the local executor.
        patience: how long to look for rank 0, in seconds: nodes do not start together.
        timeout: of the store's later operations, in seconds.

    Raises:
        UserError: if it cannot be found.
    """
    if place.rank == 0:
        store = _open_store(place)
        store.set_timeout(timedelta(seconds=timeout))
        return store
    deadline = time.monotonic() + patience
    reason = ""
    while time.monotonic() < deadline:
        for port in ports(place.start):
            try:
                store = _find_store(place, port)
            except (OSError, ValueError, DistError) as error:
                reason = str(error).partition("\n")[0]
                continue
            store.set_timeout(timedelta(seconds=timeout))
            return store
        time.sleep(0.2)
    raise UserError(
        f"rank {place.rank} on {socket.gethostname()} found no rank 0 on {place.host}, ports "
        f"{ports(place.start)}, in {patience:.0f} s ({reason}): does the name resolve, does a "
        "firewall stand between the nodes, did rank 0 start?"
    )
