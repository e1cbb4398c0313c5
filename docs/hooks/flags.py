"""The page of all commands and their flags, made of the parsers: a hook of mkdocs.yml."""

import argparse
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from bipe_jax import commands

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the launchers are not installed

from launch import list as listing
from launch import restart, supervise, sweep
from launch.gke import jobset
from launch.sky import managed
from launch.slurm import __main__ as slurm
from launch.tpu_vm import __main__ as tpu_vm

PAGE = "reference/flags.md"
LAUNCHERS = {
    "launch.sweep": sweep.parser,
    "launch.slurm": slurm.parser,
    "launch.tpu_vm": tpu_vm.parser,
    "launch.gke": jobset.parser,
    "launch.sky": managed.parser,
    "launch.list": listing.parser,
    "launch.supervise": supervise.parser,
    "launch.restart": restart.parser,
}
HEAD = """\
# All commands and their flags

This page is made from the commands' parsers when the site is built; `bipe COMMAND --help` prints the same.
[How flags are written](commands.md#flags) is the same for all of them. `train` and `preflight` also take
`--config.KEY=VALUE` for every [field of the config](config.md).
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page, in Markdown."""
    parts = [HEAD, "## `bipe`\n"]
    for name, command in commands.COMMANDS.items():
        module = command.module.removesuffix(".__main__")
        parts.append(f"### `bipe {name}`\n\nThe same as `python -m {module}`.\n")
        parts.append(_of_parser(commands.parser(name)))
    parts.append("## Launchers\n\nThey are run from the root of a clone of the repository.\n")
    for module, parser in LAUNCHERS.items():
        parts += [f"### `python -m {module}`\n", _of_parser(parser())]
    return "\n".join(parts)


def _of_parser(parser: argparse.ArgumentParser) -> str:
    """What a command does, and a table of its flags; then the same of its subcommands."""
    parts = [f"```text\n{parser.description.strip()}\n```\n"] if parser.description else []
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                parts += [f"#### `{parser.prog} {name}`\n", _of_parser(sub)]
        elif action.dest != "help" and not action.dest.startswith("config."):
            rows.append(f"| {_written(action)} | {_cell(_meaning(action))} |")
    if rows:
        parts.append("\n".join(["| flag | meaning (default) |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def _written(action: argparse.Action) -> str:
    if not action.option_strings:
        return _code(str(action.metavar or action.dest))
    name = action.option_strings[-1]
    if action.nargs == 0:
        return _code(name)
    return _code(
        f"{name}={action.metavar or '|'.join(map(str, action.choices or ())) or action.dest.upper()}"
    )


def _meaning(action: argparse.Action) -> str:
    """The help, with the default unless it says it."""
    text = (action.help or "") % {"default": action.default}
    if action.required and action.option_strings:
        return f"{text} (required)"
    default = "" if action.default is argparse.SUPPRESS else str(action.default or "")
    if default and default not in text:
        return f"{text} ({default})"
    return text


def _code(text: str) -> str:
    """Code in a table, whose cells "|" would end."""
    return f"<code>{_cell(text)}</code>"


def _cell(text: str) -> str:
    """A text as it is, in a table."""
    return re.sub(r"([<*_\[`|])", lambda match: f"&#{ord(match[0])};", " ".join(text.split()))
