"""Looks into buckets with the programs of their makers: `gcloud storage ls` and `aws s3 ls`."""

import fnmatch
import functools
import re
import shutil
import subprocess

_SECONDS = 60
# What the programs say of a path that is not there; any other failure may be one of the network or account.
_ABSENT = re.compile(r"matched no objects|not found: 404|NoSuchBucket")


@functools.cache  # the points of a sweep name the same paths
def look(path: str) -> bool | None:
    """Whether a gs:// or s3:// path, or a glob, matches something; None if that cannot be seen from here."""
    return _gcloud(path) if path.startswith("gs://") else _aws(path)


def _gcloud(path: str) -> bool | None:
    answer = _run(["gcloud", "storage", "ls", path])
    if answer is None:
        return None
    code, _, errors = answer
    return True if code == 0 else False if _ABSENT.search(errors) else None


def _aws(path: str) -> bool | None:
    """As `look`; the program knows no globs, so the entries that begin alike are listed and matched."""
    answer = _run(["aws", "s3", "ls", re.split(r"[*?[]", path)[0]])
    if answer is None:
        return None
    code, listed, errors = answer
    if code:  # an empty listing is a failure without a word
        return False if not errors.strip() or _ABSENT.search(errors) else None
    directory, _, name = path.rpartition("/")
    if re.search(r"[*?[]", directory):
        return True
    entries = [line.split(maxsplit=3)[-1] for line in listed.splitlines() if line.strip()]
    return any(
        fnmatch.fnmatchcase(entry.removeprefix("PRE ").rstrip("/"), name) for entry in entries
    )


def _run(line: list[str]) -> tuple[int, str, str] | None:
    """The status, output and errors of a program; None if it is not here, or does not answer."""
    if shutil.which(line[0]) is None:
        return None
    try:
        done = subprocess.run(
            line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode, done.stdout, done.stderr
