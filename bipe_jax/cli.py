"""What the command-line programs share: one line, and status 1, for the user's errors."""

import contextlib
import logging
import os
import sys
import traceback

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from bipe_jax import config_file, processes
from bipe_jax.errors import UserError

_LOG = logging.getLogger(__name__)

_HELP = "Config file, such as configs/smoke.py, or the name of a shipped one, such as smoke"


def config() -> ConfigDict | None:
    """The config of a command's --config and --config.KEY=VALUE …; None if there is no --config."""
    return flags.FLAGS["config"].value


@contextlib.contextmanager
def user_errors():
    """A UserError inside ends the program with its line and status 1; messages are shown."""
    log_to_terminal()
    try:
        yield
    except UserError as error:
        # Leaves at once: threads of a failed save would print their tracebacks below the line, and
        # jax.distributed would wait for the other processes. What is to be closed is closed by now.
        sys.stdout.flush()
        _LOG.error("error: %s", error)
        os._exit(1)
    except Exception:
        if not processes.name():
            raise
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # else it and the others would wait for each other


def _parse(argv, values=flags.FLAGS):
    """Parses absl flags; whatever is wrong with --config and its overrides becomes one line.

    The flags --config.KEY=VALUE are defined by the config, so that it is loaded before the others.
    """
    first = flags.FlagValues()
    path = flags.DEFINE_string("config", None, _HELP, flag_values=first)
    first.set_gnu_getopt()
    rest = first(argv, known_only=True)
    try:
        if path.value is None:
            flags.DEFINE_string("config", None, _HELP, flag_values=values)
        else:
            config_flags.DEFINE_config_dict(
                "config", config_file.load(path.value), _HELP, flag_values=values, sys_argv=rest
            )
        rest = values(rest)
    except UserError:
        raise
    except (AttributeError, KeyError) as error:
        while isinstance(error, Exception):  # one is wrapped in the other
            error = error.args[0]
        reason = " ".join(error.split())
        raise UserError(
            f"config has no field {reason} (bipe_jax/defaults.py has all fields)"
        ) from None
    except Exception as error:
        raise UserError(" ".join(str(error).split())) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are --name=value")
    return rest


def read_config(arguments: list[str]) -> ConfigDict:
    """The config of --config=FILE[:ARGUMENT] and --config.KEY=VALUE …, as programs read it.

    Raises:
      UserError: there is no such file, or key, or a value is of another type.
    """
    values = flags.FlagValues()
    _parse(["", *arguments], values)
    if values["config"].value is None:
        raise UserError("--config=FILE is needed")
    return values["config"].value


def flag(name: str) -> str:
    """The value of --NAME=VALUE, where flags could not be read; "" if it is not there."""
    values = [a.partition("=")[2] for a in sys.argv if a.startswith(f"--{name}=")]
    return values[-1] if values else ""


def run_with_flags(main, within=contextlib.nullcontext()) -> None:  # noqa: B008
    """Runs main(argv) under absl, for programs with a --config; flags are read `within` a context too."""
    with user_errors(), within:
        app.run(main, flags_parser=_parse)


class _Terminal(logging.Handler):
    """Writes messages to standard error, beside the progress bar.

    Of several processes the first one writes what is for information; each writes its own warnings
    and errors, with its name.
    """

    def emit(self, record):
        text, name = self.format(record), processes.name()
        if record.levelno >= logging.WARNING:
            text += f" ({name})" if name else ""
        elif not processes.is_first():
            return
        print(text, file=sys.stderr, flush=True)


_TERMINAL = _Terminal()


def log_to_terminal() -> None:
    """Shows the messages of bipe_jax and launch on standard error. Calling it again changes nothing."""
    for name in ("bipe_jax", "launch"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(_TERMINAL)
