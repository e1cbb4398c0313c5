"""A real SLURM on this host: munged, slurmctld and a slurmd for each of the nodes n0 to n3.

    python tests/slurm_cluster.py    # starts it, says how to use it, and stops it at Ctrl-C

Needs root and Debian's slurm-wlm, slurm-client and munge (22.05, which is built with multiple slurmd);
services of theirs that are running are left alone. All files are in a new directory under /tmp. Only
/etc/hosts is touched: it gets a line with the nodes' names, which is removed again.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

NODES = ("n0", "n1", "n2", "n3")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
_HOSTS = Path("/etc/hosts")
# Four "GPUs" a node, which are devices that any machine has: enough to see what is asked for, and given.
_GPUS = "/dev/null,/dev/zero,/dev/full,/dev/random"

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/finished
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=500000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=60
KillWait=15
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=40 OverTimeLimit=0
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; "" if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm slurm-client munge)"
    return "" if os.geteuid() == 0 else "slurmd wants to be root"


class Cluster:
    """Starts when it is entered and stops when it is left.

    Attributes:
      directory: of its configuration and logs.
      environment: in which sbatch, squeue and the like find it.
      crashes: a line for each slurmd that ended by itself. It is started again, as by systemd.
    """

    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="slurm."))
        self.environment = os.environ | {
            "SLURM_CONF": f"{self.directory}/slurm.conf",
            "PATH": _PATH,
        }
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]
        self.crashes = []
        self._daemons = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        try:
            self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self._stack.enter_context(_named_nodes())
            self._stack.callback(self._stop)
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _start(self):
        self.directory.chmod(0o755)
        for name in ("munge", "state", *(f"spool/{node}" for node in NODES)):
            (self.directory / name).mkdir(parents=True)
        key = self.directory / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname()
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 "
            "RealMemory=2000 Gres=gpu:4"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        text = _CONF.format(
            host=host, port=ports[0], directory=self.directory, nodes="\n".join(nodes)
        )
        (self.directory / "slurm.conf").write_text(text)
        (self.directory / "cgroup.conf").write_text("")
        gpus = "\n".join(f"Name=gpu File={device}" for device in _GPUS.split(","))
        (self.directory / "gres.conf").write_text(gpus + "\n")

        munge = self.directory / "munge"
        self._daemon("munged", "--foreground", f"--key-file={key}", f"--socket={munge}/socket",
                     f"--pid-file={munge}/pid", f"--log-file={munge}/log",
                     f"--seed-file={munge}/seed")  # fmt: skip
        wait(lambda: (munge / "socket").exists(), 20, "munged made no socket")
        self._daemon("slurmctld", "-D", "-c", "-i")
        for node in NODES:
            self.start_node(node)
        wait(lambda: len(self.nodes("idle")) == len(NODES), 60, "the nodes did not come up")
        supervisor = threading.Thread(target=self._supervise)
        supervisor.start()
        self._stack.callback(supervisor.join)
        self._stack.callback(self._stopping.set)

    def _supervise(self):
        while not self._stopping.wait(0.5):
            with self._lock:
                ended = [
                    n for n in NODES if n in self._daemons and self._daemons[n].poll() is not None
                ]
                for node in ended:
                    logged = _read(f"{self.directory}/slurmd.{node}.log").splitlines()[-5:]
                    status = self._daemons[node].returncode
                    self.crashes.append(f"slurmd of {node} ended with status {status}: {logged}")
                    self.start_node(node)

    def _daemon(self, program, *arguments, name=None):
        name = name or program
        with open(self.directory / f"{name}.err", "a") as log:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(program, path=_PATH), *arguments],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.directory,  # where a core of it goes
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """All that runs on the node gets SIGKILL at once: it has lost its power."""
        with self._lock:
            self._daemons.pop(node).kill()
        _kill(self._of_jobs(node))

    def nodes(self, state: str) -> list[str]:
        shown = self.run("sinfo", "-h", "-N", "-o", "%N", f"--states={state}", "-p", "low").stdout
        return sorted(set(shown.split()))

    def run(self, *command, **kwargs) -> subprocess.CompletedProcess:
        """A command that finds this cluster, with its output."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, **kwargs
        )

    def job(self, number) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        shown = self.run("scontrol", "show", "job", "-o", str(number)).stdout
        pairs = [pair.partition("=") for pair in shown.split() if "=" in pair]
        return {name: value for name, _, value in pairs}

    def _of_jobs(self, node: str = "") -> list[int]:
        """Processes of jobs: on one node, or on all."""
        steps, tasks = set(), set()
        for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
            environment = _read(f"/proc/{pid}/environ").split("\0")
            if f"SLURM_CONF={self.directory}/slurm.conf" not in environment:
                continue
            if _is_step(pid):
                steps.add(pid)
            elif any(pair.startswith(f"SLURMD_NODENAME={node}") for pair in environment):
                tasks.add(pid)
        if node:  # a step does not say where it is
            steps &= {_parent(pid) for pid in tasks}
        return [*steps, *tasks]

    def _stop(self):
        for name in ("slurmctld", *NODES, "munged"):  # the first could start what the others lose
            if daemon := self._daemons.pop(name, None):
                daemon.kill()
                daemon.wait()
        _kill(self._of_jobs())


def wait(condition, seconds: float, complaint: str):
    """What the condition returns as soon as that is true.

    Raises:
      TimeoutError: the complaint, if it was not for so long.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{complaint} within {seconds:g} s")
        time.sleep(0.2)
    return value


@contextlib.contextmanager
def _named_nodes():
    """The nodes' names lead to this host, as JAX's coordinator is found by its node's name."""
    mark = "# tests/slurm_cluster.py"
    line = f"127.0.0.1 {' '.join(NODES)} {mark} {os.getpid()}\n"
    names = set()
    for other in _HOSTS.read_text().splitlines(keepends=True):
        entry, marked, process = other.partition(mark)
        if not marked:
            names.update(entry.partition("#")[0].split()[1:])
        elif not Path(f"/proc/{process.strip()}").exists():  # it was killed
            _without(other)
    if names.issuperset(NODES):
        yield
        return
    print(f"adding to {_HOSTS}: {line}", end="", file=sys.stderr)
    with _HOSTS.open("a") as file:
        file.write(line)
    try:
        yield
    finally:
        _without(line)


def _without(line: str) -> None:
    _HOSTS.write_text(_HOSTS.read_text().replace(line, ""))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _is_step(pid: int) -> bool:
    return "slurmstepd" in _read(f"/proc/{pid}/cmdline")


def _parent(pid: int) -> int:
    lines = _read(f"/proc/{pid}/status").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("PPid:")), 0)


def _kill(pids) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main():
    if reason := missing():
        sys.exit(reason)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    with Cluster() as cluster:
        print(f"export SLURM_CONF={cluster.directory}/slurm.conf", flush=True)
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
