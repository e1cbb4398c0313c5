"""Reads held-out documents, and tokenises those that have targets (see `targets`).

Of several processes the first one reads and tokenises, in threads, and gives the others what it has chosen.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple

import jax

from bipe_jax import collectives, hardware, segments
from bipe_jax.config import spec
from bipe_jax.data import marked, prepared, sources
from bipe_jax.data.prefetch import ordered_map
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import targets
from bipe_jax.evaluation.protocols import Protocol
from bipe_jax.evaluation.targets import Document, Targets
from bipe_jax.plan import Plan

_LOG = logging.getLogger(__name__)


class Reader(NamedTuple):
    """A source of held-out documents.

    Attributes:
      raw: returns an iterator over all documents, with "set" and "text" or "tokens", in a fixed order.
      encode: a raw document -> {"tokens": (T,), "bytes": (T,)}, with segmenters also "starts".
    """

    raw: Callable[[], Iterator[dict]]
    encode: Callable[[dict], dict]


def reader(config: Plan, tokenizer: Tokenizer, source: spec.Source, sets: Sequence[str]) -> Reader:
    """The reader of a source; `config.data.on_error` applies.

    Its iterators raise UserError: the source cannot be read, has none of the sets, or was prepared with
    another tokenizer.
    """
    names = segments.segmenters_of(config)
    if source.kind == spec.PREPARED:
        return Reader(lambda: prepared.documents(source, sets, tokenizer, names), lambda row: row)
    policy = sources.policy_of(config)

    def encode(document):
        encoded, sizes = marked.encode_whole(tokenizer, document, names)
        return encoded | {"bytes": sizes}

    return Reader(lambda: sources.documents(source, sets, policy), encode)


def check(of: Reader, context: int) -> None:
    """Checks that a document has targets, as cheaply as possible.

    Documents are read until one is long enough.

    Raises:
      UserError: the source cannot be read, or no document is long enough.
    """
    long = (document for document in of.raw() if _most_tokens(document) > context)
    if not any(len(of.encode(document)["tokens"]) > context for document in long):
        raise too_short(context)


def too_short(context: int) -> UserError:
    """The error of data without a document that is long enough for a context."""
    return UserError(
        f"evaluation: no document has {context + 1:,} tokens: choose a smaller --context "
        "(config.evaluation.context, which is the longest of config.evaluation.lengths by default)"
    )


def read(of: Reader, protocol: Protocol, context: int, tokens: int) -> list[Targets]:
    """The targets of each set that has a document with more than `context` tokens.

    All processes of a program call it.

    Args:
      tokens: targets of each set, about; 0: all.

    Raises:
      UserError: the source cannot be read, or no document is long enough.
    """
    if jax.process_count() == 1:
        return _read(of, protocol, context, tokens)
    read_by_first = collectives.bytes_of_first_process(
        lambda: targets.to_bytes(_read(of, protocol, context, tokens))
    )
    return targets.from_bytes(read_by_first)


def _read(of: Reader, protocol: Protocol, context: int, tokens: int) -> list[Targets]:
    budget = max(tokens // protocol.size, 1) if tokens else None
    sets: dict[str, _Choice] = {}
    for document in of.raw():
        choice = sets.setdefault(document["set"], _Choice(document["set"], protocol, budget))
        choice.add(_identity(document), _most_tokens(document) > context)
    with ThreadPoolExecutor(threads := hardware.cores()) as pool:
        while wanted := {(c.name, identity) for c in sets.values() for identity in c.to_visit()}:
            for name, identity, row in _encoded(of, wanted, pool, 2 * threads):
                sets[name].visit(identity, row if len(row["tokens"]) > context else None)
    chosen = [choice.targets() for choice in sets.values()]
    for empty in (each for each in chosen if not each.documents):
        _LOG.info(f"{empty.set}: no document has {context + 1:,} tokens; left out")
    if not any(each.documents for each in chosen):
        raise too_short(context)
    return [each for each in chosen if each.documents]


def _encoded(
    of: Reader, wanted: set[tuple[str, str]], pool: Executor, ahead: int
) -> Iterator[tuple[str, str, dict]]:
    """Yields (set, identity, encoded document) of the wanted documents, each once."""
    left = set(wanted)

    def matching():
        for document in of.raw():
            if (key := (document["set"], _identity(document))) in left:
                left.remove(key)
                yield key, document
            if not left:
                return

    for (name, identity), row in ordered_map(
        pool, lambda item: (item[0], of.encode(item[1])), matching(), ahead
    ):
        yield name, identity, row


def _identity(document: dict) -> str:
    """A digest of a document's text, or of its tokens where there is no text."""
    text = document.get("text")
    return targets.digest(document["tokens"].tobytes() if text is None else text.encode())


def _most_tokens(document: dict) -> int:
    """A bound of the number of tokens of a document: each is a byte of its text, but for BOS."""
    text = document.get("text")
    return len(document["tokens"]) if text is None else len(text.encode()) + 1


class _Choice:
    """The choice of the documents of one set."""

    def __init__(self, name: str, protocol: Protocol, budget: int | None):
        self.name, self._protocol, self._budget = name, protocol, budget
        self._all: dict[str, bool] = {}  # identity -> whether it may be long enough
        self._count = 0
        self._visited: dict[str, Document | None] = {}

    def add(self, identity: str, is_long: bool) -> None:
        self._all[identity] = is_long
        self._count += 1

    def _documents(self) -> list[Document]:
        return [d for _, d in sorted(self._visited.items()) if d is not None]

    def _stretches(self) -> list[range]:
        return [self._protocol.stretches(len(d.tokens)) for d in self._documents()]

    def to_visit(self) -> list[str]:
        """The identities of the documents to visit next; [] if there are enough, or no more."""
        counts = [len(of_document) for of_document in self._stretches()]
        left = sorted(i for i, is_long in self._all.items() if is_long and i not in self._visited)
        return left[: targets.visits(counts, self._budget)]

    def visit(self, identity: str, row: dict | None) -> None:
        """row: of a document that is long enough."""
        document = None
        if row is not None:
            document = Document(identity, row["tokens"], row["bytes"], row.get("starts"))
        self._visited[identity] = document

    def targets(self) -> Targets:
        stretches = self._stretches()
        counts = targets.shares([len(of_document) for of_document in stretches], self._budget)
        documents = tuple(
            dataclasses.replace(document, stretches=targets.spread(of_document, count))
            for document, of_document, count in zip(
                self._documents(), stretches, counts, strict=True
            )
            if count
        )
        collection = targets.digest("".join(sorted(self._all)).encode())
        return Targets(self.name, documents, self._protocol.size, collection, self._count)
