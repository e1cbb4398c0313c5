"""Variables of the environment that a launcher passes to a run: --env NAME[=VALUE] and --env-file FILE.

Their values may be secrets: they are in no command line, no log and no dry run.
"""

import argparse
import os
import re
from collections.abc import Mapping

from bipe_jax.errors import UserError
from launch import jobs

HIDDEN = "(hidden)"  # what is shown for a value
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the run; without =VALUE this machine's, which no list of processes shows",
    )
    parser.add_argument(
        "--env-file", default="", metavar="FILE", help="a file of lines NAME=VALUE for the run"
    )


def of(args: argparse.Namespace) -> dict[str, str]:
    """The variables of parsed flags; --env wins over --env-file.

    Raises:
      UserError: a name is malformed or not set here, a value has several lines, the file cannot be read.
    """
    variables = _read(args.env_file) if args.env_file else {}
    for text in args.env:
        name, equals, value = text.partition("=")
        if not _NAME.fullmatch(name):
            raise UserError(f"--env={name}{'=...' * bool(equals)} must be NAME or NAME=VALUE")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env={name}: {name} is not set on this machine")
            value = os.environ[name]
        variables[name] = value
    for name, value in variables.items():
        jobs.check_line(f"--env={name}", value, HIDDEN)
    return variables


def _read(path: str) -> dict[str, str]:
    """The variables of a file: NAME=VALUE a line, perhaps in quotes or after `export`; # begins a comment."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"--env-file={path} cannot be read: {reason}") from None
    variables = {}
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise UserError(f"--env-file={path}, line {number} is not NAME=VALUE")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        variables[name] = value[1:-1] if quoted else value
    return variables


def hidden(variables: Mapping[str, str]) -> dict[str, str]:
    """The names, with nothing of the values."""
    return dict.fromkeys(variables, HIDDEN)
