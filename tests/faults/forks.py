"""Starts training runs in one second instead of six, by forks of a process that imports once.

The server only imports the package. A child has its own session and runs the ``main`` of
train_net.py until the interpreter ends, like the script.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ForkServer", "Forked"]


class Forked:
    """A training run that the server has forked.

    Args:
        pid: id of the process and of its session.
        output: file with its output and errors; its status is written beside it.
    """

    def __init__(self, pid: int, output: Path):
        self.pid = pid
        self._status = Path(f"{output}.{pid}")

    def poll(self) -> int | None:
        """Returns the exit status as in subprocess.Popen; None while the process runs."""
        return int(self._status.read_text()) if self._status.exists() else None


class ForkServer:
    """Client of the server, which ends with this process."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, argv: Sequence[str], output: Path) -> Forked:
        """Starts a training run with a command line."""
        request = {"argv": list(argv), "output": str(output)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()), output)


def _reap(outputs: dict[int, str]) -> None:
    """Records the exit status of each child that has ended."""
    while outputs:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        path = Path(f"{outputs.pop(pid)}.{pid}")
        path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
        path.with_suffix(".new").rename(path)


def _become(output: str, argv: list[str]) -> None:
    """Sets up a forked process as a shell would."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(output, "ab") as file, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train_net.py", *argv]


def _serve() -> int:
    import torch.utils.tensorboard  # noqa: F401, imported by training

    from contnet.launch.main import main

    outputs: dict[int, str] = {}
    signal.signal(signal.SIGCHLD, lambda *_: _reap(outputs))
    for line in sys.stdin:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if not pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            _become(request["output"], request["argv"])
            return main(request["argv"])
        outputs[pid] = request["output"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        print(pid, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_serve())
