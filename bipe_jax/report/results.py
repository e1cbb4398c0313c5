"""The JSON files that evaluations leave in a run's directory, read and checked."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence

from bipe_jax.errors import UserError


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# What a value must be -> whether it is.
_TESTS = {
    "a text": lambda value: isinstance(value, str),
    "a list": lambda value: isinstance(value, list),
    "a number": _is_number,
    "a number or null": lambda value: value is None or _is_number(value),
    "a share between 0 and 1": lambda value: _is_number(value) and 0 <= value < 1 + 1e-5,
    "a share or null": lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
    "a finite number of 0 or more": lambda value: _is_number(value) and 0 <= value < math.inf,
    "a whole number of 0 or more": _is_count,
    "a whole number above 0": lambda value: _is_count(value) and value > 0,
}
_COUNT, _LENGTH = "a whole number of 0 or more", "a whole number above 0"
_HEAD = {
    "training_length": _LENGTH,
    "position?": {"absolute": ["a list"], "relative": ["a list"]},
}
_WEIGHTS = [{"from": _COUNT, "to": _COUNT, "weight": "a share between 0 and 1"}]

# File -> its kind, and what must be in it: dicts and lists as in the file, and names of _TESTS. A key
# with "?" may be missing.
_FILES = {
    "evaluation": (
        "perplexity",
        _HEAD
        | {
            "results": [
                {
                    "set": "a text",
                    "length": _LENGTH,
                    "perplexity": "a number",
                    "perplexity_error": "a number or null",
                }
            ],
            "breakdowns?": [
                {
                    "set": "a text",
                    "length": _LENGTH,
                    "by": "a text",
                    "bins": [
                        {"from": _COUNT, "to": _COUNT, "loss": "a number or null", "tokens": _COUNT}
                    ],
                }
            ],
            "unseen?": [
                {
                    "set": "a text",
                    "length": _LENGTH,
                    "coordinate": "a text",
                    "trained_max": _COUNT,
                    "max": _COUNT,
                    "share": "a share between 0 and 1",
                }
            ],
        },
    ),
    "tasks": (
        "tasks",
        _HEAD
        | {
            "results": [
                {
                    "task": "a text",
                    "length": _LENGTH,
                    "depth": "a share or null",
                    "accuracy": "a share between 0 and 1",
                    "samples": _LENGTH,
                }
            ]
        },
    ),
    "attention": (
        "attention",
        _HEAD
        | {
            "results": [
                {
                    "length": _LENGTH,
                    "by": "a text",
                    "layer": _COUNT,
                    "head": _COUNT,
                    "bins": _WEIGHTS,
                }
            ],
            "heads?": [
                {
                    "length": _LENGTH,
                    "layer": _COUNT,
                    "head": _COUNT,
                    "entropy": "a finite number of 0 or more",
                    "first": "a share between 0 and 1",
                }
            ],
            "uniform?": [{"length": _LENGTH, "by": "a text", "bins": _WEIGHTS}],
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
      name: of its directory, the whole path where several have that name; or what the caller names it.
      evaluation, tasks, attention: what the files hold, or None.
    """

    name: str
    evaluation: dict | None
    tasks: dict | None
    attention: dict | None

    @property
    def files(self) -> list[dict]:
        return [file for file in (self.evaluation, self.tasks, self.attention) if file]


def read(directories: Sequence[str], names: Sequence[str] = ()) -> list[Run]:
    """Reads each directory's files. names: of the runs, if not their directories'.

    Raises:
      UserError: a directory is given twice, has no such file, or one that is not as it should be.
    """
    paths = [os.path.abspath(directory) for directory in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice: name each run once")
    names = names or [os.path.basename(path) for path in paths]
    return [
        Run(
            name if names.count(name) == 1 else path,
            **{file: _read(path, file) for file in _FILES},
        )
        for name, path in zip(names, paths, strict=True)
        if _has_some(path)
    ]


def _has_some(path: str) -> bool:
    if not os.path.isdir(path):
        raise UserError(f"{path}: there is no such directory")
    names = [f"{file}.json" for file in _FILES]
    if not any(os.path.exists(os.path.join(path, name)) for name in names):
        raise UserError(f"{path} has none of {', '.join(names)}: evaluate that run first")
    return True


def _read(directory: str, file: str) -> dict | None:
    path = os.path.join(directory, f"{file}.json")
    kind, wanted = _FILES[file]
    try:
        with open(path, encoding="utf-8") as opened:
            found = json.load(opened)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("kind", kind) != kind:
        got = repr(found.get("kind")) if isinstance(found, dict) else "something else"
        raise UserError(f"{path} must be of the kind {kind!r}, and is {got}")
    if complaint := _complaint(found, wanted):
        raise UserError(f"{path}: {complaint}")
    if not found["results"]:
        raise UserError(f"{path}: results is empty")
    return found


def _complaint(value, wanted, where: str = "") -> str:
    """What is wrong with a part of a file, or ""."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return f"{where} must be an object"
        for key, of_key in wanted.items():
            name = key.rstrip("?")
            place = f"{where}.{name}".lstrip(".")
            if name not in value:
                if key == name:
                    return f"{place} is missing"
            elif complaint := _complaint(value[name], of_key, place):
                return complaint
        return ""
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{where} must be a list"
        complaints = (_complaint(x, wanted[0], f"{where}[{i}]") for i, x in enumerate(value))
        return next(filter(None, complaints), "")
    return "" if _TESTS[wanted](value) else f"{where} must be {wanted}, and is {value!r:.40}"
