"""Targets: the tokens of held-out documents that are scored.

They depend on the documents' texts, the tokenizer, the protocol, `context` and a number of tokens, and not on
the lengths: whatever lengths a model is scored at, and in whatever order the data lie, the targets are the
same. Documents are visited in the order of a digest of their text, until there are enough stretches. Each
gives up to 8, evenly spaced; fewer if few are wanted, for 64 documents to be scored where there are
so many; and more if all documents together have too few.
"""

import dataclasses
import hashlib
import io
from collections.abc import Sequence

import numpy as np

_DOCUMENTS, _STRETCHES = 64, 8


def _each(budget: int) -> int:
    """How many stretches a document gives before another one is visited."""
    return min(max(budget // _DOCUMENTS, 1), _STRETCHES)


@dataclasses.dataclass(frozen=True)
class Document:
    """A document with targets.

    Attributes:
      identity: the digest of its text.
      tokens: (T,) int32. bytes: of the text that each token stands for, (T,).
      starts: of segments, see `segments.coordinates`, (T,); None without segmenters.
      stretches: the places of its stretches, see `protocols.Protocol.stretches`.
    """

    identity: str
    tokens: np.ndarray
    bytes: np.ndarray
    starts: np.ndarray | None = None
    stretches: tuple[int, ...] = ()

    def target_bytes(self, size: int) -> int:
        """The bytes of its targets, in stretches of `size` tokens."""
        return int(sum(self.bytes[f + 1 : f + 1 + size].sum() for f in self.stretches))


@dataclasses.dataclass(frozen=True)
class Targets:
    """The targets of one set.

    Attributes:
      set: its name.
      documents: those with targets, in the order of their identities.
      size: targets of a stretch.
      collection: a digest of all documents of the set, with and without targets.
      documents_of_set: their number.
    """

    set: str
    documents: tuple[Document, ...]
    size: int
    collection: str
    documents_of_set: int

    @property
    def identity(self) -> str:
        """A digest of the documents, and of which of their tokens are targets."""
        ranges = [(d.identity, d.stretches) for d in self.documents]
        return digest(repr((self.size, ranges)).encode())

    def to_json(self) -> dict:
        """What is stored of the targets; docs/explanation/evaluation.md describes it."""
        return {
            "set": self.set,
            "targets": self.identity,
            "collection": self.collection,
            "documents": [d.identity for d in self.documents],
            "tokens": [len(d.stretches) * self.size for d in self.documents],
            "bytes": [d.target_bytes(self.size) for d in self.documents],
        }


def digest(data: bytes) -> str:
    """16 hexadecimal digits of a hash."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def visits(counts: Sequence[int], budget: int | None) -> int | None:
    """How many documents to visit next.

    Args:
      counts: the stretches that each visited document has. budget: those wanted; None: all.

    Returns:
      None: all that are left.
    """
    if budget is None:
        return None
    missing = budget - sum(min(count, _each(budget)) for count in counts)
    # At least as many as before, so that there are few rounds.
    return max(-(-missing // _each(budget)), len(counts)) if missing > 0 else 0


def shares(counts: Sequence[int], budget: int | None) -> list[int]:
    """How many of its stretches each document gives, in the order of the visits."""
    if budget is None or sum(counts) <= budget:
        return list(counts)
    most = _each(budget)
    while sum(min(count, most) for count in counts) < budget:
        most += 1
    ends = np.cumsum([min(count, most) for count in counts]).clip(max=budget)
    return np.diff(ends, prepend=0).tolist()


def spread(candidates: range, count: int) -> tuple[int, ...]:
    """`count` of the candidates, evenly spaced."""
    indices = np.linspace(0, len(candidates) - 1, count).round().astype(int)
    return tuple(candidates[i] for i in indices.tolist())


def to_bytes(of_sets: Sequence[Targets]) -> bytes:
    """Targets as bytes, for other processes."""
    arrays: dict[str, np.ndarray] = {}
    for i, of_set in enumerate(of_sets):
        names = [of_set.set, of_set.collection, *(d.identity for d in of_set.documents)]
        arrays |= {f"{i}.names": np.array(names)}
        arrays |= {f"{i}.sizes": np.array([of_set.size, of_set.documents_of_set])}
        for j, document in enumerate(of_set.documents):
            of_document = dataclasses.asdict(document) | {"identity": None}
            arrays |= {
                f"{i}.{j}.{name}": np.asarray(value)
                for name, value in of_document.items()
                if value is not None
            }
    buffer = io.BytesIO()
    np.savez(buffer, sets=np.array(len(of_sets)), **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def from_bytes(data: bytes) -> list[Targets]:
    """The targets that `to_bytes` was given."""
    with np.load(io.BytesIO(data)) as arrays:

        def document(i: int, j: int, identity: str) -> Document:
            return Document(
                identity,
                arrays[f"{i}.{j}.tokens"],
                arrays[f"{i}.{j}.bytes"],
                arrays.get(f"{i}.{j}.starts"),
                tuple(arrays[f"{i}.{j}.stretches"].tolist()),
            )

        result = []
        for i in range(int(arrays["sets"])):
            name, collection, *identities = arrays[f"{i}.names"].tolist()
            size, of_set = arrays[f"{i}.sizes"].tolist()
            documents = tuple(document(i, j, d) for j, d in enumerate(identities))
            result.append(Targets(name, documents, size, collection, of_set))
    return result
