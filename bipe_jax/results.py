"""The JSON files that evaluations leave in a run's directory, read and checked."""

import dataclasses
import json
import os
from collections.abc import Sequence

from bipe_jax.errors import UserError

_NUMBER, _OR_NONE = (int, float), (int, float, type(None))
_HEAD = {
    "training_length": int,
    "position?": {"absolute": [(list, tuple)], "relative": [(list, tuple)]},
}

# File -> its kind, and what must be in it: dicts and lists as in the file, and types. A key with "?"
# may be missing.
_FILES = {
    "evaluation": (
        "perplexity",
        _HEAD
        | {
            "results": [
                {"set": str, "length": int, "perplexity": _NUMBER, "perplexity_error": _OR_NONE}
            ],
            "breakdowns?": [
                {
                    "set": str,
                    "length": int,
                    "by": str,
                    "bins": [{"from": int, "to": int, "loss": _OR_NONE, "tokens": int}],
                }
            ],
            "unseen?": [
                {
                    "set": str,
                    "length": int,
                    "coordinate": str,
                    "trained_max": _NUMBER,
                    "max": _NUMBER,
                    "share": _NUMBER,
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
                    "task": str,
                    "length": int,
                    "depth": _OR_NONE,
                    "accuracy": _NUMBER,
                    "samples": int,
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
                    "length": int,
                    "by": str,
                    "layer": int,
                    "head": int,
                    "bins": [{"from": int, "to": int, "weight": _NUMBER}],
                }
            ],
            "heads?": [
                {"length": int, "layer": int, "head": int, "entropy": _NUMBER, "first": _NUMBER}
            ],
            "uniform?": [
                {"length": int, "by": str, "bins": [{"from": int, "to": int, "weight": _NUMBER}]}
            ],
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
      name: of its directory; the whole path where several have that name.
      evaluation, tasks, attention: what the files hold, or None.
    """

    name: str
    evaluation: dict | None
    tasks: dict | None
    attention: dict | None

    @property
    def files(self) -> list[dict]:
        return [file for file in (self.evaluation, self.tasks, self.attention) if file]


def read(directories: Sequence[str]) -> list[Run]:
    """Reads each directory's files.

    Raises:
      UserError: a directory is given twice, has no such file, or one that is not as it should be.
    """
    paths = [os.path.abspath(directory) for directory in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice: name each run once")
    names = [os.path.basename(path) for path in paths]
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
        if not isinstance(value, (list, tuple)):
            return f"{where} must be a list"
        complaints = (_complaint(x, wanted[0], f"{where}[{i}]") for i, x in enumerate(value))
        return next(filter(None, complaints), "")
    if isinstance(value, bool) or not isinstance(value, wanted):
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        words = {str: "a text", int: "a whole number", float: "a number", list: "a list"}
        named = [word for kind, word in words.items() if kind in kinds]
        return f"{where} must be {named[-1]}, and is {value!r:.40}"
    return ""
