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

from bipe_jax import streams
from bipe_jax.errors import DONE, PREEMPTED, USER_ERROR
from bipe_jax.workdir import heartbeat, workdir_argument

_SERVICE = "bipe_jax"
_UNIT = "../bipe_jax.service"  # as it is in /etc/systemd/system
_WRONG_CALL = 2  # of launch.supervise, as of any argparse program
_LOCAL_DISKS = ("btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs")


def unit(workdir: str, arguments: list[str], hosts: int) -> str:
    """The service that supervises `python -m bipe_jax.train ARGUMENTS` on this host."""
    # Longer than the other hosts need to detect a death: see launch/supervise.py.
    pause = 90 if hosts > 1 else 5
    name = [f"--host={socket.gethostname()}"] if hosts > 1 else []
    python = [sys.executable, "-m"]
    line = [*python, "launch.supervise", f"--workdir={workdir}", *name, f"--pause={pause}"]
    line += ["--", *python, "bipe_jax.train", *arguments]
    return f"""\
[Unit]
Description={workdir.replace("%", "%%")}: training of bipe_jax
Wants=network-online.target
After=network-online.target remote-fs.target
RequiresMountsFor={_quoted(workdir)}

[Service]
User={getpass.getuser()}
WorkingDirectory={os.getcwd().replace("%", "%%")}
Environment=PYTHONUNBUFFERED=1
ExecStart={" ".join(_quoted(word) for word in line)}
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


def start(workdir: str, arguments: list[str], commit: str, hosts: int, shared: bool) -> str:
    """Starts the service unless it runs. Returns a message.

    Raises:
      ValueError: the service would not run as requested.
    """
    with open("../commit", encoding="utf-8") as file:
        here = file.read().strip()
    if here != commit:
        raise ValueError(f"has commit {here[:12]}, not {commit[:12]}: bootstrap it again")
    os.makedirs(workdir, exist_ok=True)
    if shared and (kind := filesystem(workdir)) in _LOCAL_DISKS:
        raise ValueError(
            f"{workdir} is on a disk of this VM ({kind}): several hosts need a shared file system, and a "
            "spot slice one that outlives it (bootstrap --nfs=SERVER:/EXPORT mounts one)"
        )
    wanted = unit(workdir, arguments, hosts)
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


def progress() -> str:
    """The run's heartbeat.json as text."""
    try:
        with open(_UNIT, encoding="utf-8") as file:
            command = next(line for line in file if line.startswith("ExecStart="))
    except (OSError, StopIteration):
        return "no heartbeat yet"
    workdir = workdir_argument(shlex.split(command.removeprefix("ExecStart=")))
    beat = heartbeat.read(workdir.replace("%%", "%").replace("$$", "$"))
    if beat is None:
        return "no heartbeat yet"
    return f"step {beat['step']}, {beat['phase']}, {heartbeat.age(beat):.0f} s ago"


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch.tpu_vm.worker")
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("--workdir")
    parser.add_argument("--commit")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument(
        "--shared", action="store_true", help="the workdir must not be on a disk of the VM"
    )
    args = parser.parse_args(arguments[:split])
    try:
        if args.action == "start":
            rest = arguments[split + 1 :]
            message = start(args.workdir, rest, args.commit, args.hosts, args.shared)
        else:
            message = stop() if args.action == "stop" else progress()
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
