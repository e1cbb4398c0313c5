"""Processes forked from this one, which has imported everything and started no thread.

To import JAX takes longer than the whole training. That a fork has all of it is sound as long as there
is one thread, and no device of JAX has been touched.
"""

import atexit
import faulthandler
import os
import signal
import sys
import threading
import traceback

STACKS = signal.SIGUSR2  # makes a forked process print the stacks of its threads


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def fork(function, output: str, environment: dict | None = None) -> int:
    """Runs `function()` in a process of its own. Returns its id.

    Args:
      output: file that what it prints is added to.
      environment: variables that are set besides.
    """
    assert threads() == 1
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ.update(environment or {})
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.register(STACKS, file=2)
        try:
            function()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        threading._shutdown()  # as an interpreter does that ends
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit code of a forked process, -9 if signal 9 ended it; None if it still runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def call(function, output: str) -> int:
    """Runs `function()` in a process of its own to its end. Returns the exit code."""
    _, status = os.waitpid(fork(function, output), 0)
    return os.waitstatus_to_exitcode(status)
