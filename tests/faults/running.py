"""A training of one process or several, and the supervisor that starts it again."""

import contextlib
import os
import shutil
import signal
import socket
import time

from bipe_jax import cli
from bipe_jax.train import main as train
from bipe_jax.training import failures
from launch import restart
from tests.faults import forks, setting

NOTICED = 60  # seconds after which the others have noticed that a process is gone
_HANGS = 240  # seconds that a run takes at most
_POLL = 0.001
_MOMENTS = ("start", "steps", "steps", "saving", "saving", "named", "deleting", "evaluation", "any")


class Lost(Exception):
    """What a run has lost, or did that it should not."""


class Run:
    """A run in DIRECTORY/run; what its processes print is in DIRECTORY/log.START.PROCESS."""

    def __init__(self, root: str, directory: str, processes: int, environment: dict | None = None):
        self._root, self.directory, self._processes = root, directory, processes
        self.environment = environment or {}
        self.workdir = os.path.join(directory, "run")
        self._data = root
        self._usual = 10.0  # seconds that a run takes which nothing disturbs
        with contextlib.suppress(FileNotFoundError), open(_seconds(root, processes)) as file:
            self._usual = float(file.read())
        self.running: dict[int, int] = {}  # process id -> number
        self.starts = 0
        self.story: list[str] = []
        self._codes: list[int] = []
        os.makedirs(directory, exist_ok=True)

    def start(self) -> None:
        """Starts all processes."""
        assert not self.running
        self.starts += 1
        self._codes = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        argv = [
            f"--workdir={self.workdir}",
            *setting.arguments(self._root, self._processes, self._data),
        ]

        def main():
            with cli.user_errors(), failures.recorded(self.workdir):
                train(argv)

        for number in range(self._processes):
            several = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(self._processes),
                "JAX_PROCESS_ID": str(number),
            }
            environment = self.environment | (several if self._processes > 1 else {})
            pid = forks.fork(main, self._log(number), environment)
            self.running[pid] = number

    def own_data(self) -> str:
        """A copy of the shards for this run alone. Returns their directory."""
        self._data = os.path.join(self.directory, "data")
        return shutil.copytree(f"{self._root}/train", f"{self._data}/train")

    def on_disk(self) -> str:
        """A directory that the workdir will be in."""
        disk = os.path.join(self.directory, "disk")
        os.makedirs(disk)
        self.workdir = os.path.join(disk, "run")
        return disk

    def _log(self, number: int) -> str:
        return os.path.join(self.directory, f"log.{self.starts}.{number}")

    def printed(self) -> str:
        """What the processes of the last start have printed."""
        texts = []
        for number in range(self._processes):
            with open(self._log(number), errors="replace") as file:
                texts.append(file.read())
        return "\n".join(texts)

    def signal(self, kind: int, numbers=None) -> None:
        """To all processes that run, or those of some numbers."""
        if not self.running:
            self.story.append("it had ended")
        for pid, number in self.running.items():
            if numbers is None or number in numbers:
                os.kill(pid, kind)

    def poll(self) -> bool:
        """Whether all processes run."""
        for pid in list(self.running):
            if (code := forks.ended(pid)) is not None:
                del self.running[pid]
                self._codes.append(code)
        return len(self.running) == self._processes

    def wait(self, until, limit: float = _HANGS) -> bool:
        """Waits until `until()`, or until a process has ended. Returns whether it was the former."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if until():
                return True
            if not self.poll():
                return False
            time.sleep(_POLL)
        stacks = self._stacks()
        self.stop()
        raise Lost(
            f"it hangs (start {self.starts}), where {self.lines()} steps are logged\n{stacks}"
        )

    def _stacks(self) -> str:
        """Where the main threads of the processes are, which lie last in their logs."""
        self.signal(forks.STACKS)
        time.sleep(1)
        parts = []
        for number in self.running.values():
            with open(self._log(number), errors="replace") as file:
                _, _, main_thread = file.read().rpartition("(most recent call first):")
            parts.append(f"process {number}:{main_thread.rstrip()}")
        return "\n".join(parts)

    def sleep(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        return self.wait(lambda: time.monotonic() >= end)

    def ended(self) -> int:
        """Waits until all have ended: what a supervisor of several does. Returns the exit code.

        When one has ended with an error, the others have a minute to notice before they are killed.
        """
        self.wait(lambda: False)
        end = time.monotonic() + (NOTICED + 5 if any(self._codes) else _HANGS)
        while self.running:
            self.poll()
            if time.monotonic() > end:
                numbers = list(self.running.values())
                self.stop()
                raise Lost(f"process {numbers} did not notice that another had ended")
            time.sleep(0.01)
        code = next((code for code in self._codes if code), 0)
        if code == 1:
            printed = self.printed()
            errors = [line for line in printed.splitlines() if line.startswith("error: ")]
            if "Traceback" in printed or not errors:
                raise Lost("it ended with status 1 and not with one line")
            self.story.append(f"[{errors[0][:300]}]")
        return code

    def stop(self) -> None:
        """Kills what runs."""
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
        while self.running:
            self.poll()
            time.sleep(0.01)

    def again(self, code: int) -> None:
        """Asks the rule, which must say yes."""
        again, why = restart.decide(self.workdir, code)
        if not again:
            raise Lost(f"it was not started again: {why}")

    def finish(self) -> None:
        """Runs on, started again by the rule, until all steps are done."""
        while self.starts < 15:
            if not self.running:
                self.start()
            if not (code := self.ended()):
                return
            self.again(code)
        raise Lost(f"it was started {self.starts} times")

    # Moments.

    def lines(self) -> int:
        """Steps that metrics.jsonl has."""
        with contextlib.suppress(OSError), open(f"{self.workdir}/metrics.jsonl", "rb") as file:
            return file.read().count(b"\n")
        return 0

    def saved(self) -> list[int]:
        """Steps of the checkpoints that have their names."""
        return sorted(int(name) for name in self._names() if name.isdecimal())

    def _names(self) -> list[str]:
        with contextlib.suppress(OSError):
            return os.listdir(f"{self.workdir}/checkpoints")
        return []

    def reach(self, random, moments=_MOMENTS) -> bool:
        """Waits for a moment that is drawn. Returns whether all processes still run."""
        moment, seen = random.choice(moments), set(self._names())
        at = max(self.saved(), default=0)

        def appears(kind):
            def until():
                new = {name for name in self._names() if kind(name)} - seen
                seen.update(new)
                return any(random.random() < 0.3 for _ in new)

            return until

        if moment == "start":
            reached = self.sleep(random.uniform(0, 0.4 * self._usual))
        elif moment == "any":
            reached = self.sleep(random.uniform(0, self._usual))
        elif moment == "steps":
            step = random.randint(min(at + 1, setting.STEPS - 1), setting.STEPS - 1)
            reached = self.wait(lambda: self.lines() >= step)
            reached = reached and self.sleep(random.uniform(0, 0.02))
        elif moment == "saving":
            reached = self.wait(appears(lambda name: "tmp" in name))
            reached = reached and self.sleep(random.choice((0, 0.01, 0.1)) * random.random())
        elif moment == "named":
            reached = self.wait(appears(str.isdecimal))
        elif moment == "deleting":
            reached = self.wait(appears(lambda name: name.endswith(".deleted")))
        else:
            reached = self.wait(lambda: setting.STEPS in self.saved())
            reached = reached and self.sleep(random.uniform(0, 0.3 * self._usual))
        self.story.append(f"{moment}: {self.lines()} steps, saved {self.saved()}")
        return reached


def undisturbed(root: str, processes: int) -> None:
    """The run that others are compared with, in ROOT/whole.PROCESSES."""
    run = Run(root, os.path.join(root, f"whole.{processes}"), processes)
    begun = time.monotonic()
    run.start()
    if code := run.ended():
        raise Lost(
            f"the undisturbed run of {processes} processes ended with {code}: {run.directory}"
        )
    with open(_seconds(root, processes), "w") as file:
        file.write(str(time.monotonic() - begun))


def _seconds(root: str, processes: int) -> str:
    return os.path.join(root, f"whole.{processes}", "seconds")
