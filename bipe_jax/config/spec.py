"""The language that names sources of text: `data.train`, `data.evaluation` and --data.

quickstart:train            the quickstart's corpus, "train" or "validation"
tfds:NAME[:SPLIT]           a TFDS text dataset, by name or directory
prepared:DIR                what bipe_jax.data.prepare wrote
a/*.jsonl,b/*.jsonl.zst     globs of JSONL shards, separated by commas
SOURCE#A|B                  only the sets A and B of a source
SOURCE@0.7; SOURCE@0.3      a mixture by weight
"""

import dataclasses
import math

from bipe_jax.errors import UserError

QUICKSTART, TFDS, PREPARED, JSONL = "quickstart", "tfds", "prepared", "jsonl"


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of documents.

    Attributes:
      text: as it was written, without a weight.
      kind: "quickstart", "tfds", "prepared" or "jsonl".
      path: what follows the kind: a split, a dataset, a directory, or globs.
      sets: names of the sets to keep; () keeps all.
    """

    text: str
    kind: str
    path: str
    sets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard of a source. Shards are equal if their contents are, see `data.identity`.

    Attributes:
      path: where it is read, or was read.
      size: in bytes. digest: of its content; "" if that could not be read.
    """

    path: str = dataclasses.field(compare=False)
    size: int
    digest: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources and their shares of the blocks, which sum up to 1."""

    text: str
    sources: tuple[Source, ...]
    shares: tuple[float, ...]


def parse_source(text: str) -> Source:
    """The source that a text names. Whether it exists is seen when it is opened."""
    named, _, sets = text.partition("#")
    kind, colon, path = named.partition(":")
    if not colon or kind not in (QUICKSTART, TFDS, PREPARED):
        kind, path = JSONL, named
    return Source(text, kind, path, tuple(sets.split("|")) if sets else ())


def parse_evaluation(text: str, name: str) -> Source:
    """The one source that is evaluated on. Raises UserError, which names `name`, for a mixture."""
    if ";" in text:
        raise UserError(
            f"{name}={text}: evaluation takes one source; mixtures by weight are for training"
        )
    return parse_source(text)


def parse_mixture(text: str) -> Mixture:
    """One source, or several separated by ";", each with its weight after "@".

    Raises:
      UserError: it is malformed, names a source twice, or mixes prepared data with other sources.
    """
    sources: list[Source] = []
    weights: list[float] = []
    for part in text.split(";"):
        name, weight = _split_weight(part)
        sources.append(parse_source(name))
        weights.append(weight)
    if not all(s.text and 0 < w < math.inf for s, w in zip(sources, weights, strict=True)):
        raise UserError(
            f"config.data.train={text!r} must be a source, or several with weights above 0, such as "
            "'books/*.jsonl@0.7; code/*.jsonl@0.3'"
        )
    if len({source.text for source in sources}) < len(sources):
        raise UserError(f"config.data.train={text!r} names a source twice")
    if len({source.kind == PREPARED for source in sources}) > 1:
        raise UserError("config.data.train mixes prepared data with other sources: prepare all")
    total = sum(weights)
    return Mixture(text, tuple(sources), tuple(weight / total for weight in weights))


def _split_weight(part: str) -> tuple[str, float]:
    name, at, weight = part.rpartition("@")
    try:
        return (name.strip(), float(weight)) if at else (part.strip(), 1.0)
    except ValueError:  # an "@" of the path
        return part.strip(), 1.0
