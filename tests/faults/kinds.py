"""The faults. Each does its harm to a run that has not been started, and leaves it to be finished.

A fault gets a `Run` and a random generator. When it returns, the harness starts the run again, if it
does not run, by the rule of all supervisors, until all steps are done.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

from bipe_jax.checkpoint import checksums
from bipe_jax.errors import PREEMPTED
from launch import restart
from tests.faults import forks, setting
from tests.faults.running import NOTICED, Lost

_GRACE = 20  # seconds from SIGTERM to the end
_DISK = 6_000_000  # bytes


def kill(run, random):
    run.start()
    run.reach(random)
    run.signal(signal.SIGKILL)


def kill_compiling(run, random):
    """While what is compiled is written to the cache of compiled programs."""
    run.environment["JAX_COMPILATION_CACHE_DIR"] = os.path.join(run.directory, "cache")
    run.start()
    run.reach(random, ("any",))
    run.signal(signal.SIGKILL)


def term(run, random):
    run.start()
    run.reach(random)
    _terminate(run, None)


def _terminate(run, numbers) -> int:
    steps, begun, some = run.lines(), time.monotonic(), bool(run.running)
    run.signal(signal.SIGTERM, numbers)
    code = run.ended()
    took = time.monotonic() - begun
    if some and code not in (0, PREEMPTED, -signal.SIGTERM):
        raise Lost(f"it ended with {code} at SIGTERM")
    if code == PREEMPTED and max(run.saved(), default=0) < steps:
        raise Lost(f"at SIGTERM it had done {steps} steps and saved {run.saved()}")
    if code == PREEMPTED and took > _GRACE:
        raise Lost(f"it took {took:.0f} s to stop at SIGTERM")
    if code == -signal.SIGTERM and steps:
        raise Lost(f"SIGTERM ended it after {steps} steps, without a save")
    if code:
        run.again(code)
    return code


def several(run, random):
    """SIGKILL and SIGTERM, some in a row."""
    for _ in range(random.randint(2, 4)):
        run.start()
        run.reach(random)
        if random.random() < 0.5:
            code = _terminate(run, None)
        else:
            run.signal(signal.SIGKILL)
            if code := run.ended():
                run.again(code)
        if not code:
            return


@contextlib.contextmanager
def _disk(run):
    """Yields (fill, free): a small disk of its own for the run, or a limit on the size of its files."""
    disk = run.on_disk()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", disk], capture_output=True
    ).returncode:
        limit = resource.RLIMIT_FSIZE

        def set_limit(size):
            for pid in run.running:
                resource.prlimit(pid, limit, (size, resource.RLIM_INFINITY))

        yield set_limit, lambda: set_limit(resource.RLIM_INFINITY)
        return
    filler = os.path.join(disk, "filler")

    def fill(left):
        free = os.statvfs(disk)
        with open(filler, "wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - left, 1))

    try:
        yield fill, lambda: os.remove(filler)
    finally:
        # Its content goes on beside it, since the disk ends with the fault.
        run.stop()
        kept = disk + ".kept"
        shutil.copytree(disk, kept, ignore=shutil.ignore_patterns("filler"))
        subprocess.run(["umount", disk], check=True)
        os.rmdir(disk)
        os.rename(kept, disk)


def full_then_free(run, random):
    """A disk without room, for some seconds."""
    with _disk(run) as (fill, free):
        run.start()
        run.reach(random, ("steps", "saving", "named"))
        fill(random.choice((0, 0, 50_000, 300_000)))
        run.sleep(random.uniform(0.5, 8))
        free()
        run.finish()
        run.story.append(f"started {run.starts} times")


def full(run, random):
    """A disk without room, until the run has ended and a person has made some."""
    with _disk(run) as (fill, free):
        run.start()
        run.reach(random, ("steps", "saving", "named"))
        saved = run.saved()
        fill(random.choice((0, 0, 50_000, 300_000)))
        code = run.ended()
        _intact(run, saved)
        if code:
            again, why = restart.decide(run.workdir, code)
            run.story.append(f"again: {again}, {why}")
        free()
        run.finish()


def _intact(run, saved):
    """Of the checkpoints that were there, the last must still be, and all that are must be good."""
    left = run.saved()
    if saved and max(left, default=0) < max(saved):
        raise Lost(f"of the checkpoints {saved}, {left} are left")
    _good(run)


def _good(run):
    """All checkpoints must be what was written."""

    def check():
        for step in run.saved():
            if problems := checksums.verify(f"{run.workdir}/checkpoints/{step}"):
                sys.exit(f"checkpoint {step}: {problems[0]}")

    if forks.call(check, f"{run.directory}/check"):
        with open(f"{run.directory}/check") as file:
            raise Lost(file.read())


def read_only(run, random):
    """A workdir that cannot be written to any more, until the run has ended."""
    run.start()
    run.reach(random, ("steps", "saving", "named"))
    folders = [path for path in (run.workdir, f"{run.workdir}/checkpoints") if os.path.isdir(path)]
    subprocess.run(["chattr", "+i", *folders], check=True)
    try:
        saved = run.saved()
        code = run.ended()
        _intact(run, saved)
        if code:
            again, why = restart.decide(run.workdir, code)
            run.story.append(f"again: {again}, {why}")
    finally:
        run.stop()
        subprocess.run(["chattr", "-i", *folders], check=True)


def vanished(run, random):
    """A workdir that is gone, as when a network's disk is; it comes back when the run has ended."""
    run.start()
    run.wait(lambda: os.path.isdir(run.workdir))
    run.reach(random, ("start", "steps", "saving", "named"))
    away = run.workdir + ".away"
    os.rename(run.workdir, away)
    if not run.ended():
        return  # it was so early that the run has made it itself
    again, why = restart.decide(run.workdir, 1)
    if again:
        raise Lost(f"another run would begin in its place: {why}")
    if os.path.exists(run.workdir):
        # Orbax makes it anew, when it vanishes during a save: then nothing half-written may lie there.
        left = [path for path, *_ in os.walk(run.workdir) if "orbax-checkpoint-tmp" in path]
        run.story.append(f"made anew, saved {run.saved()}")
        _good(run)
        if left:
            raise Lost(f"the workdir was gone, and in its place lies {left[0]}")
        os.rename(run.workdir, run.workdir + ".anew")
    os.rename(away, run.workdir)


def peer_killed(run, random):
    run.start()
    run.reach(random)
    _lose_peer(run, random, signal.SIGKILL)


def peer_stopped(run, random):
    """SIGSTOP: it is there, and does nothing."""
    run.start()
    run.reach(random)
    _lose_peer(run, random, signal.SIGSTOP)


def _lose_peer(run, random, kind):
    lost = random.choice((0, 1))
    begun = time.monotonic()
    run.signal(kind, {lost})
    run.story.append(f"process {lost}")
    while list(run.running.values()) not in ([lost], []):
        run.poll()
        if time.monotonic() - begun > NOTICED:
            run.stop()
            raise Lost(f"the other process did not notice within {NOTICED} s")
        time.sleep(0.01)
    run.story.append(f"noticed in {time.monotonic() - begun:.0f} s")
    run.stop()
    if code := run.ended():
        run.again(code)


def peer_term(run, random):
    """SIGTERM to one process of two, or to both."""
    run.start()
    run.reach(random)
    _terminate(run, random.choice(({0}, {1}, {0, 1})))


def damaged(run, random):
    """A file of the latest checkpoint is not what was written, when the run is started again."""
    run.start()
    run.wait(lambda: len(run.saved()) > 1)
    run.reach(random, ("steps", "saving", "named"))
    run.signal(signal.SIGKILL)
    if not (code := run.ended()):
        return
    run.again(code)
    step = run.saved()[-1]
    path, name = _harm_file(f"{run.workdir}/checkpoints/{step}", random, run)
    if not random.randrange(2):  # a restart may be hours later, or at once
        run.start()
        run.reach(random)
        run.signal(signal.SIGKILL)
        if code := run.ended():
            run.again(code)
    run.finish()
    aside = os.path.isdir(f"{run.workdir}/checkpoints/{step}.damaged")
    run.story.append("set aside" if aside else "not set aside")
    if not aside and name not in (checksums.NAME, *checksums._LEFT_OUT):
        raise Lost(f"{path} was harmed, and the checkpoint was not set aside")


def _harm_file(directory, random, run):
    found = sorted(os.path.join(d, f) for d, _, files in os.walk(directory) for f in files)
    path = random.choice(found)
    _harm(path, random, run)
    return path, os.path.basename(path)


def _harm(path, random, run):
    """Flips a bit of a file, cuts it short, or deletes it."""
    size = os.path.getsize(path)
    way = random.choice(("flipped", "cut", "deleted") if size else ("deleted",))
    run.story.append(f"{os.path.relpath(path, run.directory)} {way}")
    if way == "deleted":
        os.remove(path)
    elif way == "cut":
        os.truncate(path, random.randrange(size))
    else:
        with open(path, "r+b") as file:
            at = random.randrange(size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << random.randrange(8)]))


def data(run, random):
    """Shards that are deleted, cut short or changed while they are trained on; then put back."""
    folder = run.own_data()
    kept = shutil.copytree(folder, run.directory + "/kept")
    run.start()
    if random.randrange(2):
        run.reach(random, ("start",))
    else:
        step = random.randint(1, setting.STEPS // 2)
        run.wait(lambda: run.lines() >= step)
    names = random.sample(sorted(os.listdir(folder)), random.choice((1, 8)))
    for name in names:
        _harm(os.path.join(folder, name), random, run)
    if random.randrange(2):  # what has been read ahead is lost
        run.signal(signal.SIGKILL)
        if code := run.ended():
            run.again(code)
        run.start()
    code = run.ended()
    for name in names:
        shutil.copy(os.path.join(kept, name), folder)
    if not code:
        return  # they had been read before
    again, why = restart.decide(run.workdir, code)
    if again or not any(name in why for name in names):
        raise Lost(f"the rule says {again}: {why}")


# Name -> (the fault, number of processes).
KINDS = {
    "peer-stopped": (peer_stopped, 2),
    "peer-killed": (peer_killed, 2),
    "peer-term": (peer_term, 2),
    "full": (full, 1),
    "kill": (kill, 1),
    "kill-compiling": (kill_compiling, 1),
    "term": (term, 1),
    "several": (several, 1),
    "full-then-free": (full_then_free, 1),
    "read-only": (read_only, 1),
    "vanished": (vanished, 1),
    "damaged": (damaged, 1),
    "data": (data, 1),
}
