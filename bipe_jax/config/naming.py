"""Names of points: what their directories are called, and a hash that tells configs apart.

A point's directory is KEY-VALUE--KEY-VALUE--ID, with the keys that the point sets, or NAME--ID. ID is a hash
of the fields that change results. Neither depends on the other points of a sweep.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from bipe_jax.config import FIELDS, defaults, flatten

# Fields that do not change results. The id ignores them unless the sweep varies them, so that a sweep may
# be resumed on another mesh.
_HOW = re.compile(
    r"(mesh|log|checkpoint|evaluation)\..*|accumulation|loss_chunk|model\.(remat|attention)"
    r"|data\.(evaluation|workers|on_error|max_bad_share)"
)
_LONGEST_VALUE, _LONGEST_NAME = 48, 120  # characters; file systems take 255 bytes


def name_of(point: Collection[str], config: Any, own: str = "") -> str:
    """The name of a point's directory.

    Args:
      point: keys of the config alone. config: with the point applied. own: the point's own name, if any.
    """
    flat = flatten(config)
    parts = [f"{short_key(key)}-{short_value(flat[key])}" for key in sorted(point)]
    parts = [own] if own else parts
    readable = "--".join(parts)[:_LONGEST_NAME].rstrip("-_.")
    return "--".join(filter(None, [readable, identity(changes(point, flat))]))


def changes(point: Collection[str], flat: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change results and are not at their defaults, so that new fields are not among them.

    Args:
      point: keys that are varied. flat: the config, as `config.flatten` has it.
    """
    usual = flatten(defaults())
    return {
        key: value
        for key, value in flat.items()
        if json.dumps(value) != json.dumps(usual.get(key))
        and (key in point or not _HOW.fullmatch(key))
    }


def identity(value: Any) -> str:
    """A hash of a value of JSON's types, of 8 hexadecimal digits; tuples and lists are alike."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def short_key(key: str) -> str:
    """The last word of a key, unless several keys have it."""
    last = key.rpartition(".")[2]
    return last if sum(name.rpartition(".")[2] == last for name in FIELDS) == 1 else key


def words(value: Any, between: str = ", ", within: str = " ") -> str:
    """A value as text: (("rope", "segment"),) is "rope segment", and () is "none"."""
    if isinstance(value, (tuple, list)):
        inner = cast(Sequence[Any], value)
        return between.join(words(each, within, within) for each in inner) or "none"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value) or "none"


def short_value(value: Any) -> str:
    """A value in letters, digits, ".", "_" and "-": (("rope", "segment"),) is "rope.segment"."""
    return shortened(re.sub(r"[^A-Za-z0-9._-]+", "-", words(value, "_", ".")).rstrip("-"), "..")


def shortened(text: str, gap: str = "…") -> str:
    """Both ends of a long text."""
    half = _LONGEST_VALUE // 2 - 1
    return text if len(text) <= _LONGEST_VALUE else f"{text[:half]}{gap}{text[-half:]}"
