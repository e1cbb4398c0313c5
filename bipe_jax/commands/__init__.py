"""The commands: their modules and flags. It imports none of them, so that help and completion are quick.

A command's module reads its flags by `parser(NAME)`; `bipe NAME` runs it, as `python -m MODULE` does.
"""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path

from bipe_jax.commands import options
from bipe_jax.flags import Parser

_SOURCES = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
      module: that `python -m` runs.
      add: adds its flags to a parser.
    """

    module: str
    add: Callable[[Parser], object]

    @property
    def description(self) -> str:
        """The docstring of the module, which is not imported."""
        path = _SOURCES.joinpath(*self.module.split(".")).with_suffix(".py")
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""

    @property
    def summary(self) -> str:
        """Its first sentence."""
        return self.description.partition("\n")[0].partition(": python -m")[0].rstrip(".")


def parser(name: str) -> Parser:
    """The parser of a command's flags."""
    command = COMMANDS[name]
    made = Parser(prog=f"bipe {name}", description=command.description)
    command.add(made)
    return made


def bipe() -> Parser:
    """The parser of `bipe` with all commands."""
    made = Parser(prog="bipe", description=_DESCRIPTION)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add(
            commands.add_parser(name, help=command.summary, description=command.description)
        )
    return made


_DESCRIPTION = """\
Pretraining of language models with Bilevel Positional Encoding.

bipe train --config=quickstart --workdir=runs/quickstart
bipe evaluate --checkpoint=runs/quickstart

`bipe COMMAND --help` has the flags of a command. Each is the same as `python -m` with its module."""

COMMANDS = {
    "train": Command("bipe_jax.train", options.train),
    "evaluate": Command("bipe_jax.evaluate", options.evaluate),
    "generate": Command("bipe_jax.generate", options.generate),
    "analyse": Command("bipe_jax.analyse", options.analyse),
    "tasks": Command("bipe_jax.tasks.__main__", options.tasks),
    "scrolls": Command("bipe_jax.scrolls.__main__", options.scrolls),
    "experiments": Command("bipe_jax.experiments.__main__", options.experiments),
    "harness": Command("bipe_jax.harness", options.harness),
    "plot": Command("bipe_jax.plot", options.plot),
    "report": Command("bipe_jax.report.__main__", options.report),
    "goodput": Command("bipe_jax.goodput", options.goodput),
    "preflight": Command("bipe_jax.preflight", options.preflight),
    "prepare": Command("bipe_jax.data.prepare", options.prepare),
    "inspect": Command("bipe_jax.data.inspect", options.inspect),
    "modalities": Command("bipe_jax.modalities.__main__", options.modalities),
    "places": Command("bipe_jax.modalities.places", options.places),
    "questions": Command("bipe_jax.data.questions", options.questions),
    "reframe": Command("bipe_jax.data.reframe", options.reframe),
    "checkpoint": Command("bipe_jax.checkpoint.__main__", options.checkpoints),
    "convert": Command("bipe_jax.convert.__main__", options.convert),
    "config": Command("bipe_jax.config.__main__", lambda parser: None),
    "completion": Command("bipe_jax.completion", options.completion),
}
