"""Keeps a trainer running on this machine: starts it, and restarts it until it is done.

python -m launch.supervise --workdir=W -- python -m bipe_jax.train --config=... --workdir=W

- When the trainer ends, `launch.restart` decides whether to restart it. The pause before a restart doubles
  while no new checkpoint appears.
- SIGTERM and SIGINT reach the trainer as SIGTERM, which makes it save; the supervisor then ends too.
- A trainer whose WORKDIR/heartbeat.json is stale, unchanged for --stale seconds while training, hangs: it is
  killed, and counts as dead. Starting, saving and evaluating may take six times as long.
- Each workdir and host has one supervisor: WORKDIR/supervisor.lock is locked while it or its trainer lives;
  of a workdir in a bucket, a file in the directory for temporary files.

On a slice of several hosts each has a supervisor with its own --host. When one host's trainer dies,
jax.distributed ends the others within a minute, and each supervisor restarts its own. The pause must be
longer than that minute, or the new process would meet the old run's coordinator.

With --log=FILE its output, and the trainer's, goes to the end of a file.

Exits with 0: all steps are done; 1: not to be restarted; 42: stopped after a save; 128 + N: stopped, and
killed by signal N before a save. It needs no JAX.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time

from bipe_jax import streams
from bipe_jax.errors import DONE, PREEMPTED, USER_ERROR, UserError
from bipe_jax.workdir import Workdir, bucket, files, heartbeat, opening, workdir_argument
from launch import restart

_LONGEST = 600.0  # seconds of a pause
_POLL = 0.2
_LOOKS = 5.0  # seconds between looks into a bucket, each of which is a request to be paid for
_PATIENCE = 6  # times --stale: phases other than training renew no heartbeat


class Supervisor:
    """Runs a trainer and restarts it.

    Attributes:
      pause: seconds before the first restart.
      stale: seconds without a new heartbeat after which a trainer hangs that was training.
      grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        command: list[str],
        workdir: str,
        host: str = "",
        pause: float = 5.0,
        stale: float = 600.0,
        grace: float = 300.0,
        log: str = "",
    ):
        self.command, self.workdir, self.host = command, workdir, host
        self.pause, self.stale, self.grace = pause, stale, grace
        self.log = log
        self.stopping = False

    def run(self) -> int:
        """Runs until the trainer is done or not to be restarted, or a signal stops it.

        Returns:
          The exit status.

        Raises:
          UserError: the run has another supervisor.
          OSError: the program does not exist, or the workdir is not writable.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        bucket.check(self.workdir, "--workdir")
        files.make_directory(self.workdir)
        path = Workdir(self.workdir).supervisor_lock(self.host)
        files.set_aside_unless_file(path)
        refusal = f"{self.workdir} has a supervisor, or its trainer, on this machine already"
        with files.locked(path, refusal) as lock:
            pause = self.pause
            while not self.stopping:
                step = Workdir(self.workdir).latest_step()
                code = self._train(lock)
                if self.stopping:
                    _log(f"stopping; the trainer ended with status {code}")
                    return code
                again, why = restart.decide(self.workdir, code, self.host)
                if not again:
                    _log(f"not restarting: {why}")
                    return DONE if code == DONE else USER_ERROR
                advanced = Workdir(self.workdir).latest_step() != step
                pause = self.pause if advanced else min(pause, _LONGEST)
                _log(f"restarting in {pause:g} s: {why}")
                self._sleep(pause)
                pause *= 2
        return PREEMPTED

    def _stop(self, number, _) -> None:
        self.stopping = True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stopping:
            time.sleep(_POLL)

    def _train(self, lock: int) -> int:
        """Runs the trainer once. Returns its exit status, 128 + N for signal N."""
        # In a session of its own Ctrl-C does not reach it besides our SIGTERM. It inherits the lock: if the
        # supervisor is killed, the trainer that remains keeps another from starting a second one.
        trainer = subprocess.Popen(self.command, start_new_session=True, pass_fds=(lock,))
        beat, beat_at, killed_at = heartbeat.read(self.workdir), time.monotonic(), None
        pause = _LOOKS if bucket.holds(self.workdir) else 0.0
        look_at = beat_at + pause
        while trainer.poll() is None:
            now = time.monotonic()
            # Compared with the previous heartbeat, since the clocks of hosts differ.
            if now >= look_at:
                look_at = now + pause
                if (latest := heartbeat.read(self.workdir)) != beat:
                    beat, beat_at = latest, now
            if killed_at is None:
                hangs = now - beat_at > self._limit(beat)
                if hangs:
                    _log(f"no heartbeat for {now - beat_at:.0f} s: the trainer hangs, killing it")
                if hangs or self.stopping:
                    trainer.terminate()
                    killed_at = now
            elif now - killed_at > self.grace:
                _log(f"the trainer did not end within {self.grace:g} s of SIGTERM: SIGKILL")
                killed_at = float("inf")
                _kill(trainer.pid)
            time.sleep(_POLL)
        _kill(trainer.pid)  # remaining child processes, such as data workers
        self._copy_log()
        code = trainer.returncode
        return code if code >= 0 else 128 - code

    def _copy_log(self) -> None:
        """Copies the log so far into the bucket, if it belongs there: the machine may go away."""
        if not bucket.holds(self.log):
            return
        try:
            with open(log_file(self.log), "rb") as file:
                bucket.write(self.log, file.read())
        except OSError as error:
            _log(f"{self.log} cannot be written: {error.strerror}")

    def _limit(self, beat: dict | None) -> float:
        """Seconds after which an unchanged heartbeat is stale."""
        training = beat is not None and beat["phase"] == heartbeat.TRAINING
        return self.stale if training else self.stale * _PATIENCE


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def log_file(path: str) -> str:
    """The file that a log is appended to: of one in a bucket, a file of this machine that is copied there."""
    if not bucket.holds(path):
        return path
    return os.path.join(tempfile.gettempdir(), f"bipe_jax-{os.path.basename(path)}")


def _log_to(path: str) -> None:
    """Appends standard output and error to a file from now on. Raises OSError."""
    path = log_file(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    files.set_aside_unless_file(path)
    with open(path, "ab", opener=opening.not_through_a_link) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def _log(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The parser of the flags before `--`."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.supervise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--host", default="", help="name of this host, of several")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before the first restart")
    parser.add_argument(
        "--stale", type=float, default=600.0, help="seconds without a heartbeat while training"
    )
    parser.add_argument("--log", default="", help="file that all output is appended to")
    parser.add_argument("--grace", type=float, default=300.0, help="seconds from TERM to KILL")
    return parser


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own = parser()
    args = own.parse_args(arguments[:split])
    command = arguments[split + 1 :]
    if not command:
        own.error("-- and the trainer's command are needed")
    named = workdir_argument(command)
    same = named and os.path.realpath(named) == os.path.realpath(args.workdir)
    if "bipe_jax.train" in command and not same:
        # A user's error that the trainer records elsewhere, or nowhere, would be repeated for ever.
        own.error(f"the trainer's command must have --workdir={args.workdir} too")
    if args.log:
        try:
            _log_to(args.log)
        except OSError as error:
            _log(f"{args.log} cannot be written ({error.strerror}): logging here")
    supervisor = Supervisor(
        command, args.workdir, args.host, args.pause, args.stale, args.grace, args.log
    )
    try:
        return supervisor.run()
    except (UserError, OSError) as error:
        _log(str(error))
        return USER_ERROR


if __name__ == "__main__":
    streams.harden()
    sys.exit(main())
