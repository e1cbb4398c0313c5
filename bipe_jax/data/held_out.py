"""Whether text is held out: that evaluation and training share no shard and no documents.

Shards are compared by their content, and documents by the text at the start of each shard: a file under
another name, compressed, rewritten by `reframe` or prepared is recognised.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

from bipe_jax import synthetic
from bipe_jax.config import spec
from bipe_jax.config.spec import Shard, Source
from bipe_jax.data import identity, lines, prepared, shards, sources
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan

_DOCUMENTS, _BYTES = 64, 1 << 20  # of text at the start of each shard
_SHORTEST = 32  # characters: shorter documents are repeated by chance
_SHARED = 0.1  # the largest share of a shard's documents that may be repeated by chance
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Sample:
    """The first documents of a shard: its path, and digests of their texts by set."""

    path: str
    digests: frozenset[tuple[str, str]]

    def of_sets(self, *choices: Sequence[str]) -> frozenset[str]:
        """The digests of documents whose set is in each of the choices; () chooses all."""
        return frozenset(
            digest
            for name, digest in self.digests
            if all(not sets or name in sets for sets in choices)
        )


def sample(source: Source) -> list[Sample]:
    """The first documents of each shard of a source; [] of prepared data of an earlier version.

    Raises:
      UserError: there is no such source.
    """
    if source.kind == spec.SYNTHETIC:
        return []  # its splits are drawn apart, and short examples are repeated by chance
    if source.kind == spec.PREPARED:
        samples = prepared.open_prepared(source).documents
        return [Sample(path, frozenset(map(tuple, digests))) for path, digests in samples]
    if source.kind in spec.FILES:
        paths, first = shards.find(source.path), _first_of_file
    else:
        opened = sources.open_source(source)
        paths, first = opened.shards, lambda path: opened.read(opened.shards.index(path))

    def of_shard(path: str) -> Sample:
        documents = (d for d, *_ in itertools.islice(first(path), _DOCUMENTS))
        long = (d for d in documents if len(d["text"]) >= _SHORTEST)
        return Sample(path, frozenset((d["set"], _digest(d["text"])) for d in long))

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(of_shard, paths))


def _first_of_file(path: str) -> Iterator[tuple[dict]]:
    """Yields the documents at the start of a JSONL shard, as far as it can be read."""
    text = bytearray()
    try:
        for chunk in shards.chunks(path):
            if chunk is None or len(text) > _BYTES:
                break
            text += chunk[1]
        else:
            text += b"\n"
    except (shards.Damage, UserError):  # whoever reads the shard raises it
        pass
    for line in text.split(b"\n")[:-1]:
        try:
            yield (lines.parse(line),)
        except lines.BadLine:
            continue


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check(config: Plan) -> None:
    """Checks that the evaluation shares no shard and no documents with the training.

    Args:
      config: with its shards.

    Raises:
      UserError: it does; or a source does not exist.
    """
    for evaluated in config.evaluated:
        if evaluated.kind == spec.SYNTHETIC:
            _check_split(config, evaluated)
        else:
            _check(config, evaluated)


def _check_split(config: Plan, evaluated: Source) -> None:
    """Raises UserError unless a synthetic task is evaluated on another split than it is trained on."""
    for source in (evaluated, *config.training.sources):
        if source.kind == spec.SYNTHETIC:
            split = synthetic.parse(source.path).split
            wanted = "test" if source is evaluated else "train"
            if split != wanted:
                key = "evaluation" if source is evaluated else "train"
                raise UserError(
                    f"config.data.{key} has the split {split!r} of {source.text!r}: set split={wanted}, so "
                    "that the evaluation is held out"
                )


def _check(config: Plan, evaluated: Source) -> None:
    sets = config.data.sets
    shards_of_evaluation, samples = _shards(evaluated), _samples(evaluated, sets)
    for source, known in zip(config.training.sources, config.shards, strict=True):
        if source.sets and evaluated.sets and not set(source.sets) & set(evaluated.sets):
            continue
        read = {*(known if source.kind in spec.FILES else _shards(source))}
        shared = [shard.path for shard in shards_of_evaluation if shard.digest and shard in read]
        shared = shared or _repeated(samples, _samples(source, sets))
        if shared:
            raise UserError(
                f"config.data.evaluation={evaluated.text!r} shares {shared[0]} with config.data.train: "
                "evaluate on text that is held out"
            )


def _shards(source: Source) -> Sequence[Shard]:
    """The shards of text that a source reads, or was prepared from."""
    if source.kind == spec.PREPARED:
        return prepared.open_prepared(source).shards
    return identity.of_source(source) if source.kind in spec.FILES else ()


def _samples(source: Source, sets: Sequence[str]) -> dict[str, frozenset[str]]:
    """Path of a shard -> the digests of its first documents of the sets that are read."""
    return {s.path: s.of_sets(sets, source.sets) for s in sample(source)}


def _repeated(one: dict[str, frozenset[str]], other: dict[str, frozenset[str]]) -> list[str]:
    """The shards of either side whose documents the other side has too."""
    sides = (one, frozenset().union(*other.values())), (other, frozenset().union(*one.values()))
    return [
        path
        for side, theirs in sides
        for path, digests in side.items()
        if digests and len(digests & theirs) >= _SHARED * len(digests)
    ]
