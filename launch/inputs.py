"""What a job needs, looked for before it is launched: data, tokenizer, extras and variables.

Machines see other files than this one: those of a commit, of an image, of a volume. Each launcher describes
them by a `Place`.
"""

import dataclasses
import fnmatch
import glob
import logging
import netrc
import os
import subprocess
from collections.abc import Callable, Collection, Sequence

from bipe_jax.config import Config, needs
from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir
from launch import buckets

_LOG = logging.getLogger(__name__)

_DOCKERIGNORE = os.path.join(os.path.dirname(__file__), "gke", "Dockerfile.dockerignore")
_WANDB_HOST = "api.wandb.ai"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run will be, as far as it can be seen from here.

    Attributes:
      name: of what the machines get of this directory, "the commit".
      gets: whether they get a file or directory that is in this directory, by its relative path.
      volumes: pairs of a source and the path at which it is mounted there.
      others: whether other absolute paths are there; None if that is not known.
      local: whether runs have this machine's file system, Python, environment and home.
    """

    name: str = "this directory"
    gets: Callable[[str], bool] = lambda path: True
    volumes: Sequence[tuple[str, str]] = ()
    others: bool | None = None
    local: bool = False

    def look(self, path: str) -> bool | None:
        """Whether a path, or a glob, matches something there; None if that cannot be seen from here."""
        if path.startswith(("gs://", "s3://")):
            return buckets.look(path)
        if not os.path.isabs(path):
            return any(self.gets(os.path.normpath(match)) for match in _matches(path))
        if self.local:
            # The top of a disk that only the nodes have, such as /scratch, is not here.
            top = os.path.join("/", path.split("/")[1])
            return bool(_matches(path)) or (False if os.path.exists(top) else None)
        for source, at in self.volumes:
            if f"{path}/".startswith(f"{at}/"):
                return buckets.look(source + path[len(at) :]) if "://" in source else None
        return self.others


LOCAL = Place(local=True)


def _matches(pattern: str) -> list[str]:
    found = glob.glob(pattern, recursive=True)
    return found or [pattern] * os.path.exists(pattern)


def commit() -> Callable[[str], bool]:
    """Whether the working commit has a file or directory."""
    return _among(["git", "ls-files", "-z"])


def not_ignored() -> Callable[[str], bool]:
    """Whether git does not ignore a file or directory; outside a repository, always."""
    return _among(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])


def _among(line: list[str]) -> Callable[[str], bool]:
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        return lambda path: True
    files = set(done.stdout.split("\0"))
    return lambda path: path in files or any(file.startswith(f"{path}/") for file in files)


def image() -> Callable[[str], bool]:
    """Whether `docker build` copies a file or directory, by launch/gke/Dockerfile.dockerignore."""
    with open(_DOCKERIGNORE, encoding="utf-8") as file:
        ignored = file.read().split()
    return lambda path: not any(fnmatch.fnmatchcase(path.split("/")[0], line) for line in ignored)


def check(
    config: Config, place: Place, variables: Collection[str] | None, workdir: str
) -> needs.Needs:
    """What a run needs, of which nothing is missing as far as it can be seen.

    Args:
      variables: of the environment that the launcher passes to the run; None if they are not all known.
      workdir: of the run, which may have a tokenizer from an earlier start.

    Raises:
      UserError: a file, variable or extra is missing, or a tokenizer would be trained on too little text.
    """
    needed = needs.of(config)
    for file in needed.files:
        there = place.look(file.path)
        if there is None:
            _LOG.info(f"{file.field}={file.path} cannot be seen from here: not checked")
        elif not there:
            raise UserError(
                f"{file.field}={file.path}: {_missing(file.path, place)}; nothing was launched"
            )
    if needed.tokenizer and not (place.local and os.path.exists(Workdir(workdir).tokenizer)):
        raise UserError(f"{needed.tokenizer}; nothing was launched")
    if needed.variables and not _is_set(needed.variables, place, variables):
        raise UserError(
            f"config.log.wandb={config.log.wandb!r}: the run would have no key: pass one by "
            f"--env={needed.variables[0]} or --env-file=FILE (--env=WANDB_MODE=offline needs none); nothing "
            "was launched"
        )
    if place.local and not {"BIPE_SETUP", "BIPE_PYTHON"} & os.environ.keys():  # another Python
        needs.check_installed(config)
    return needed


def _missing(path: str, place: Place) -> str:
    if "://" in path:
        return "there is no such object"
    if place.local:
        return "there is no such file"
    if os.path.isabs(path):
        return (
            "it is in none of the volumes"
            if place.others is False
            else "the bucket has no such object"
        )
    return (
        f"it is not in {place.name}, and the machines get no more: use a bucket or a shared volume"
    )


def _is_set(names: Sequence[str], place: Place, variables: Collection[str] | None) -> bool:
    if variables is None or not {*names}.isdisjoint(variables):
        return True
    return place.local and (not {*names}.isdisjoint(os.environ) or _logged_in())


def _logged_in() -> bool:
    """Whether `wandb login` has stored a key for this user."""
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return netrc.netrc(path).authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
