"""A run's directory: the names of its files, and what a run says of itself in them. Needs no JAX.

files, opening, bucket, appending: how they are written, locked and opened, on a disk or in a bucket.
trainer_lock: one trainer at a time. heartbeat, events, metrics: what a training writes while it runs.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from typing import Any, cast

from bipe_jax.errors import UserError
from bipe_jax.workdir import bucket, files, json_files, opening
from bipe_jax.workdir.files import Path

__all__ = ["COMMITTED", "Workdir", "complete_steps", "is_complete", "workdir_argument"]

COMMITTED = "commit_success.txt"  # what Orbax writes last of a checkpoint, where it cannot rename


class _Entry:
    """A file or directory of a Workdir: its path; of the class `Workdir` its name."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, workdir: "Workdir | None", _) -> str:
        return self._name if workdir is None else os.path.join(workdir.path, self._name)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The directory of a run, or one that results are written to: of a disk or, gs://…, in a bucket."""

    path: Path

    # Of a training.
    config = _Entry("config.json")  # of the last start that trained
    starts = _Entry("starts")  # a file a start that trained
    checkpoints = _Entry("checkpoints")  # a directory a step
    tokenizer = _Entry("tokenizer.model")  # if the run has trained one
    metrics = _Entry("metrics.jsonl")  # a line a step
    tensorboard = _Entry("tensorboard")
    wandb_id = _Entry("wandb_id")
    events = _Entry("events.jsonl")
    heartbeat = _Entry("heartbeat.json")
    profile = _Entry("profile")  # traces of some steps
    failed = _Entry("failed")  # the line of the user's error that ended the run
    trainer_lock = _Entry("trainer.lock")  # locked while a training runs; it names the process
    # Of evaluations.
    evaluation = _Entry("evaluation.json")  # of the latest step
    evaluations = _Entry("evaluations")  # STEP.json each, of evaluate --follow
    extrapolation = _Entry("extrapolation.png")
    answers = _Entry("answers.json")  # to examples, of the latest step
    tasks = _Entry("tasks.json")
    tasks_picture = _Entry("tasks.png")
    scrolls = _Entry("scrolls.json")
    attention = _Entry("attention.json")
    harness = _Entry("harness.json")
    report = _Entry("report.html")
    # Of launchers.
    point = _Entry("point.json")  # the config of a sweep's point, written before it begins
    log = _Entry("log.txt")  # what a run of a local sweep prints; it holds a lock on it
    running = _Entry("running")  # there while launch.worker has an attempt that has not ended well

    def start(self, number: int) -> str:
        """What a start trained with: its config and its provenance. They are numbered from 1."""
        return os.path.join(self.starts, f"{number}.json")

    def last_start(self) -> int:
        """The number of the last start that trained, or 0."""
        with contextlib.suppress(OSError):
            names = (name.removesuffix(".json") for name in files.names(self.starts))
            return max((int(name) for name in names if name.isdecimal()), default=0)
        return 0

    def restarts(self, host: str = "") -> str:
        """What launch.restart counts; of a host, where each decides for itself."""
        return os.path.join(self.path, f"restarts-{host}.json" if host else "restarts.json")

    def supervisor_lock(self, host: str = "") -> str:
        """Locked while the run has a supervisor or a trainer on this host. It is on a disk of that host."""
        name = f"supervisor-{host}.lock" if host else "supervisor.lock"
        if bucket.holds(self.path):
            digest = hashlib.sha256(files.absolute(self.path).encode()).hexdigest()[:16]
            return os.path.join(tempfile.gettempdir(), f"bipe_jax-{digest}-{name}")
        return os.path.join(self.path, name)

    def make(self, flag: str = "--workdir") -> None:
        """Makes the directory, and removes what killed writers left.

        Args:
          flag: that names the directory, for the message.

        Raises:
          UserError: it cannot be written to.
        """
        bucket.check(self.path, flag)
        probe = os.path.join(self.path, ".writable")
        try:
            files.make_directory(self.path)
            files.remove_unfinished(self.path)
            with files.replacing(probe):
                pass
            with contextlib.suppress(FileNotFoundError):  # another process of the run was quicker
                files.remove(probe)
        except OSError as error:
            raise UserError(
                f"{flag}={os.fspath(self.path)} is not writable: {error.strerror}"
            ) from None

    def read_config(self) -> dict[str, Any] | None:
        """What config.json holds, None without one. Raises UserError: it cannot be read."""
        try:
            config: Any = json_files.load(self.config)
            if not isinstance(config, dict):
                raise ValueError("it is no JSON object")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.config} cannot be read ({error}): use another --workdir"
            ) from None
        return cast(dict[str, Any], config)

    def latest_step(self) -> int | None:
        """Of the complete checkpoints; None without one."""
        return max(complete_steps(self.checkpoints), default=None)

    def write_failure(self, line: str) -> None:
        """Says why the run failed, for those who would start it again. No failure to write is raised."""
        with contextlib.suppress(OSError):
            files.set_aside_unless_file(self.failed)
            files.write_text(self.failed, f"{line}\n")

    def read_failure(self) -> str:
        """The line of the user's error that ended the run, or ""."""
        try:
            with opening.to_read(self.failed) as file:
                line = file.read().decode(errors="replace")
        except OSError:
            return ""
        return " ".join(line.split()) or "(no reason)"

    def forget_failure(self) -> None:
        """Removes what an earlier run failed of. Raises OSError: it cannot be removed."""
        files.set_aside_unless_file(self.failed)
        with contextlib.suppress(FileNotFoundError):
            files.remove(self.failed)


def complete_steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in a directory, in order; [] if it cannot be read."""
    try:
        names = files.names(directory)
        complete = [name for name in names if is_complete(os.path.join(directory, name))]
    except OSError:
        return []
    return sorted(map(int, complete))


def is_complete(path: Path) -> bool:
    """Whether a directory is a complete checkpoint of the step that is its name.

    Unfinished checkpoints, and those that were set aside, have names that are not numbers alone; other
    directories may be called as a step is. In a bucket an unfinished one has its name, but not COMMITTED.
    """
    name = os.path.basename(path)
    return (
        name.isdecimal()
        and name == str(int(name))
        and (not bucket.holds(path) or bucket.exists(os.path.join(path, COMMITTED)))
        and any(files.is_directory(os.path.join(path, item)) for item in ("params", "config"))
    )


def workdir_argument(arguments: Sequence[str]) -> str:
    """The value of --workdir=DIR or --workdir DIR, the last if there are several, or ""."""
    value = ""
    for word, following in itertools.pairwise([*arguments, ""]):
        name, equals, text = word.partition("=")
        if name in ("--workdir", "-workdir"):
            value = text if equals else following
    return value
