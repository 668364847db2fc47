"""A private SLURM cluster of two virtual nodes on this machine, for tests.

Everything is in one folder, and any user can start a cluster; several can run side by side. A
guardian process stops the cluster when the process that started it is gone.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["NODES", "Cluster", "free_ports", "running_cluster", "why_no_slurm"]

# Loopback addresses, so that names resolve without /etc/hosts.
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel", "munged")

_CONF = """\
ClusterName=contnet
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is the delay of a requeue, 120 s by default, but also the time to launch a step.
AuthInfo=socket={root}/run/munge.socket,cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
ReturnToService=2
MinJobAge=86400
SlurmdTimeout=10
KillWait=5
# Off, as is SLURM's default: our jobs ask for it.
KillOnBadExit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} {size}
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} {size}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
"""
_SIZE = "CPUs=8 RealMemory=16000 Gres=gpu:2"

# Without a database, sacct fails; this script answers submitit's queries.
_SACCT = """\
#!/bin/sh
echo "JobID|State|NodeList"
while [ $# -gt 0 ]; do
  case "$1" in
    -j) shift; squeue --noheader --states=all --jobs="$1" --format='%i|%T|%N' 2>/dev/null;;
  esac
  shift
done
exit 0
"""


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def why_no_slurm() -> str:
    """Returns why no cluster can be started here; "" if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if not missing:
        return ""
    return (
        f"SLURM is not installed, there is no {', '.join(missing)}: as root, apt-get install "
        "--no-install-recommends slurmctld slurmd slurm-client munge"
    )


def free_ports(number: int) -> list[int]:
    """Returns free ports of this machine."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]


def _pid(file: Path) -> int:
    """Returns a daemon's process id; 0 if it is not running."""
    try:
        pid = int(file.read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return 0
    return pid


def _wait(seconds: float, done) -> bool:
    end = time.monotonic() + seconds
    while not (answer := done()) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(answer)


class Cluster:
    """The cluster with files in ``root``, whose path must be short because it has a socket."""

    def __init__(self, root: Path):
        self.root = root
        self.conf = root / "etc" / "slurm.conf"
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            "PATH": f"{root}/bin:{_path()}",
        }
        self._guardian = None

    def ask(self, *command: str, check: bool = True, patience: float = 60) -> str:
        """Returns the output of one of SLURM's commands."""
        answer = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=patience
        )
        if check and answer.returncode:
            raise RuntimeError(f"{' '.join(command)}: {answer.stderr.strip()}")
        return answer.stdout.strip()

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle."""
        self._write()
        self._guardian = subprocess.Popen(
            [sys.executable, __file__, str(self.root), str(os.getpid())], start_new_session=True
        )
        self.ask(
            "munged",
            f"--socket={self.root}/run/munge.socket",
            f"--key-file={self.root}/munge/munge.key",
            f"--pid-file={self.root}/run/munged.pid",
            f"--log-file={self.root}/log/munged.log",
            f"--seed-file={self.root}/munge/munged.seed",
        )
        self.ask("slurmctld")
        for node in NODES:
            self.start_node(node)

    def _write(self) -> None:
        for name in ("etc", "run", "log", "state", "bin", "munge", *(f"spool/{n}" for n in NODES)):
            (self.root / name).mkdir(parents=True)
        for name in ("", "run"):  # munged requires this
            (self.root / name).chmod(0o755)
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        user = self.ask("id", "-un")
        self.conf.write_text(
            _CONF.format(
                host=socket.gethostname().split(".")[0],
                ports=free_ports(3),
                # Folders of an earlier cluster's jobs may still exist.
                first_job=1000 + (int(time.time()) + 977 * os.getpid()) % 1000000,
                user=user,
                root=self.root,
                nodes=NODES,
                size=_SIZE,
            )
        )
        # A GPU is any device file.
        (self.root / "etc" / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
        (self.root / "bin" / "sacct").write_text(_SACCT)
        (self.root / "bin" / "sacct").chmod(0o755)

    def start_node(self, node: str) -> None:
        """Starts a node's daemon, also after :meth:`fail_node`; waits until the node is idle."""
        self.ask("slurmd", "-N", node)
        if not _wait(60, lambda: self.node_state(node) == "idle"):
            log = (self.root / "log" / f"slurmd.{node}.log").read_text()[-2000:]
            raise RuntimeError(f"node {node} is {self.node_state(node)}\n{log}")

    def node_state(self, node: str) -> str:
        return self.ask("sinfo", "-hN", "-pmain", f"-n{node}", "-o%t", check=False)

    def processes(self, node: str = "", job: str = "") -> list[int]:
        """Returns the processes of this cluster's daemons: batch scripts, tasks and their children.

        Args:
            node: only processes of this node.
            job: only processes of this job, by its SLURM_JOB_ID.
        """
        signs = [f"SLURM_CONF={self.conf}", "SLURM_JOB_ID=" + job, "SLURMD_NODENAME=" + node]
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                values = path.read_bytes().decode(errors="replace").split("\0")
                exact = [sign in values for sign in signs[:1]]
                for sign, wanted in zip(signs[1:], (job, node), strict=True):
                    exact.append(any(v == sign if wanted else v.startswith(sign) for v in values))
                if all(exact):
                    found.append(int(path.parent.name))
        return found

    def tasks(self, job: str) -> dict[int, int]:
        """Returns the process of each rank of a job's step."""
        found = {}
        for pid in self.processes(job=job):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                values = dict(v.split(b"=", 1) for v in environment if b"=" in v)
                parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
                of_slurm = "slurmstepd" in Path(f"/proc/{parent}/comm").read_text()
                if of_slurm and b"SLURM_STEP_ID" in values:
                    found[int(values[b"SLURM_PROCID"])] = pid
        return found

    def kill_daemon(self, node: str) -> None:
        """Kills only the node's slurmd, so that SLURM loses contact to the running processes."""
        pid = _pid(self.root / "run" / f"slurmd.{node}.pid")
        os.kill(pid, signal.SIGKILL)
        _wait(5, lambda: not Path(f"/proc/{pid}").exists())

    def fail_node(self, node: str) -> None:
        """Kills everything on a node at once, like a power failure."""
        pids = self.processes(node=node)
        parents = set()
        for pid in pids:
            with contextlib.suppress(OSError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text():
                    parents.add(parent)
        self.kill_daemon(node)
        for pid in (*parents, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends jobs and daemons; may be called again."""
        if self._guardian is not None:
            self._guardian.terminate()
            self._guardian.wait(timeout=60)
            self._guardian = None

    def shut_down(self) -> None:
        """Stops the cluster; called by the guardian."""
        run = self.root / "run"
        self.ask("scancel", f"--user={os.getuid()}", check=False)
        _wait(10, lambda: not self.ask("squeue", "-h", check=False))
        daemons = [*run.glob("slurmd.*.pid"), run / "slurmctld.pid", run / "munged.pid"]
        pids = [pid for pid in map(_pid, daemons) if pid]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            _wait(5, lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def running_cluster(root: Path) -> Iterator[Cluster]:
    """Provides a cluster within the context."""
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _guard(root: Path, parent: int) -> None:
    """Waits until the process that started the cluster asks to stop it, or ends."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while not asked and os.getppid() == parent:
        time.sleep(0.2)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Cluster(root).shut_down()


if __name__ == "__main__":
    _guard(Path(sys.argv[1]), int(sys.argv[2]))
