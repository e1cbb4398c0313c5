"""JSON that another program, or an earlier run, may have written: parsed with limits."""

import json
import os
from typing import Any, cast

from bipe_jax.errors import UserError
from bipe_jax.workdir import opening

DEEPEST = 64  # lists and objects in each other; nothing that this program reads has ten
_TOO_DEEP = f"it is nested more than {DEEPEST} deep"


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError if it is none, or is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check_depth(value)
    return value


def load(path: str | os.PathLike[str]) -> Any:
    """The JSON value of a file. Raises OSError if it cannot be read, ValueError as `parse`."""
    with opening.to_read(path) as file:
        return parse(file.read())


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a file. Raises UserError if it cannot be read, or is anything else."""
    path = os.fspath(path)
    try:
        value = load(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON, or only half of it: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return cast(dict[str, Any], value)


def check_depth(value: Any) -> None:
    """Raises ValueError if lists, tuples and dicts are nested too deeply. It does not recurse."""
    level = {id(value): value}
    for _ in range(DEEPEST + 1):
        # By identity, since a list may contain itself, or another one twice.
        level = {id(item): item for outer in level.values() for item in _items(outer)}
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(cast(dict[Any, Any], value).values())
    return list(cast(list[Any], value)) if isinstance(value, (list, tuple)) else []
