"""The command line of every command: one parser, and the config of --config and --config.KEY=VALUE.

All commands read flags alike: --name=value or --name value; "_" and "-" in a name are the same; names are
not abbreviated; numbers are separated by "," and names by "|". A mistake is a UserError.
"""

import argparse
import functools
import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from bipe_jax.config import FIELDS, file
from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean

_CONFIG = "config."


class Parser(argparse.ArgumentParser):
    """A parser of a command's flags that raises UserError.

    Args:
      module: of the command, as in `python -m MODULE`.
      description: what the command does, shown as it is written.
      others: arguments of argparse's parser.
    """

    def __init__(self, module: str = "", description: str | None = None, **others: Any):
        others.setdefault("prog", f"python -m {module}")
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **others,
        )
        self._words: list[str] = []  # what is parsed

    def add_config(self) -> None:
        """Adds --config, and --config.KEY of every field."""
        config = self.add_argument(
            "--config",
            help="a file such as configs/smoke.py, or the name of a shipped config such as smoke",
        )
        _complete_with(config, lambda prefix, **_: [*file.shipped(), *_files(prefix)])
        usage = argparse.RawDescriptionHelpFormatter(self.prog)  # without one line a field
        usage.add_usage(None, self._actions, self._mutually_exclusive_groups, "")
        self.usage = usage.format_help().strip().replace("%", "%%") + " [--config.KEY=VALUE ...]"
        group = self.add_argument_group(
            "fields of the config", "with the value of a field that the config does not set"
        )
        for name, field in FIELDS.items():
            option = group.add_argument(
                f"--{_CONFIG}{name}",
                metavar="VALUE",
                nargs="?" if isinstance(field.default, bool) else None,
                const="True" if isinstance(field.default, bool) else None,
                help=f"{field.meaning} ({field.default!r})".replace("%", "%%"),
            )
            if field.choices:
                _complete_with(option, functools.partial(_these, field.choices))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the flags that it knows; in their names "_" and "-" are the same."""
        self._words = [self._known(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(self._words, namespace)

    def _known(self, word: str) -> str:
        name, equals, value = word.partition("=")
        known = self._option_string_actions
        if not name.startswith("--") or name in known:
            return word
        for other in (name[2:].replace("-", "_"), name[2:].replace("_", "-")):
            if f"--{other}" in known:
                return f"--{other}{equals}{value}"
        return word

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return parsed

    def refuse(self, rest: Sequence[str]) -> None:
        """Raises UserError if there are arguments that are not known."""
        if not rest:
            return
        name = rest[0].partition("=")[0]
        if not name.startswith("-"):
            self.error(f"unexpected argument {rest[0]!r}: flags are --name=value")
        options = list(self._options())
        if name.startswith(f"--{_CONFIG}") and f"--{_CONFIG}steps" in options:
            key = name.removeprefix(f"--{_CONFIG}")
            raise UserError(
                f"config has no field {key!r}{did_you_mean(key, FIELDS)}: "
                "docs/reference/config.md has all fields"
            )
        self.error(f"unrecognized arguments: {' '.join(rest)}{did_you_mean(name, options)}")

    def _options(self) -> Iterator[str]:
        """The names of all flags, those of subcommands too."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            name = "/".join(action.option_strings) or action.metavar or action.dest
            self.error(
                f"{name}: {value!r} is unknown{did_you_mean(str(value), choices)}: use one of "
                f"{', '.join(choices)}"
            )

    def error(self, message: str) -> Any:
        if message.startswith("the following arguments are required"):  # perhaps they are mistyped
            options = list(self._options())
            for name in (word.partition("=")[0] for word in self._words):
                if name.startswith("--") and name not in options:
                    message += f"; {name} is unknown{did_you_mean(name, options)}"
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_with_config(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
        """Parses the flags, and the config of --config=CONFIG and --config.KEY=VALUE.

        It defines no flag of absl, since those belong to the program that imports this module.

        Raises:
          UserError: a flag is wrong, a config or field does not exist, or a value has another type.
        """
        args = self.parse_args(arguments)
        if args.config is None:
            raise UserError("--config=FILE is needed")
        values = {name: getattr(args, f"{_CONFIG}{name}") for name in FIELDS}
        overrides = {name: value for name, value in values.items() if value is not None}
        return args, _overridden(file.load(args.config), overrides)


def _complete_with(action: argparse.Action, completer: Callable[..., Iterable[str]]) -> None:
    """Tells argcomplete the values of a flag; it completes those of others as files."""
    action.completer = completer  # pyright: ignore[reportAttributeAccessIssue]


def _these(names: Iterable[str], **_: Any) -> Iterable[str]:
    return names


def _files(prefix: str) -> Iterator[str]:
    """Config files, and directories."""
    for path in glob.iglob(f"{glob.escape(prefix)}*"):
        if os.path.isdir(path):
            yield f"{path}/"
        elif path.endswith(".py"):
            yield path


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """The config of --config=CONFIG and --config.KEY=VALUE …, as `Parser.parse_with_config` reads it."""
    parser = Parser("bipe_jax.train")
    parser.add_config()
    return parser.parse_with_config(arguments)[1]


def _overridden(config: ConfigDict, overrides: dict[str, str]) -> ConfigDict:
    """The config with other values of some fields, as they are written. Raises UserError."""
    values = absl_flags.FlagValues()
    line = ["", *(f"--{_CONFIG}{name}={value}" for name, value in overrides.items())]
    try:
        flag = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
        values(line)
    except (AttributeError, KeyError) as error:
        reason: Any = error
        while isinstance(reason, Exception):  # they are nested
            reason = reason.args[0]
        reason = " ".join(str(reason).split())
        raise UserError(f"config has no field {reason}: start from configs/base.py") from None
    except Exception as error:  # absl and ml_collections raise many kinds
        raise UserError(" ".join(str(error).split())) from None
    return flag.value


def numbers(flag: str, listed: str, kind: type) -> tuple[Any, ...]:
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


def names(listed: str, separator: str = "|") -> tuple[str, ...]:
    """The names of --FLAG=A|B, or A,B where names have no commas."""
    return tuple(name for name in listed.split(separator) if name)


def span(flag: str, text: str) -> tuple[int, int]:
    """The range of --FLAG=LOW:HIGH, or of --FLAG=N. Raises UserError: it is none."""
    low, colon, high = text.partition(":")
    try:
        return int(low), int(high if colon else low)
    except ValueError:
        raise UserError(f"--{flag}={text} must be a range LOW:HIGH, such as 4:16") from None
