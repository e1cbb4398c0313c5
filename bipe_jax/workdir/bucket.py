"""Objects of a bucket of Google Cloud Storage, by the path of a file: gs://BUCKET/DIRECTORY/NAME.

A bucket has objects alone. A write replaces a whole object, or nothing, and who reads afterwards sees it.
Directories are beginnings of names: they need not be made, and are there as long as an object is in them.
Each write gives an object a new generation, a number; `replace` writes if it is still the one that was read.

Requests are retried by Google's client for a minute. An error is an OSError with the path and one line.
"""

import concurrent.futures
import contextlib
import errno
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Generator, Iterator
from typing import Any

from bipe_jax.errors import UserError

Path = str | os.PathLike[str]

NONE = 0  # the generation of an object that does not exist
_SCHEME = "gs://"
_EXTRA = ("google.cloud.storage", "gcsfs")  # Orbax reads and lists by gcsfs
_SECONDS = 60.0  # of retries
_CHUNK = 1 << 24  # bytes
_THREADS = 8
_TYPE = "application/octet-stream"


class Replaced(OSError):
    """Somebody else has written the object."""


_KINDS: dict[int, tuple[type[OSError], int]] = {  # of HTTP's statuses
    401: (PermissionError, errno.EACCES),
    403: (PermissionError, errno.EACCES),
    404: (FileNotFoundError, errno.ENOENT),
    412: (Replaced, errno.EEXIST),
}


def holds(path: Path) -> bool:
    """Whether a path is one of a bucket."""
    return os.fspath(path).startswith(_SCHEME)


def check(path: Path, flag: str = "") -> None:
    """Raises UserError unless a path is local, or one of a bucket that this machine can use.

    It also lets gcsfs cache no listing, which would not have what other processes, or TensorStore, write.

    Args:
      flag: that names the path, for the message.
    """
    text, named = os.fspath(path), f"{flag}={os.fspath(path)}" if flag else os.fspath(path)
    if (scheme := re.match(r"[a-z][a-z0-9+.-]+:/", text)) is None:
        return
    if not re.match(r"gs://[^/]+/[^/]", text):
        why = "" if scheme[0] == "gs:/" else ": Orbax saves checkpoints to no other object store"
        raise UserError(f"{named} must be a local directory or gs://BUCKET/DIRECTORY{why}")
    if not all(map(_is_installed, _EXTRA)):
        raise UserError(f"{named} needs the extra `gcs`: pip install -e '.[gcs]'")
    fsspec: Any = importlib.import_module("fsspec")
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that would hold it
        return False


def read(path: Path) -> bytes:
    """The content of an object. Raises FileNotFoundError, OSError."""
    with _errors(path):
        return _blob(path).download_as_bytes(retry=_retry())


def chunks(path: Path) -> Iterator[bytes]:
    """The content of an object in parts, for a large one. Raises as `read`."""
    with _errors(path):
        blob = _blob(path)
        blob.reload(retry=_retry())
        for start in range(0, blob.size, _CHUNK):
            end = min(start + _CHUNK, blob.size) - 1
            yield blob.download_as_bytes(start=start, end=end, retry=_retry())


def write(path: Path, content: bytes) -> None:
    """Writes an object. Raises OSError."""
    with _errors(path):
        _blob(path).upload_from_string(content, _TYPE, retry=_retry())


def read_generation(path: Path) -> tuple[bytes, int]:
    """An object's content and generation; b"" and NONE if it does not exist. Raises OSError."""
    try:
        with _errors(path):
            blob = _blob(path)
            content = blob.download_as_bytes(retry=_retry())
            return content, int(blob.generation)
    except FileNotFoundError:
        return b"", NONE


def replace(path: Path, content: bytes, generation: int, seconds: float = _SECONDS) -> int:
    """Writes an object if its generation is still this one.

    Args:
      content: which no other process writes.
      generation: NONE: it must not exist. seconds: of retries.

    Returns:
      Its new generation.

    Raises:
      Replaced: it has another generation. OSError.
    """
    try:
        with _errors(path):
            blob = _blob(path)
            blob.upload_from_string(
                content,
                _TYPE,
                if_generation_match=generation,
                timeout=seconds,
                retry=_retry(seconds),
            )
            return int(blob.generation)
    except Replaced:
        written, now = read_generation(path)
        if written != content:
            raise
        return now  # by a request whose answer was lost


def remove(path: Path) -> None:
    """Removes an object. Raises FileNotFoundError, OSError."""
    with _errors(path):
        _blob(path).delete(retry=_retry())


def rename(path: Path, new: Path) -> None:
    """Renames an object: it has both names for a moment. Raises FileNotFoundError, OSError."""
    with _errors(path):
        blob = _blob(path)
        blob.bucket.copy_blob(blob, blob.bucket, _name(new), retry=_retry())
    remove(path)


def rename_all(directory: Path, new: Path) -> None:
    """Renames the objects below a directory, one after the other. Raises OSError."""
    for name in below(directory):
        rename(os.path.join(directory, name), os.path.join(new, name))


def remove_all(directory: Path) -> None:
    """Removes the objects below a directory, whoever else removes some. Raises OSError."""

    def each(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            remove(os.path.join(directory, name))

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(each, below(directory)))


def exists(path: Path) -> bool:
    """Whether an object exists. Raises OSError."""
    with _errors(path):
        return bool(_blob(path).exists(retry=_retry()))


def names(directory: Path) -> list[str]:
    """The names of objects and directories in a directory, in order; [] without any. Raises OSError."""
    prefix = _name(directory) + "/"
    with _errors(directory):
        found = _list(directory, prefix=prefix, delimiter="/", fields="items(name),prefixes")
        objects = [blob.name for blob in found]  # which fills `prefixes`
        paths = [*objects, *(name.rstrip("/") for name in found.prefixes)]
    return sorted({name for path in paths if (name := path.removeprefix(prefix))})


def below(directory: Path) -> list[str]:
    """The names of all objects below a directory, as paths from it, in order. Raises OSError."""
    prefix = _name(directory) + "/"
    with _errors(directory):
        found = [blob.name for blob in _list(directory, prefix=prefix, fields="items(name)")]
    return sorted(name.removeprefix(prefix) for name in found if not name.endswith("/"))


def is_directory(path: Path) -> bool:
    """Whether an object is below a path. Raises OSError."""
    with _errors(path):
        return any(True for _ in _list(path, prefix=_name(path) + "/", max_results=1))


def _name(path: Path) -> str:
    return os.fspath(path).removeprefix(_SCHEME).partition("/")[2].rstrip("/")


def _blob(path: Path) -> Any:
    bucket = os.fspath(path).removeprefix(_SCHEME).partition("/")[0]
    return _client(os.getpid()).bucket(bucket).blob(_name(path))


def _list(path: Path, **arguments: Any) -> Any:
    bucket = os.fspath(path).removeprefix(_SCHEME).partition("/")[0]
    fields = arguments.pop("fields", "items(name)") + ",nextPageToken"
    return _client(os.getpid()).list_blobs(bucket, fields=fields, retry=_retry(), **arguments)


@functools.lru_cache(maxsize=1)
def _client(_: int) -> Any:
    """Of a process, since a child must not use its parent's connections."""
    return importlib.import_module("google.cloud.storage").Client()


def _retry(seconds: float | None = None) -> Any:
    retry = importlib.import_module("google.cloud.storage.retry").DEFAULT_RETRY
    return retry.with_timeout(_SECONDS if seconds is None else seconds)


@contextlib.contextmanager
def _errors(path: Path) -> Generator[None]:
    """A context that turns errors of Google's client into an OSError that names the path."""
    try:
        yield
    except Exception as error:
        of_client = type(error).__module__.startswith(("google.", "requests.", "urllib3."))
        if not of_client and not isinstance(error, (OSError, ImportError)):
            raise
        code: int | None = getattr(error, "code", None)
        of_class, number = _KINDS.get(code or 0, (OSError, errno.EIO))
        missing = of_class is FileNotFoundError
        reason = os.strerror(number) if missing else " ".join(str(error).split())[:300]
        raise of_class(number, reason, os.fspath(path)) from error
