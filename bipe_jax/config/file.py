# pyright: reportMissingTypeStubs=false
"""Config files: which file `--config` names, and running it.

    configs/smoke.py         a file
    configs/smoke.py:rope    a file whose `get_config` gets the argument "rope"
    smoke, smoke:rope        a config that is shipped with bipe_jax

A config file is Python with a function `get_config()` that returns an `ml_collections.ConfigDict`. It can
import the files beside it: `from . import base`.
"""

import importlib.util
import os
import sys
import traceback
import types
from pathlib import Path

import ml_collections

from bipe_jax.errors import UserError

_PACKAGE = "bipe_jax_config_files"  # the package that a config file and the files beside it are in


def _shipped() -> Path:
    """The directory of the shipped configs: in an installed package, or beside it in the repository."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


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
        shipped = {file.stem: str(file) for file in sorted(_shipped().glob("*.py"))}
        if path not in shipped:
            raise UserError(
                f"--config={text}: there is no shipped config {path!r}: use one of {', '.join(shipped)}, "
                "or a file, such as configs/mine.py"
            )
        path = shipped[path]
    elif not os.path.isfile(path):
        raise UserError(f"--config={text}: there is no file {path!r}")
    return path, argument if colon else None


def load(text: str) -> ml_collections.ConfigDict:
    """The config that the file named by a value of `--config` returns. The file is run again each time.

    Raises:
      UserError: there is no such file, it raises, or it returns no config; the line names the file.
    """
    path, argument = find(text)
    config = call(path, "get_config", *([] if argument is None else [argument]))
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"{path}: get_config() must return a ConfigDict, not {type(config).__name__}"
        )
    return config


def call(path: str, name: str, *arguments: str):
    """What a function of a user's Python file returns. The file is run again each time.

    Raises:
      UserError: there is no such function, or the file raises; the line names the file.
    """
    try:
        function = getattr(_run(path), name, None)
        if function is None:
            raise UserError(f"{path} has no function {name}()")
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:  # the file is Python: anything can come from it
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        reason = " ".join(f"{type(error).__name__}: {reason}".split())
        raise UserError(f"{_where(path, error)}: {reason}") from error


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
        raise UserError(f"{path} must be a Python file, such as configs/mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _where(path: str, error: Exception) -> str:
    """The file and its line that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
    if isinstance(error, SyntaxError) and error.filename == os.path.abspath(path):
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines else path
