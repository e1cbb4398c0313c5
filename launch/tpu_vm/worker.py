"""Actions on each TPU VM: start the supervisor as a systemd service, stop it, show its state.

It runs in ~/bipe_jax/source, which bootstrap.sh made. Each action prints one line, "bipe_jax HOST STATE
MESSAGE", which the launcher reads; the state "error" may be temporary, "refused" is not.

systemd passes a shutdown, at preemption and maintenance, on to a service as SIGTERM, and restarts the service
when the VM is back. It needs no JAX.
"""

import argparse
import getpass
import os
import shlex
import socket
import subprocess
import sys
import time

from bipe_jax import streams
from bipe_jax.errors import DONE, PREEMPTED, USER_ERROR
from bipe_jax.workdir import Workdir, bucket, files, heartbeat, workdir_argument
from launch.supervise import log_file

_SERVICE = "bipe_jax"
_UNIT = "../bipe_jax.service"  # as it is in /etc/systemd/system
_ENVIRONMENT = "../../bipe_jax.environment"  # which the launcher copies to the home directory
_ACTIONS = ("start", "stop", "restart", "status", "summary", "logs")
_WAIT = 0.1  # seconds between looks for a checkpoint
_WRONG_CALL = 2  # of launch.supervise, as of any argparse program
_LOCAL_DISKS = ("btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs")


def log_of(workdir: str) -> str:
    """What a run prints on this host: in the workdir, since the VM's own disk goes with the VM."""
    return os.path.join(workdir, f"log-{socket.gethostname()}.txt")


def unit(workdir: str, arguments: list[str], hosts: int, environment: str = "") -> str:
    """The service that supervises `python -m bipe_jax.train ARGUMENTS` on this host.

    Args:
      environment: a file with variables for it, or "".
    """
    # Longer than the other hosts need to detect a death: see launch/supervise.py.
    pause = 90 if hosts > 1 else 5
    name = [f"--host={socket.gethostname()}"] if hosts > 1 else []
    python = [sys.executable, "-m"]
    line = [*python, "launch.supervise", f"--workdir={workdir}", *name, f"--pause={pause}"]
    line += [f"--log={log_of(workdir)}", "--", *python, "bipe_jax.train", *arguments]
    variables = f"EnvironmentFile={environment.replace('%', '%%')}\n" if environment else ""
    # JAX would ask the metadata server how many hosts there are, and coordinate the only one.
    alone = "" if hosts > 1 else "Environment=JAX_NUM_PROCESSES=1\n"
    mounts = "" if bucket.holds(workdir) else f"RequiresMountsFor={_quoted(workdir)}\n"
    return f"""\
[Unit]
Description={workdir.replace("%", "%%")}: training of bipe_jax
Wants=network-online.target
After=network-online.target remote-fs.target
{mounts}
[Service]
User={getpass.getuser()}
WorkingDirectory={os.getcwd().replace("%", "%%")}
Environment=PYTHONUNBUFFERED=1
{alone}{variables}ExecStart={" ".join(_quoted(word) for word in line)}
# SIGTERM goes to the supervisor alone, which passes it on and waits until the trainer has saved.
KillMode=mixed
KillSignal=SIGTERM
TimeoutStopSec=330
# The supervisor restarts the trainer; this is for its own death. {USER_ERROR}: not to be restarted.
Restart=on-failure
RestartSec={pause}
RestartPreventExitStatus={USER_ERROR} {_WRONG_CALL}
SuccessExitStatus={PREEMPTED}
LimitMEMLOCK=infinity
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
"""


def _quoted(word: str) -> str:
    """A word of a command, quoted for systemd."""
    for character, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(character, escaped)
    return f'"{word}"'


def state() -> str:
    """The service's state: nothing, running, done, stopped (from outside) or failed (given up)."""
    asked = "LoadState,ActiveState,ExecMainStatus,ExecMainStartTimestampMonotonic"
    line = ["systemctl", "show", _SERVICE, "-p", asked]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    rows = (row.partition("=") for row in shown.splitlines())
    properties = {name: value for name, _, value in rows}
    if properties.get("LoadState") != "loaded":
        return "nothing"
    if properties["ActiveState"] not in ("inactive", "failed"):
        return "running"
    if properties["ExecMainStartTimestampMonotonic"] == "0":
        return "stopped"  # before the VM was rebooted
    ended = {DONE: "done", USER_ERROR: "failed", _WRONG_CALL: "failed"}
    # Preempted, or killed before a save.
    return ended.get(int(properties["ExecMainStatus"]), "stopped")


def filesystem(path: str, mounts: str = "/proc/mounts") -> str:
    """The type of a path's file system, such as ext4 or nfs4."""
    with open(mounts, encoding="utf-8") as file:
        fields = [line.split() for line in file]
    path = os.path.realpath(path) + "/"
    under = [(len(at), kind) for _, at, kind, *_ in fields if path.startswith(at.rstrip("/") + "/")]
    return max(under, default=(0, "unknown"), key=lambda pair: pair[0])[1]


def check_deadline(resource: str, zone: str) -> None:
    """Checks that launch/tpu_vm/deadline.sh has set the deadline, and may ask for the queued resource.

    Raises:
      OSError: the deadline is not set, perhaps not yet. ValueError: this VM's account may not ask.
    """
    line = ["systemctl", "is-active", "--quiet", "bipe_jax_deadline.timer"]
    if subprocess.run(line).returncode:
        raise OSError("no deadline is set: was the slice created with --max-hours?")
    line = ["gcloud", "compute", "tpus", "queued-resources", "describe", resource, f"--zone={zone}"]
    done = subprocess.run([*line, "--quiet"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ValueError(
            "the VM could not delete the slice at its deadline: give its service account the role TPU "
            f"Admin ({reason})"
        )


def start(
    workdir: str, arguments: list[str], commit: str, hosts: int, shared: bool, environment: bool
) -> str:
    """Starts the service unless it runs. Returns a message.

    Args:
      environment: whether the launcher has sent a file with variables.

    Raises:
      ValueError: the service would not run as requested.
    """
    with open("../commit", encoding="utf-8") as file:
        here = file.read().strip()
    if here != commit:
        raise ValueError(f"has commit {here[:12]}, not {commit[:12]}: bootstrap it again")
    files.make_directory(workdir)
    if shared and not bucket.holds(workdir) and (kind := filesystem(workdir)) in _LOCAL_DISKS:
        raise ValueError(
            f"{workdir} is on a disk of this VM ({kind}): several hosts need a shared file system, and a "
            "spot slice one that outlives it (bootstrap --nfs=SERVER:/EXPORT mounts one)"
        )
    variables = os.path.abspath(_ENVIRONMENT) if environment else ""
    if variables:
        os.chmod(variables, 0o600)
    wanted = unit(workdir, arguments, hosts, variables)
    if state() == "running":
        with open(_UNIT, encoding="utf-8") as file:
            if file.read() != wanted:
                raise ValueError("another run exists: stop it first")
        return "it runs already"
    with open(_UNIT, "w", encoding="utf-8") as file:
        file.write(wanted)
    for command in (
        ["cp", _UNIT, "/etc/systemd/system"],
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", _SERVICE],
        ["systemctl", "restart", "--no-block", _SERVICE],
    ):
        subprocess.run(["sudo", *command], check=True)
    return "started"


def stop() -> str:
    """Stops and disables the service, and waits until it has saved. Returns a message."""
    if state() == "nothing":
        return "there was no service"
    subprocess.run(["sudo", "systemctl", "disable", _SERVICE], check=True)
    subprocess.run(["sudo", "systemctl", "stop", _SERVICE], check=True)
    return "stopped"


def restart(step: int) -> str:
    """Stops the run once it has a checkpoint of a step, and starts it again, as after a preemption.

    Raises:
      ValueError: it ended before.
    """
    run = Workdir(_workdir())
    while (run.latest_step() or 0) < step:
        if state() != "running":
            raise ValueError(f"the run ended before step {step}: it was not restarted")
        time.sleep(_WAIT)
    if state() != "running":
        raise ValueError("the run ended too early to be restarted")
    subprocess.run(["sudo", "systemctl", "restart", _SERVICE], check=True)
    return f"restarted at step {run.latest_step()}"


def summary() -> str:
    """The last checkpoint of the run, and how many starts trained it."""
    run = Workdir(_workdir())
    return f"step {run.latest_step() or 0} in {run.last_start()} starts"


def _workdir() -> str:
    """The workdir of the service, or ""."""
    try:
        with open(_UNIT, encoding="utf-8") as file:
            command = next(line for line in file if line.startswith("ExecStart="))
    except (OSError, StopIteration):
        return ""
    workdir = workdir_argument(shlex.split(command.removeprefix("ExecStart=")))
    return workdir.replace("%%", "%").replace("$$", "$")


def show_log(follow: bool) -> None:
    """Becomes a program that shows the end of the run's output, or of the service's without a run."""
    words = ["--follow"] * follow
    if workdir := _workdir():
        os.execvp("tail", ["tail", "--lines=200", *words, log_file(log_of(workdir))])
    line = ["sudo", "journalctl", f"--unit={_SERVICE}", "--no-pager", "--lines=200", "--output=cat"]
    os.execvp(line[0], [*line, *words])


def progress() -> str:
    """The run's heartbeat.json as text."""
    workdir = _workdir()
    beat = heartbeat.read(workdir) if workdir else None
    if beat is None:
        return "no heartbeat yet"
    return f"step {beat['step']}, {beat['phase']}, {heartbeat.age(beat):.0f} s ago"


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch.tpu_vm.worker")
    parser.add_argument("action", choices=_ACTIONS)
    parser.add_argument("--workdir")
    parser.add_argument("--commit")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument(
        "--shared", action="store_true", help="the workdir must not be on a disk of the VM"
    )
    parser.add_argument("--deadline", default="", help="RESOURCE:ZONE, whose deadline is checked")
    parser.add_argument("--step", type=int, default=0, help="restart: after its checkpoint")
    parser.add_argument("--environment", action="store_true", help="variables have been sent")
    parser.add_argument("--follow", action="store_true", help="keep printing")
    args = parser.parse_args(arguments[:split])
    try:
        if args.action == "logs":
            show_log(args.follow)
        if args.action == "restart":
            message = restart(args.step)
        elif args.action == "start":
            if args.deadline:
                check_deadline(*args.deadline.split(":"))
            rest = arguments[split + 1 :]
            message = start(
                args.workdir, rest, args.commit, args.hosts, args.shared, args.environment
            )
        else:
            message = {"stop": stop, "status": progress, "summary": summary}[args.action]()
        now = state()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        kind = "refused" if isinstance(error, ValueError) else "error"
        print(f"bipe_jax {socket.gethostname()} {kind} {error}", flush=True)
        return 1
    print(f"bipe_jax {socket.gethostname()} {now} {message}", flush=True)
    return 0


if __name__ == "__main__":
    streams.harden()
    sys.exit(main())
