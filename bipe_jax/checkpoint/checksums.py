"""SHA-256 of a checkpoint's files, in the form that `sha256sum --check` reads too.

The first line, a comment, says how many there are, so that a list that was cut off is known as such.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable

NAME = "checksums.sha256"
# Orbax writes these once more when it completes a checkpoint, and adds files while it deletes one.
_LEFT_OUT = (NAME, "_CHECKPOINT_METADATA", "commit_success.txt")
_HEAD = "# files: "
_THREADS = 8  # hashing lets other threads run


def _files(directory: str) -> list[str]:
    found = [
        os.path.relpath(os.path.join(folder, name), directory)
        for folder, _, names in os.walk(directory)
        for name in names
    ]
    return sorted(name for name in found if name not in _LEFT_OUT)


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(directory: str) -> None:
    """Writes the checksums of all files of a directory into it. Raises OSError."""
    names = _files(directory)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _hash(os.path.join(directory, name)), names)
        text = "".join(f"{sum_}  {name}\n" for sum_, name in zip(sums, names, strict=True))
    with open(os.path.join(directory, NAME), "w", encoding="utf-8") as file:
        file.write(f"{_HEAD}{len(names)}\n{text}")


def read(directory: str) -> list[tuple[str, str]] | None:
    """(name, sum) of each file of a directory, None if it has no checksums. Raises ValueError."""
    try:
        with open(os.path.join(directory, NAME), encoding="utf-8") as file:
            head, *lines = file.read().split("\n")
    except FileNotFoundError:
        return None
    pairs = [line.split("  ", 1)[::-1] for line in lines[:-1]]
    good = all(len(pair) == 2 and len(pair[1]) == 64 for pair in pairs)
    if not good or head != f"{_HEAD}{len(pairs)}" or lines[-1:] != [""]:
        raise ValueError(f"{NAME} is cut off or damaged")
    return [tuple(pair) for pair in pairs]


def problems(directory: str, sums: Iterable[tuple[str, str]]) -> list[str]:
    """What is wrong with files of a directory, one line each, [] if they are what was written."""

    def check(pair):
        name, expected = pair
        try:
            good = _hash(os.path.join(directory, name)) == expected
            return None if good else f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return [line for line in pool.map(check, sums) if line]


def verify(directory: str) -> list[str] | None:
    """`problems` of all files of a directory, None if it has no checksums."""
    try:
        sums = read(directory)
    except (OSError, ValueError) as error:
        return [str(error)]
    return None if sums is None else problems(directory, sums)
