"""The command `bipe`, which runs the others: `bipe train …` is `python -m bipe_jax.train …`."""

import os
import runpy
import sys
from collections.abc import Sequence

from bipe_jax import commands, streams
from bipe_jax.errors import USER_ERROR, UserError
from bipe_jax.suggest import did_you_mean


def module_of(arguments: Sequence[str]) -> str:
    """The module of the command that a command line names. It prints the help that is asked for, and exits.

    Raises:
      UserError: there is no such command.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        commands.bipe().parse_args(["--help"])
    if name not in commands.COMMANDS:
        known = commands.COMMANDS
        raise UserError(
            f"bipe has no command {name!r}{did_you_mean(name, known)}: use one of {', '.join(known)}"
        )
    if {"-h", "--help"} & set(rest):  # without the seconds that importing the command takes
        commands.parser(name).parse_args(rest)
    return commands.COMMANDS[name].module


def main() -> None:
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(commands.bipe())
    streams.harden()
    try:
        module = module_of(sys.argv[1:])
        del sys.argv[1]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except UserError as error:
        sys.stderr.write(f"error: {streams.escaped(str(error), keep='')}\n")
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
