"""What commands share: messages, set-up, and one line for a user's error. `flags` reads their flags."""

import contextlib
import logging
import os
import sys
import traceback

import jax
from absl import logging as absl_logging

from bipe_jax import processes, streams
from bipe_jax.errors import USER_ERROR, UserError
from bipe_jax.flags import Parser, read_config

__all__ = [
    "Parser", "cache_programs", "check_printed", "log_to_terminal", "quiet", "read_config", "set_up",
    "unread", "user_errors",
]  # fmt: skip

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def user_errors():
    """A context that shows messages; a UserError inside ends the program with its line and status 1.

    From then on, output that cannot be shown or written is no error, see `streams`.
    """
    streams.harden()
    log_to_terminal()
    try:
        yield
    except UserError as error:
        # Exits at once: threads of a failed save would print their tracebacks below the line, and
        # jax.distributed would wait for the other processes.
        sys.stdout.flush()
        _LOG.error("error: %s", streams.escaped(str(error), keep=""))
        os._exit(USER_ERROR)
    except Exception:
        if not processes.name():
            raise
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # otherwise the processes would wait for each other


def unread() -> bool:
    """Whether the reader of standard output has gone, as in `... | head`."""
    return isinstance(streams.failure(sys.stdout), BrokenPipeError)


def check_printed() -> None:
    """Raises UserError if standard output, a command's only result, could not be written.

    A reader that has gone has had enough.
    """
    error = streams.failure(sys.stdout)
    if error and not isinstance(error, BrokenPipeError):
        raise UserError(f"standard output cannot be written: {error.strerror}")


def set_up() -> None:
    """Prepares a command that runs a model and saves nothing."""
    quiet()
    cache_programs()
    processes.join()


def quiet() -> None:
    """Keeps the messages of Orbax, asyncio and TensorStore off the terminal.

    Orbax warns of options that are chosen on purpose, and prints each error that it also raises. asyncio
    does so for every array of a failed save, some only when the program ends, and TensorStore's threads
    for every array of a failed read.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ordinary = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            ordinary(unraisable)

    sys.unraisablehook = hook


def cache_programs() -> None:
    """Keeps compiled programs in ~/.cache/bipe_jax, or in JAX_COMPILATION_CACHE_DIR.

    A run that resumes, or another of the same shapes, starts without compiling. An empty
    JAX_COMPILATION_CACHE_DIR turns it off, as does a user without a home.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # to be ignored, by the XDG specification
        cache = os.path.expanduser("~/.cache")
    if os.path.isabs(cache) and cache != "/.cache":  # of an empty HOME
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "bipe_jax"))


class _Terminal(logging.Handler):
    """Writes messages to standard error.

    Of several processes only the first writes messages of level info; each writes its own warnings and
    errors, with its name.
    """

    def emit(self, record):
        message, name = streams.escaped(self.format(record)), processes.name()
        if record.levelno >= logging.WARNING:
            message += f" ({name})" if name else ""
        elif not processes.is_first():
            return
        print(message, file=sys.stderr, flush=True)


_TERMINAL = _Terminal()


def log_to_terminal() -> None:
    """Shows the messages of bipe_jax and launch on standard error. It can be called again."""
    for name in ("bipe_jax", "launch"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(_TERMINAL)
