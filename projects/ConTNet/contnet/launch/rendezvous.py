"""Connects the processes of a run under SLURM and submitit's local executor.

Ports are derived from the job id, and not searched for on the submitting machine.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore

from contnet.launch.environment import DistributedEnvironment
from contnet.utils.errors import UserError

__all__ = ["ports", "rendezvous"]

# These are below the ports that Linux assigns automatically, which start at 32768.
_FIRST_PORT, _NUM_PORTS, _TRIES = 20000, 12000, 16
_GREETING = "contnet"


def ports(attempt: str) -> list[int]:
    """Returns the ports that rank 0 tries, in order; they depend only on job and step."""
    job, step = attempt.split(".")[:2]
    first = int(job) * 37 + int(step) * 7919
    return [_FIRST_PORT + (first + 1009 * k) % _NUM_PORTS for k in range(_TRIES)]


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _serve(server: socket.socket, answer: bytes) -> None:
    """Answers connections as long as this process lives."""
    while True:
        connection, _ = server.accept()
        with contextlib.suppress(OSError), connection:
            connection.sendall(answer)


def _open_store(env: DistributedEnvironment) -> TCPStore:
    """On rank 0: opens the store, and answers on the first free port with the store's port."""
    for port in ports(env.attempt):
        try:
            server = _listen(port)
        except OSError:
            continue
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        answer = f"{_GREETING} {env.attempt} {store.port}\n".encode()
        threading.Thread(target=_serve, args=(server, answer), daemon=True).start()
        return store
    raise UserError(f"all of the ports {ports(env.attempt)} of {socket.gethostname()} are in use")


def _find_store(env: DistributedEnvironment, port: int, answer_timeout: float) -> TCPStore:
    """On the other ranks: finds the store of the server that answers with this attempt's name."""
    with socket.create_connection((env.host, port), timeout=answer_timeout) as connection:
        words = connection.makefile().readline(200).split()
    if words[:2] != [_GREETING, env.attempt]:
        raise ConnectionError(f"port {port} is used by another program")
    return TCPStore(env.host, int(words[2]), is_master=False, wait_for_workers=False)


def rendezvous(
    env: DistributedEnvironment,
    join_timeout: float = 600.0,
    timeout: float = 1800.0,
    answer_timeout: float = 3.0,
) -> TCPStore:
    """Returns a store that all processes of this attempt share.

    Rank 0 answers on the first free port of a list that is derived from the job id; the other
    ranks try the ports until one answers with the name of their attempt.

    Args:
        env: environment of this process, under SLURM or the local executor.
        join_timeout: seconds to look for rank 0, because nodes do not start together.
        timeout: timeout of the store's later operations, in seconds.
        answer_timeout: seconds to wait for an answer before the next port is tried.

    Raises:
        UserError: if rank 0 is not found, or all of its ports are in use.
    """
    if env.rank == 0:
        store = _open_store(env)
        store.set_timeout(timedelta(seconds=timeout))
        return store
    deadline = time.monotonic() + join_timeout
    reason = ""
    while time.monotonic() < deadline:
        for port in ports(env.attempt):
            try:
                store = _find_store(env, port, answer_timeout)
            except (OSError, ValueError, DistError) as error:
                reason = str(error).partition("\n")[0]
                continue
            store.set_timeout(timedelta(seconds=timeout))
            return store
        time.sleep(0.2)
    raise UserError(
        f"rank {env.rank} on {socket.gethostname()} found no rank 0 on {env.host}, ports "
        f"{ports(env.attempt)}, in {join_timeout:.0f} s ({reason}): check that the name resolves, "
        "that no firewall blocks the ports, and that rank 0 has started"
    )
