"""The identity of data: a run's shards, recognised by their content wherever they are stored.

The shards of all sources are part of a checkpoint's meta data. A run resumes with the same shards in the same
order, also if they were moved or renamed. What happens if they have changed is `data.on_change`.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from bipe_jax.config import spec
from bipe_jax.config.spec import Shard, Source
from bipe_jax.data import datasets, prepared, quickstart, scrolls, shards, sources
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan

_PIECES, _PIECE_BYTES = 4, 1 << 16  # of a file, evenly spaced from its start to its end
_THREADS = 16
_NAMED = 3  # shards that a message names

Shards = tuple[tuple[Shard, ...], ...]  # of each source


def of_source(source: Source) -> tuple[Shard, ...]:
    """The shards of a source.

    Of each file its size and 4 pieces of 64 KB are read. The digest of a file that cannot be read is "".

    Raises:
      UserError: there is no such source.
    """
    if source.kind == spec.QUICKSTART:
        return tuple(
            Shard(f"{source.text}[{i}]", len(data), _digest(data))
            for i, d in enumerate(quickstart.documents(source.path))
            for data in [d["text"].encode()]
        )
    if source.kind == spec.SYNTHETIC:
        return (Shard(source.text, len(source.path), _digest(source.path.encode())),)
    if source.kind in spec.FILES:
        paths = shards.find(source.path)
    elif source.kind == spec.PREPARED:
        paths = prepared.files(source)
    elif source.kind == spec.SCROLLS:
        paths = [scrolls.parse(source).file]
    elif source.kind != spec.TFDS:
        return sources.of_plugin(source)[0]
    else:
        paths = _tfds_files(source)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(_of_file, paths))


def count_documents(source: Source, sets: Sequence[str] = ()) -> int | None:
    """The number of documents of a source, where it is known without reading them; else None.

    Args:
      sets: names of sets to keep, besides the source's own; () keeps all.

    Raises:
      UserError: there is no such source.
    """
    if source.kind == spec.PREPARED:
        return prepared.open_prepared(source, sets).document_count
    if sets or source.sets:
        return None
    if source.kind == spec.QUICKSTART:
        return sum(1 for _ in quickstart.documents(source.path))
    if source.kind == spec.TFDS:
        builder, split = datasets.tfds_builder(source)
        return builder.info.splits[split].num_examples
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _of_file(path: str) -> Shard:
    file = epath.Path(path)
    try:
        size = file.stat().length
        data = bytearray(str(size).encode())
        with file.open("rb") as opened:
            last = max(size - _PIECE_BYTES, 0)
            for offset in sorted({last * i // (_PIECES - 1) for i in range(_PIECES)}):
                opened.seek(offset)
                data += opened.read(_PIECE_BYTES)
    except Exception:  # of many kinds, for object stores; whoever reads the shard reports it
        return Shard(path, -1, "")
    return Shard(path, size, _digest(bytes(data)))


def _tfds_files(source: Source) -> list[str]:
    builder, split = datasets.tfds_builder(source)
    return sorted(map(os.fspath, builder.info.splits[split].filepaths))


def resumed(saved: Plan, config: Plan, workdir: str) -> tuple[Shards, list[bool]]:
    """The shards that a run resumes with.

    Args:
      saved: of the run's checkpoint. config: now. workdir: of the run.

    Returns:
      The shards of each source, in the order of `saved` where they are the same; and whether the source
      has changed, so that it starts over.

    Raises:
      UserError: the data have changed, and `data.on_change` does not allow it.
    """
    _check_mixture(saved, config, workdir)
    orders, changed = [], []
    for i, source in enumerate(config.training.sources):
        now = of_source(source)
        if not saved.shards:  # a checkpoint of an earlier version: the sources' texts are equal
            orders.append(now)
            changed.append(False)
            continue
        match = _match(saved.shards[i], now, skip=config.data.on_error == "skip")
        restart = match.differs and config.data.on_change == "restart"
        goes_on = config.data.on_change == "continue" and not match.lost and not match.new
        if match.differs and not restart and not goes_on:
            raise UserError(
                f"the data {source.text!r} of the run in {workdir} have changed: {match}: restore them, or "
                "set config.data.on_change='continue' for changed shards to be read from where the run was "
                "in them, or 'restart' for all to be read from the start"
            )
        orders.append(now if restart else match.order)
        changed.append(restart)
    return tuple(orders), changed


def _check_mixture(saved: Plan, config: Plan, workdir: str) -> None:
    """Raises UserError if the sources' kinds, sets or shares are not the run's."""

    def shape(plan: Plan) -> Any:
        mixture = plan.training
        return [(s.kind, s.sets) for s in mixture.sources], mixture.shares

    same = shape(saved) == shape(config) if saved.shards else saved.training == config.training
    if not same:
        raise UserError(
            f"config.data.train={config.data.train!r}, but the run in {workdir} was started with "
            f"{saved.data.train!r}: use that value, or another --workdir"
        )


@dataclasses.dataclass(frozen=True)
class _Match:
    """The shards that there are now, in the order of those that a run was started with.

    Attributes:
      order: a shard that is missing is what it was. total: number of shards of the run.
      lost, new, changed: names of shards.
    """

    order: tuple[Shard, ...]
    total: int
    lost: list[str]
    new: list[str]
    changed: list[str]

    @property
    def differs(self) -> bool:
        return bool(self.lost or self.new or self.changed)

    def __str__(self) -> str:
        kinds = {"missing": self.lost, "new": self.new, "changed": self.changed}
        return ", ".join(
            f"{len(names)} of {self.total} shards are {kind} ({_listed(names)})"
            for kind, names in kinds.items()
            if names
        )


def _match(saved: Sequence[Shard], now: Sequence[Shard], skip: bool) -> _Match:
    """Matches shards by their content.

    Args:
      skip: whether a missing shard is no difference, but skipped as unreadable when it is read.
    """
    by_content = collections.defaultdict(list)
    by_name = {}
    for shard in now:
        if shard.digest:
            by_content[shard].append(shard)
            by_name[shard.name] = shard
    order, lost, changed = [], [], []
    for shard in saved:
        # Of several with the same content, the one of the same name.
        same = sorted(by_content[shard], key=lambda other: other.name != shard.name)
        if same:
            order.append(same[0])
            by_content[shard] = same[1:]
        elif shard.name in by_name:
            order.append(by_name[shard.name])
            if shard.digest:  # otherwise it could not be read before
                changed.append(shard.name)
        else:
            order.append(shard)
            lost.append(shard.name)
    used = {shard.path for shard in order}
    new = [shard.name for shard in now if shard.digest and shard.path not in used]
    return _Match(tuple(order), len(saved), [] if skip else lost, new, changed)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
