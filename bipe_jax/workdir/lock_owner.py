"""What the lock of a run's directory says of the trainer that holds it."""

import os
import socket
import time
from typing import Any, cast

from bipe_jax.workdir import json_files
from bipe_jax.workdir.files import Path


def this_process(machine: str) -> dict[str, Any]:
    """The name of this process for a lock. No two are alike."""
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "machine": machine}
    return owner | {"since": str(time.time_ns())}


def parse(text: bytes) -> dict[str, Any] | None:
    """What a trainer has written that has not ended the lock; None if there is none."""
    if not text:
        return None
    try:
        value = json_files.parse(text)
    except ValueError:  # half of it
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def machine() -> str:
    """What tells this machine, since it was booted, from others: containers may share a host's name."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def refusal(workdir: Path, owner: dict[str, Any] | None) -> str:
    """The line for a trainer that finds another one at work."""
    pid, host = (owner or {}).get("pid"), (owner or {}).get("host")
    by = f"process {pid} on {host}" if pid and host else "another process"
    return (
        f"{os.fspath(workdir)} is being trained by {by}: wait for it, or stop it, or use another "
        "--workdir"
    )
