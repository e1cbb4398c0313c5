"""The JSON files that evaluations write into a run's directory, read and checked.

A field without a default must be in the file. A field's type has the check of its value.
"""

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from bipe_jax.errors import UserError
from bipe_jax.workdir import Workdir, files, json_files

_MOST = (
    2**53
)  # larger whole numbers, which JSON may have, are not exact as floats, or are too large for them


def _is_number(value) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST


# The types of values: a description, and a check.
Text = Annotated[str, "a text", lambda x: isinstance(x, str)]
Encoding = Annotated[list, "a list", lambda x: isinstance(x, list)]  # kind, coordinate, options
Number = Annotated[float, "a number", _is_number]
Error = Annotated[float | None, "a number or null", lambda x: x is None or _is_number(x)]
Share = Annotated[float, "a share between 0 and 1", lambda x: _is_number(x) and 0 <= x < 1 + 1e-5]
Depth = Annotated[
    float | None, "a share or null", lambda x: x is None or (_is_number(x) and 0 <= x <= 1)
]
Size = Annotated[
    float, "a finite number of 0 or more", lambda x: _is_number(x) and 0 <= x < math.inf
]
Count = Annotated[int, "a whole number of 0 or more", lambda x: _is_whole(x) and x >= 0]
Length = Annotated[int, "a whole number above 0", lambda x: _is_whole(x) and x > 0]
Statistic = float | None  # None also for a value of another type


@dataclasses.dataclass(frozen=True)
class _Range:
    """The whole numbers `low` … `high`."""

    low: Count = dataclasses.field(metadata={"key": "from"})
    high: Count = dataclasses.field(metadata={"key": "to"})

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,}–{self.high:,}"


@dataclasses.dataclass(frozen=True)
class LossBin(_Range):
    """Mean loss of the tokens in a range."""

    loss: Error
    tokens: Count


@dataclasses.dataclass(frozen=True)
class WeightBin(_Range):
    """Weight of attention on the tokens in a range of distances."""

    weight: Share


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of a data set at one length, with the statistics of its segments."""

    set: Text
    length: Length
    perplexity: Number
    perplexity_error: Error
    loss: Statistic = None
    bits_per_byte: Statistic = None
    bits_per_byte_error: Statistic = None
    tokens: Statistic = None
    documents: Statistic = None
    documents_of_set: Statistic = None
    segment_tokens_mean: Statistic = None
    segment_tokens_p99: Statistic = None
    segments_per_block: Statistic = None
    segment_max: Statistic = None
    document_losses: tuple[Number, ...] = ()  # nats, of the documents of the set's targets


@dataclasses.dataclass(frozen=True)
class Targets:
    """Which tokens of a data set were scored: digests, and the targets of each document."""

    set: Text
    targets: Text
    collection: Text  # of all documents of the set
    documents: tuple[Text, ...]
    tokens: tuple[Count, ...]
    bytes: tuple[Size, ...]


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Loss by a coordinate, in ranges of it."""

    set: Text
    length: Length
    by: Text
    bins: tuple[LossBin, ...]


@dataclasses.dataclass(frozen=True)
class Unseen:
    """The share of a coordinate beyond its largest value in training."""

    set: Text
    length: Length
    coordinate: Text
    trained_max: Count
    max: Count
    share: Share


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Accuracy in a task at one length and depth."""

    task: Text
    length: Length
    depth: Depth
    accuracy: Share
    samples: Length


@dataclasses.dataclass(frozen=True)
class AttentionByDistance:
    """Mean weight of attention by distance in segments or tokens."""

    length: Length
    by: Text
    bins: tuple[WeightBin, ...]


@dataclasses.dataclass(frozen=True)
class HeadAttention(AttentionByDistance):
    """Attention by distance of one head."""

    layer: Count
    head: Count


@dataclasses.dataclass(frozen=True)
class Head:
    """Entropy of a head's attention in nats, and its weight on the block's first token."""

    length: Length
    layer: Count
    head: Count
    entropy: Size
    first: Share


@dataclasses.dataclass(frozen=True)
class Position:
    """The encodings of a model."""

    absolute: tuple[Encoding, ...]
    relative: tuple[Encoding, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """The fields of all files: the model and the data."""

    file: ClassVar[str]  # the file's name
    kind: ClassVar[str]  # the file's "kind"
    results: tuple
    training_length: Length
    position: Position | None = None
    step: object = None
    segment_rule: object = None
    data: object = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(_File):
    """evaluation.json."""

    file = Workdir.evaluation
    kind = "perplexity"
    results: tuple[Perplexity, ...]
    breakdowns: tuple[Breakdown, ...] = ()
    unseen: tuple[Unseen, ...] = ()
    targets: tuple[Targets, ...] = ()
    tokenizer: object = None  # a digest
    context: object = None
    protocol: object = None
    bos_rule: object = None

    @property
    def sets(self) -> set[str]:
        """The names of the data sets."""
        return {row.set for row in self.results}

    def row(self, of_set: str, length: int) -> Perplexity | None:
        """The result of a set at a length."""
        rows = (row for row in self.results if (row.set, row.length) == (of_set, length))
        return next(rows, None)

    def targets_of(self, of_set: str) -> Targets | None:
        """The targets of a set."""
        return next((targets for targets in self.targets if targets.set == of_set), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks(_File):
    """tasks.json."""

    file = Workdir.tasks
    kind = "tasks"
    results: tuple[Accuracy, ...]
    seed: object = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(_File):
    """attention.json."""

    file = Workdir.attention
    kind = "attention"
    results: tuple[HeadAttention, ...]
    heads: tuple[Head, ...] = ()
    uniform: tuple[AttentionByDistance, ...] = ()  # under uniform attention


F = TypeVar("F", bound=_File)


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of a run.

    Attributes:
      name: the caller's, or its directory's (the whole path if several have that name).
      evaluation, tasks, attention: the contents of the files; None for a missing file.
    """

    name: str
    evaluation: Evaluation | None = None
    tasks: Tasks | None = None
    attention: Attention | None = None


def names_of(directories: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """The names of runs: those given, else their directories'; where several are alike, their paths.

    Raises:
      UserError: there are other numbers of names and of runs.
    """
    paths = [files.absolute(directory) for directory in directories]
    if names and len(names) != len(paths):
        raise UserError(f"--names: {len(names)} names for {len(paths)} runs: give one for each")
    names = list(names) or [os.path.basename(path) for path in paths]
    return [n if names.count(n) == 1 else path for n, path in zip(names, paths, strict=True)]


def read(directories: Sequence[str], names: Sequence[str] = ()) -> list[Run]:
    """Reads each directory's files. names: see `names_of`.

    Raises:
      UserError: a directory is given twice, has no such file, or has a malformed one.
    """
    paths = [files.absolute(directory) for directory in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice: name each run once")
    runs = []
    for name, path in zip(names_of(directories, names), paths, strict=True):
        if not files.is_directory(path):
            raise UserError(f"{path}: no such directory")
        contents = _read(path, Evaluation), _read(path, Tasks), _read(path, Attention)
        runs.append(Run(name, *contents))
        if not any(contents):
            listed = ", ".join(of.file for of in (Evaluation, Tasks, Attention))
            raise UserError(f"{path} has none of {listed}: evaluate that run first")
    return runs


def read_file(directory: str, of: type[F]) -> F:
    """Reads a directory's `Evaluation`, `Tasks` or `Attention`.

    Raises:
      UserError: the file does not exist, cannot be read, or is malformed.
    """
    if content := _read(directory, of):
        return content
    path = os.path.join(directory, of.file)
    raise UserError(f"{path} cannot be read (no such file): evaluate that run first")


def _read(directory: str, of: type[F]) -> F | None:
    path = os.path.join(directory, of.file)
    try:
        content = json_files.load(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("kind", of.kind) != of.kind:
        kind = repr(content.get("kind")) if isinstance(content, dict) else "something else"
        raise UserError(f"{path} must be of the kind {of.kind!r}, and is {kind}")
    try:
        result = _parsed(content, of, "")
        _check_documents(result)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not result.results:
        raise UserError(f"{path}: results is empty")
    return result


def _check_documents(result: object) -> None:
    """Raises ValueError unless all lists of documents are equally long."""
    if not isinstance(result, Evaluation):
        return
    for i, targets in enumerate(result.targets):
        if not len(targets.documents) == len(targets.tokens) == len(targets.bytes):
            raise ValueError(f"targets[{i}] must have tokens and bytes of each document")
    for i, row in enumerate(result.results):
        targets = result.targets_of(row.set)
        if targets and row.document_losses and len(row.document_losses) != len(targets.documents):
            raise ValueError(f"results[{i}].document_losses must have one of each document")


def _parsed(value: Any, kind: Any, where: str) -> Any:
    """A part of a file as a type. Raises ValueError if it does not have that type."""
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if kind is object:
        return value
    if kind is float:
        return value if _is_number(value) else None
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list")
        of_item = typing.get_args(kind)[0]
        return tuple(_parsed(item, of_item, f"{where}[{i}]") for i, item in enumerate(value))
    if not hasattr(kind, "__dataclass_fields__"):
        requirement, is_met = kind.__metadata__
        if not is_met(value):
            raise ValueError(f"{where} must be {requirement}, and is {value!r:.40}")
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object")
    parts = {}
    for field in dataclasses.fields(kind):
        key = field.metadata.get("key", field.name)
        path = f"{where}.{key}".lstrip(".")
        if key in value:
            parts[field.name] = _parsed(value[key], _kinds(kind)[field.name], path)
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{path} is missing")
    return kind(**parts)


@functools.cache
def _kinds(of_class: type) -> dict:
    return typing.get_type_hints(of_class, include_extras=True)
