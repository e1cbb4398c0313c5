# pyright: reportMissingTypeStubs=false
"""Config files: which file `--config` names, and running it.

    configs/smoke.py         a file
    configs/smoke.py:rope    a file whose `get_config` gets the argument "rope"
    smoke, smoke:rope        a config that is shipped with bipe_jax

A config file is Python with a function `get_config()` that returns an `ml_collections.ConfigDict`. It can
import the files beside it: `from . import base`.
"""

import contextlib
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import ml_collections

from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean
from bipe_jax.workdir import json_files

_PACKAGE = "bipe_jax_config_files"  # the package that a config file and the files beside it are in
_LONGEST = 500  # characters of an error's text


def shipped() -> dict[str, str]:
    """Name -> file of each shipped config: in an installed package, or beside it in the repository."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    directory = installed if installed.is_dir() else package.parent / "configs"
    return {file.stem: str(file) for file in sorted(directory.glob("*.py"))}


def find(text: str) -> tuple[str, str | None]:
    """The file that a value of `--config` names, and the argument of its `get_config`.

    Args:
      text: FILE.py, FILE.py:ARGUMENT, NAME or NAME:ARGUMENT; a name has neither "/" nor ".".

    Returns:
      (path, argument); the argument is None if there is none.

    Raises:
      UserError: there is no such file, or no shipped config of that name.
    """
    path, colon, argument = text.partition(":")
    if not {"/", "."} & set(path):
        known = shipped()
        if path not in known:
            raise UserError(
                f"--config={text}: there is no shipped config {path!r}{did_you_mean(path, known)}: use "
                f"one of {', '.join(known)}, or a file, such as configs/mine.py"
            )
        path = known[path]
    elif not os.path.isfile(path):
        raise UserError(f"--config={text}: there is no file {path!r}")
    return path, argument if colon else None


def load(text: str) -> ml_collections.ConfigDict:
    """The config that the file named by a value of `--config` returns. The file is run again each time.

    Raises:
      UserError: there is no such file, it raises, or it returns no config; the line names the file.
    """
    path, argument = find(text)
    with _errors(path):
        config: Any = _function(path, "get_config")(*([] if argument is None else [argument]))
        is_config = isinstance(config, ml_collections.ConfigDict)
        # A value may be computed, or missing, when it is read.
        values: Any = cast(Any, config).to_dict() if is_config else None
    if not is_config:
        raise UserError(
            f"{path}: get_config() must return a ConfigDict, not {type(config).__name__}"
        )
    _check_depth(path, "get_config", values)
    return config


def call(path: str, name: str) -> Any:
    """What a function of a user's Python file returns. The file is run again each time.

    Raises:
      UserError: there is no such function, or the file raises; the line names the file.
    """
    with _errors(path):
        value = _function(path, name)()
    _check_depth(path, name, value)
    return value


def _function(path: str, name: str) -> Callable[..., Any]:
    function = getattr(_run(path), name, None)
    if function is None:
        raise _Refused(f"{path} has no function {name}()")
    return function


class _Refused(UserError):
    """A line that names the file already."""


@contextlib.contextmanager
def _errors(path: str) -> Generator[None]:
    """A context in which a user's file is run: what it raises becomes a line with its name."""
    try:
        yield
    except _Refused:
        raise
    # The file is Python: anything can come from it, sys.exit() too.
    except (Exception, SystemExit) as error:
        raise UserError(f"{_where(path, error)}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The type and the text of an error in one line; of a UserError the text."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:
        text = "(an error without a text)"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{text}".split())[:_LONGEST]


def _check_depth(path: str, name: str, value: Any) -> None:
    try:
        json_files.check_depth(value)
    except ValueError as error:
        raise UserError(f"{path}: what {name}() returns cannot be used: {error}") from None


def _run(path: str) -> types.ModuleType:
    """Runs a file as a module of a package that consists of the files beside it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [os.path.dirname(os.path.abspath(path))]
    sys.modules[_PACKAGE] = package
    name = f"{_PACKAGE}.{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise _Refused(f"{path} must be a Python file, such as configs/mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _where(path: str, error: BaseException) -> str:
    """The line that an error came from, in the file or in one beside it."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in frames]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    directory, file = os.path.split(os.path.realpath(path))
    for name, line in reversed(places):
        within, name = os.path.split(os.path.realpath(name) if os.path.isabs(name) else "")
        if within == directory:
            return f"{path if name == file else os.path.join(within, name)}, line {line}"
    return path
