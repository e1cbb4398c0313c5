"""What commands share: messages, set-up, flags and config, and one line for a user's error."""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from bipe_jax import processes, streams
from bipe_jax.config import file
from bipe_jax.errors import USER_ERROR, UserError

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


def checkpoint_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of the flags of `python -m MODULE`, with --checkpoint."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    help_text = "a run's workdir, or one step's directory"
    parser.add_argument("--checkpoint", required=True, help=help_text)
    return parser


def numbers(flag: str, listed: str, kind: type) -> tuple:
    """The numbers of --FLAG=N,N,...

    Args:
      kind: int or float.

    Raises:
      UserError: one is not a number of that kind.
    """
    try:
        return tuple(kind(number) + 0 for number in listed.split(",") if number)  # -0.0 + 0 is 0.0
    except ValueError:
        wanted = "whole numbers, such as 256,512" if kind is int else "numbers, such as 0,0.5,1"
        raise UserError(f"--{flag}={listed} must be {wanted}") from None


class Parser(argparse.ArgumentParser):
    """A parser of the flags of `python -m MODULE` that raises UserError."""

    def __init__(self, module: str, description: str | None):
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_with_config(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
        """Parses the flags, and the config of --config=CONFIG and --config.KEY=VALUE.

        It defines no flag of absl, since those belong to the program that imports this module.

        Raises:
          UserError: a flag is wrong, a config or field does not exist, or a value has another type.
        """
        self.add_argument(
            "--config",
            help="a file such as configs/smoke.py, or the name of a shipped config such as smoke; "
            "--config.KEY=VALUE sets a field",
        )
        args, overrides = self.parse_known_args(arguments)
        if args.config is None:
            raise UserError("--config=FILE is needed")
        return args, _overridden(file.load(args.config), overrides)


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """The config of --config=CONFIG and --config.KEY=VALUE …, as `Parser.parse_with_config` reads it."""
    return Parser("bipe_jax.train", None).parse_with_config(arguments)[1]


def _overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The config with the fields of --config.KEY=VALUE set. Raises UserError."""
    values, line = flags.FlagValues(), ["", *overrides]
    try:
        flag = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
        rest = values(line)
    except (AttributeError, KeyError) as error:
        reason: Any = error
        while isinstance(reason, Exception):  # they are nested
            reason = reason.args[0]
        reason = " ".join(str(reason).split())
        raise UserError(f"config has no field {reason} (docs/config.md has all fields)") from None
    except Exception as error:  # absl and ml_collections raise many kinds
        raise UserError(" ".join(str(error).split())) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are --name=value")
    return flag.value


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
