"""SHA-256 of a checkpoint's files, in the format of `sha256sum --check`.

The first line, a comment, has the number of files, by which a truncated list is recognised. The second
one has the step, by which a copy of another step is; lists of earlier versions do not have it.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable

from bipe_jax.workdir import COMMITTED, files, opening
from bipe_jax.workdir.files import Path

NAME = "checksums.sha256"
# Orbax rewrites these when it completes a checkpoint.
_LEFT_OUT = (NAME, "_CHECKPOINT_METADATA", COMMITTED)
_HEAD, _STEP = "# files: ", "# step: "
_THREADS = 8  # hashing releases the interpreter's lock


def _files(directory: Path) -> list[str]:
    return [path for path in files.below(directory) if path not in _LEFT_OUT]


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    for chunk in opening.chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def write(directory: Path) -> None:
    """Writes the checksums of all files of a directory, whose name begins with a step, into it.

    Raises OSError.
    """
    names = _files(directory)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _hash(os.path.join(directory, name)), names)
        text = "".join(f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True))
    head = f"{_HEAD}{len(names)}\n{_STEP}{_step(directory)}\n"
    files.write_text(os.path.join(directory, NAME), head + text)


def _step(directory: Path) -> str:
    """The step of a checkpoint's directory, such as 40 or 40.orbax-checkpoint-tmp."""
    return os.path.basename(directory).partition(".")[0]


def read(directory: Path) -> list[tuple[str, str]] | None:
    """(name, checksum) of each file of a directory, None if it has none. Raises OSError, ValueError."""
    try:
        with opening.to_read(os.path.join(directory, NAME)) as file:
            head, *lines = file.read().decode().split("\n")
    except FileNotFoundError:
        return None
    step = lines.pop(0) if lines and lines[0].startswith(_STEP) else None
    pairs = [line.split("  ", 1)[::-1] for line in lines[:-1]]
    good = all(len(pair) == 2 and len(pair[1]) == 64 for pair in pairs)
    if not good or head != f"{_HEAD}{len(pairs)}" or lines[-1:] != [""]:
        raise ValueError(f"{NAME} is cut off or damaged")
    if step and step != f"{_STEP}{_step(directory)}":
        raise ValueError(f"it is a copy of step {step.removeprefix(_STEP)}")
    return [(name, digest) for name, digest in pairs]


def problems(directory: Path, sums: Iterable[tuple[str, str]]) -> list[str]:
    """The problems of files of a directory, one line each; [] if all are intact."""

    def check(pair):
        name, expected = pair
        try:
            intact = _hash(os.path.join(directory, name)) == expected
            return None if intact else f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return [line for line in pool.map(check, sums) if line]


def verify(directory: Path) -> list[str] | None:
    """The `problems` of all files of a directory, None if it has no checksums."""
    try:
        sums = read(directory)
    except (OSError, ValueError) as error:
        return [str(error)]
    return None if sums is None else problems(directory, sums)
