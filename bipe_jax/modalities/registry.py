"""The data sets by name: what each is made from, and under which licence."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bipe_jax.errors import UserError
from bipe_jax.modalities import code, dna, games, music, proofs
from bipe_jax.modalities.documents import Document, Options
from bipe_jax.suggest import did_you_mean


class Modality(NamedTuple):
    """A data set.

    Attributes:
      source: what it is made from, in words. version: of that. licence: of that, and of what is written.
      levels: of its segments, the finest first.
      options: the names of those of `Options` that it has.
      documents: yields all of it.
    """

    source: str
    version: Callable[[], str]
    licence: str
    levels: tuple[str, ...]
    options: tuple[str, ...]
    documents: Callable[[Options], Iterator[Document]]


def _of_pypi(package: str) -> Callable[[], str]:
    def version() -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    return version


def _of_debian(package: str) -> Callable[[], str]:
    def version() -> str:
        line = ["dpkg-query", "--show", "--showformat=${Version}", package]
        try:
            return subprocess.run(line, capture_output=True, text=True).stdout or "unknown"
        except OSError:
            return "unknown"

    return version


MODALITIES = {
    "music": Modality(
        f"ABC tunes of PyPI's music21, corpus/{{{','.join(music.COLLECTIONS)}}}/*.abc",
        _of_pypi("music21"),
        "music21 is BSD-3-Clause; the tunes are traditional, from books of 1782 to 1903",
        ("bar", "part", "tune"),
        (),
        music.documents,
    ),
    "proofs": Modality(
        f"proofs of Debian's metamath-databases, {proofs.FILE}",
        _of_debian("metamath-databases"),
        "CC0-1.0",
        ("step",),
        ("count", "references"),
        proofs.documents,
    ),
    "code": Modality(
        "modules of the running Python's standard library of at least 16 KB",
        platform.python_version,
        "PSF-2.0",
        ("line", "definition"),
        (),
        code.documents,
    ),
    "chess": Modality(
        "games that PyPI's chess plays from a seed",
        _of_pypi("chess"),
        "chess is GPL-3.0-or-later, which does not extend to what it computes",
        ("pair of moves",),
        ("count", "seed", "plies"),
        games.documents,
    ),
    "dna": Modality(
        "a Markov chain of order 3 over four letters, drawn from a seed",
        lambda: "1",
        "none: random numbers",
        (),
        ("count", "seed"),
        dna.documents,
    ),
}


def find(name: str) -> Modality:
    """The data set of a name. Raises UserError."""
    if name not in MODALITIES:
        raise UserError(
            f"there is no data set {name!r}{did_you_mean(name, MODALITIES)}: use one of "
            f"{', '.join(MODALITIES)}"
        )
    return MODALITIES[name]
