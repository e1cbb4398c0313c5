"""Provenance: which code, versions, command and machine a result comes from."""

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

_SECONDS = 5.0  # that git may take in all
_DISTRIBUTIONS = (
    "bipe-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "libtpu",
)


def record() -> dict[str, Any]:
    """The provenance of what this process computes, of JSON's types (docs/reference/observing.md).

    It never fails, and waits for git for some seconds at most. JAX must have joined the other processes.
    """
    return {
        "time": time.time(),
        **_code(_SECONDS),
        "versions": _versions(),
        "command": _command(),
        "machine": {
            "host": socket.gethostname(),
            "platform": jax.default_backend(),
            "device_kind": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def shared(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance for files that are published: without the command, which has paths, and the host."""
    machine = {name: of for name, of in recorded.get("machine", {}).items() if name != "host"}
    known = {name: recorded.get(name) for name in ("time", "commit", "clean", "versions")}
    return {**known, "machine": machine}


def _commit(seconds: float, directory: str = os.path.dirname(__file__)) -> dict[str, Any]:
    """{"commit", "clean"} of the git checkout that the files of a package belong to.

    `clean` is whether the checkout has no changes, and no files that git neither has nor ignores; None if
    that takes too long.

    Raises:
      OSError, subprocess.SubprocessError: they belong to none; there is no git; it takes too long.
    """
    until = time.monotonic() + seconds
    # Those of a hook that started this process are about another repository.
    variables = {name: v for name, v in os.environ.items() if not name.startswith("GIT_")}
    variables["GIT_OPTIONAL_LOCKS"] = "0"  # the checkout is only read

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", directory, "-c", "core.fsmonitor=false", *words],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=max(until - time.monotonic(), 0),
            check=True,
        )
        return done.stdout.decode(errors="replace").strip()

    # An installed package may lie within another project's checkout, which ignores it.
    git("ls-files", "--error-unmatch", "__init__.py")
    commit = git("rev-parse", "HEAD")
    try:
        return {"commit": commit, "clean": not git("status", "--porcelain")}
    except subprocess.TimeoutExpired:
        return {"commit": commit, "clean": None}


def _code(seconds: float) -> dict[str, Any]:
    """What `_commit(seconds)` returns; None each if it fails, or does not end."""
    known: dict[str, Any] = {"commit": None, "clean": None}

    def work() -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            known.update(_commit(seconds))

    # A git that hangs on a file system cannot be killed, and its end must not be waited for.
    thread = threading.Thread(target=work, daemon=True, name="provenance")
    thread.start()
    thread.join(seconds + 1)
    return dict(known)


def _versions() -> dict[str, str]:
    """Name -> version, of Python and of the installed packages that compute."""
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _command() -> list[str]:
    """The command line of this process.

    Of another program than this package's commands only its name: its arguments may hold secrets. Those
    of this package's commands hold none; they refuse flags that they do not know.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None or spec.name.partition(".")[0] != __package__:
        return sys.argv[:1]
    return [sys.executable, "-m", spec.name, *sys.argv[1:]]
