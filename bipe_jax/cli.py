"""What the commands share: messages, their flags and config, and one line for a user's error."""

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bipe_jax import processes
from bipe_jax.config import file
from bipe_jax.errors import USER_ERROR, UserError

_LOG = logging.getLogger(__name__)


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
        os._exit(USER_ERROR)
    except Exception:
        if not processes.name():
            raise
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # else it and the others would wait for each other


class Parser(argparse.ArgumentParser):
    """Parses the flags of `python -m MODULE`; what is wrong with them is a UserError."""

    def __init__(self, module: str, text: str | None):
        super().__init__(
            prog=f"python -m {module}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_with_config(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
        """The flags, and the config of --config=CONFIG with the fields of --config.KEY=VALUE.

        No flag of absl is defined: those are for the program that imports this.

        Raises:
          UserError: a flag is wrong; there is no such config or field; or a value is of another type.
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
    """The config of --config=CONFIG and --config.KEY=VALUE …, as the commands read it.

    Raises:
      UserError: there is no such config or field, or a value is of another type.
    """
    return Parser("bipe_jax.train", None).parse_with_config(arguments)[1]


def _overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Sets the fields that --config.KEY=VALUE names. Raises UserError."""
    values, line = flags.FlagValues(), ["", *overrides]
    try:
        flag = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
        rest = values(line)
    except (AttributeError, KeyError) as error:
        reason: Any = error
        while isinstance(reason, Exception):  # one is wrapped in the other
            reason = reason.args[0]
        reason = " ".join(str(reason).split())
        raise UserError(f"config has no field {reason} (docs/config.md has all fields)") from None
    except Exception as error:  # of absl and ml_collections, of many kinds
        raise UserError(" ".join(str(error).split())) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are --name=value")
    return flag.value


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
