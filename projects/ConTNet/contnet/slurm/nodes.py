"""The resources of SLURM's nodes, and checks that they are enough for a job."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contnet.slurm.client import ask_slurm
from contnet.slurm.settings import ClusterSettings
from contnet.utils.errors import UserError

__all__ = ["Node", "check_request", "check_shared", "is_one_machine", "read_nodes"]

_PRIVATE_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_PRIVATE_TYPES = {"tmpfs", "ramfs", "devtmpfs"}


@dataclass
class Node:
    """A node, as a member of one of its partitions.

    Attributes:
        partition: name of the partition.
        default: whether it is the default partition.
        up: whether the partition accepts jobs.
        gpus: number of GPUs by type; the type is "" if they have none.
        cpus: number of cores, or of threads if SLURM counts those.
        memory_gb: memory in GB.
        limit_hours: time limit of jobs in hours; infinity if there is none.
        name: the node's name in SLURM.
        host: the machine's host name.
    """

    partition: str
    default: bool
    up: bool
    gpus: dict[str, int]
    cpus: int
    memory_gb: float
    limit_hours: float
    name: str
    host: str

    def count_gpus(self, kind: str = "") -> int:
        """Returns the number of GPUs of a type, or of all types."""
        return self.gpus.get(kind, 0) if kind else sum(self.gpus.values())


def _hours(text: str) -> float:
    """Parses SLURM's [days-]hours:minutes:seconds, whose first parts may be missing."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", text):
        return float("inf")
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":") if part]
    if days:
        parts += [0] * (3 - len(parts))
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + part
    return int(days or 0) * 24 + seconds / 3600


def _number(text: str) -> float:
    digits = re.match(r"\d+", text)
    return float(digits.group()) if digits else 0.0


def read_nodes() -> list[Node]:
    """Reads all nodes of all partitions from sinfo.

    Raises:
        UserError: if SLURM does not respond, or shows no nodes.
    """
    nodes = []
    answer = ask_slurm("sinfo", "--noheader", "--Node", "--format=%P|%a|%G|%c|%m|%l|%N|%n")
    for line in answer.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 8:
            continue
        partition, state, gres, cpus, memory, limit, name, host = parts
        gpus: dict[str, int] = {}
        for kind, count in re.findall(r"\bgpu(?::([^:,()]+))?:(\d+)(?!\w)", gres):
            gpus[kind] = gpus.get(kind, 0) + int(count)
        nodes.append(
            Node(
                partition=partition.removesuffix("*"),
                default=partition.endswith("*"),
                up=state == "up",
                gpus=gpus,
                cpus=int(_number(cpus)),
                memory_gb=_number(memory) / 1024,
                limit_hours=_hours(limit),
                name=name,
                host=host,
            )
        )
    if not nodes:
        raise UserError("sinfo shows no nodes that you may use")
    return nodes


def _choose(nodes: Sequence[Node], settings: ClusterSettings) -> list[Node]:
    """Returns the nodes of the requested partitions, or of the default one."""
    known = list(dict.fromkeys(node.partition for node in nodes))
    wanted = [name for name in settings.partition.split(",") if name]
    wanted = wanted or [node.partition for node in nodes if node.default]
    if not wanted:
        raise UserError(
            f"this cluster has no default partition: add --partition, one of {', '.join(known)}"
        )
    for name in wanted:
        if name not in known:
            raise UserError(f"there is no partition {name}, only {', '.join(known)}")
    chosen = [node for node in nodes if node.partition in wanted]
    if not any(node.up for node in chosen):
        raise UserError(f"partition {wanted[0]} accepts no jobs now (sinfo shows it as not up)")
    return chosen


def _gpus(count: int, kind: str) -> str:
    return f"{count} {kind + ' ' if kind else ''}GPU{'s' if count != 1 else ''}"


def check_request(
    nodes: Sequence[Node], settings: ClusterSettings, num_nodes: int, num_gpus: int, tasks: int
) -> list[Node]:
    """Checks that the cluster has the resources that a job requests.

    Args:
        nodes: from :func:`read_nodes`.
        settings: partition, GPU type, memory, cores and time.
        num_nodes: number of nodes.
        num_gpus: GPUs per node, 0 for a job on CPUs.
        tasks: processes per node.

    Returns:
        The nodes that the job may run on.

    Raises:
        UserError: if the partitions lack the resources, or the time limit is missing.
    """
    chosen = _choose(nodes, settings)
    kind = settings.gpu_type
    if num_gpus and not (fit := [n for n in chosen if n.count_gpus(kind) >= num_gpus]):
        most = max(node.count_gpus(kind) for node in chosen)
        others = {n.partition for n in nodes if n.count_gpus(kind) >= num_gpus}
        hint = f"; partition {', '.join(sorted(others))} has" if others else ""
        raise UserError(
            f"no node of partition {chosen[0].partition} has {_gpus(num_gpus, kind)}, at most "
            f"{most}{hint}"
        )
    fit = [n for n in chosen if n.count_gpus(kind) >= num_gpus] if num_gpus else chosen
    cpus = tasks * (settings.cpus_per_gpu or 1)
    if not any(node.cpus >= cpus for node in fit):
        raise UserError(
            f"{tasks} processes x --cpus-per-gpu {settings.cpus_per_gpu or 1} are {cpus} cores; "
            f"the nodes of partition {chosen[0].partition} have at most {max(n.cpus for n in fit)}"
        )
    if not any(node.memory_gb >= settings.mem_gb for node in fit):
        raise UserError(
            f"--mem-gb {settings.mem_gb:g}: the nodes of partition {chosen[0].partition} have at "
            f"most {max(n.memory_gb for n in fit):.0f} GB"
        )
    fit = [n for n in fit if n.cpus >= cpus and n.memory_gb >= settings.mem_gb]
    names = {node.name for node in fit}
    if len(names) < num_nodes:
        what = f"with {_gpus(num_gpus, kind)} " if num_gpus else ""
        raise UserError(
            f"--num-nodes is {num_nodes}, but partition {chosen[0].partition} has {len(names)} "
            f"node{'s' if len(names) != 1 else ''} {what}that fit"
        )
    limit = max(node.limit_hours for node in fit)
    if not settings.timeout_hours:
        allowed = (
            f" (partition {chosen[0].partition} allows up to {limit:g})" if limit < 1e9 else ""
        )
        raise UserError(
            f"how long may the job run? Add --timeout-hours{allowed}; a job that has not finished "
            "by then saves and is requeued"
        )
    if settings.timeout_hours > limit:
        raise UserError(
            f"--timeout-hours is {settings.timeout_hours:g}, but partition {chosen[0].partition} "
            f"allows {limit:g}; a job that has not finished by then saves and is requeued"
        )
    return fit


def is_one_machine(nodes: Sequence[Node]) -> bool:
    """Whether all nodes are this machine, so that they see its folders."""
    here = socket.gethostname().partition(".")[0]
    return {node.host.partition(".")[0] for node in nodes} == {here}


def _file_system(path: Path) -> tuple[str, str]:
    """Returns the mount point of a path, and the type of its file system."""
    best = ("/", "")
    for line in Path("/proc/mounts").read_text(errors="surrogateescape").splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best


def check_shared(path: str | Path, what: str) -> None:
    """Raises UserError if a path is known to be visible only on this machine."""
    real = Path(path).resolve()
    point, kind = _file_system(real)
    private = next((each for each in _PRIVATE_FOLDERS if real.is_relative_to(each)), None)
    if private or kind in _PRIVATE_TYPES:
        where = f"under {private}" if private else f"on {point}, a {kind}"
        raise UserError(
            f"{what} {path} is {where}, which is local to each node: choose a folder that all "
            "nodes share, or add --assume-shared if they share this one"
        )
