"""The language that names sources of text: `data.train`, `data.evaluation` and --data.

quickstart:train            the quickstart's corpus, "train" or "validation"
tfds:NAME[:SPLIT]           a TFDS text dataset, by name or directory
prepared:DIR                what bipe_jax.data.prepare wrote
examples:GLOBS              JSONL shards of examples, see bipe_jax/data/examples.py
synthetic:NAME(OPTIONS)     examples that are computed, see bipe_jax/synthetic
scrolls:DIR/TASK(OPTIONS)   a data set of SCROLLS as examples, see bipe_jax/data/scrolls.py
a/*.jsonl,b/*.jsonl.zst     globs of JSONL shards, separated by commas
KIND:PATH                   a source of a plug-in, see `plugins`
SOURCE#A|B                  only the sets A and B of a source
SOURCE@0.7; SOURCE@0.3      a mixture by weight
SOURCE; SOURCE              of examples, what is evaluated on
"""

import dataclasses
import math

from bipe_jax import plugins
from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean

QUICKSTART, TFDS, PREPARED, JSONL = "quickstart", "tfds", "prepared", "jsonl"
EXAMPLES, SYNTHETIC, SCROLLS = "examples", "synthetic", "scrolls"
WORDS = "symbols:"  # what a value of `tokenizer.path` begins with that is a list of words
FILES = (JSONL, EXAMPLES)  # kinds whose shards are files of lines
OF_EXAMPLES = (EXAMPLES, SYNTHETIC, SCROLLS)  # kinds whose documents are examples
OWN = (QUICKSTART, TFDS, PREPARED, *OF_EXAMPLES)  # the kinds that are written before a colon


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of documents.

    Attributes:
      text: as it was written, without a weight.
      kind: "quickstart", "tfds", "prepared", "jsonl", "examples", "synthetic", "scrolls", or the name
        of a plug-in.
      path: what follows the kind: a split, a dataset, a directory, globs, or a task.
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
    """The source that a text names. Whether it exists is seen when it is opened.

    Raises:
      UserError: the kind is bipe_jax's own and a plug-in's.
    """
    named, _, sets = text.partition("#")
    kind, colon, path = named.partition(":")
    if not colon or kind not in OWN + plugins.names(plugins.SOURCES):
        kind, path = JSONL, named
    if kind in OWN:
        plugins.find(plugins.SOURCES, kind, OWN)  # raises: no plug-in may have the name
    return Source(text, kind, path, tuple(sets.split("|")) if sets else ())


def plugin_of(source: Source) -> plugins.Plugin | None:
    """The plug-in whose source it is. Raises UserError: it cannot be imported."""
    return plugins.find(plugins.SOURCES, source.kind, (*OWN, JSONL))


def hint(pattern: str) -> str:
    """What may be meant by globs that match no file: a kind of source, mistyped or not installed."""
    kind, colon, path = pattern.partition(":")
    if not colon or "/" in kind or path.startswith("//"):
        return ""
    known = OWN + plugins.names(plugins.SOURCES)
    return did_you_mean(kind, known) or f" (and no installed package has a source {kind!r})"


def parse_evaluation(text: str, name: str) -> tuple[Source, ...]:
    """What is evaluated on: one source of text, or several of examples separated by ";".

    Raises:
      UserError: it is several sources, and not all are of examples. The message names `name`.
    """
    parsed = tuple(parse_source(part.strip()) for part in text.split(";"))
    if len(parsed) > 1 and not all(source.kind in OF_EXAMPLES for source in parsed):
        raise UserError(
            f"{name}={text}: evaluation takes one source of text, or several of examples; mixtures by "
            "weight are for training"
        )
    return parsed


def is_of_examples(text: str) -> bool:
    """Whether what is evaluated on are examples, and not text."""
    return parse_source(text).kind in OF_EXAMPLES


def tokenizer_file(path: str) -> str:
    """The file that a value of `tokenizer.path` names; "" if it names none, but words."""
    return "" if path.startswith(WORDS) else path


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
