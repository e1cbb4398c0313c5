"""Perplexity by length, with standard errors, loss by coordinate, and coordinates unseen in training."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from bipe_jax import segments
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, scoring
from bipe_jax.evaluation.protocols import Protocol
from bipe_jax.loss import LARGEST
from bipe_jax.loss import perplexity as perplexity_of
from bipe_jax.plan import Plan

_RESAMPLES = 1000
_TRAINING_BLOCKS = 4096  # of each set, from which the range of coordinates in training is measured


def check_lengths(config: Plan, lengths: Sequence[int]) -> None:
    """Raises UserError if the model cannot be run at these lengths."""
    if not lengths or min(lengths) < 2:
        raise UserError(f"evaluation.lengths={lengths} must be lengths of at least 2 tokens")
    config.encodings.check_length(max(lengths))


def default_lengths(config: Plan, multiples: Sequence[int]) -> tuple[int, ...]:
    """Those multiples of the training length that the model can be run at."""

    def runs(length):
        try:
            check_lengths(config, (length,))
        except UserError:
            return False
        return True

    lengths = [config.sequence_length * multiple for multiple in multiples]
    return tuple(length for length in lengths if runs(length))


def bootstrap(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resampled ratios sum(totals) / sum(counts), (1000,), with documents drawn with replacement.

    The units are documents since the tokens of one are correlated (Efron & Tibshirani 1993, chapter 6).
    The samples depend only on the number of documents: two models, or two lengths, get the same ones.
    """
    n = len(totals)
    indices = np.random.RandomState(0).randint(0, n, (_RESAMPLES, n))
    return totals[indices].sum(axis=1) / counts[indices].sum(axis=1)


def edges(name: str, largest: int) -> np.ndarray:
    """The first value of each bin of a coordinate, (n + 1,); the last is after the largest value.

    Powers of two, and for offsets, most of which are small, each value to 8 and then half-octaves.
    """
    powers = 2 ** np.arange(0, largest.bit_length() + 1)
    starts = [0, *powers]
    if name == "offset":
        starts += [*range(9), *(powers * 3 // 2)]
    starts = np.unique(starts)
    return starts[: np.searchsorted(starts, largest, side="right") + 1]


def breakdown(name: str, values: np.ndarray, losses: np.ndarray) -> list[dict]:
    """Mean loss of the targets by bins of a coordinate (n,); empty bins are left out.

    Returns:
      {"from", "to", "loss" (nats a token), "tokens"} each; from and to are inclusive.
    """
    starts = edges(name, int(values.max()))
    which = np.searchsorted(starts, values, side="right") - 1
    counts = np.bincount(which, minlength=len(starts))
    sums = np.bincount(which, losses, minlength=len(starts))
    return [
        {
            "from": int(starts[i]),
            "to": int(starts[i + 1]) - 1,
            "loss": float(sums[i] / counts[i]),
            "tokens": int(counts[i]),
        }
        for i in np.flatnonzero(counts)
    ]


def training_range(documents: Sequence[np.ndarray], length: int, rule: segments.Rule) -> dict:
    """The range of coordinates in blocks of the training length, which a model can have seen.

    Returns:
      "position", "segment", "offset": the largest value. "segments": the mean number of segments.
    """
    blocks = [
        tokens[start : start + length]
        for tokens in documents
        for start in range(0, len(tokens) - length + 1, length)
    ]
    step = -(-len(blocks) // _TRAINING_BLOCKS) if blocks else 1
    # If all documents are shorter than a block, they are the blocks.
    blocks = blocks[::step] or [tokens for tokens in documents if len(tokens)]
    largest: dict[str, int] = {}
    counts = []
    for block in blocks:
        coordinates = segments.coordinates(block, rule)
        largest = {n: max(largest.get(n, 0), int(x.max())) for n, x in coordinates.items()}
        counts.append(int(coordinates["segment"][-1]) + 1)
    return largest | {"position": length - 1, "segments": float(np.mean(counts))}


def too_short(longest: int) -> UserError:
    """The error of data without a document that is long enough for a length."""
    return UserError(
        f"evaluation: no document has {longest + 1:,} tokens: choose shorter --lengths "
        "(config.evaluation.lengths)"
    )


class Evaluation:
    """Held-out documents and the windows of them that a model is scored on, at each length.

    It scores any parameters of the model's shapes without compiling again.

    Args:
      loaded_model: the model, of which the parameters are not used.
      documents: {"set": str, "tokens": (T,) int32, "bytes": (T,)} each; see `evaluator.documents`.
      lengths: in tokens, in any order.
      protocol: see `protocols`.
      progress: called with a line for each result.
      windows: number of windows of the shortest length, for each data set; 0: `evaluation.windows`.

    Raises:
      UserError: no document is long enough, or the model cannot run at these lengths.
    """

    def __init__(
        self,
        loaded_model: loaded.LoadedModel,
        documents: Iterable[dict],
        lengths: Sequence[int],
        protocol: Protocol,
        progress: Callable[[str], object] = lambda text: None,
        windows: int = 0,
    ):
        config = loaded_model.config
        self._lengths = sorted(set(lengths))
        check_lengths(config, self._lengths)
        self._scorer, self._rule = scoring.Scorer(loaded_model), loaded_model.rule
        self._progress = progress
        sets: dict[str, list[np.ndarray]] = {}
        self._bytes: dict[str, list[np.ndarray]] = {}
        for document in documents:
            sets.setdefault(document["set"], []).append(document["tokens"])
            self._bytes.setdefault(document["set"], []).append(document["bytes"])
        longest = self._lengths[-1]
        self._sets = {n: of for n, of in sets.items() if any(len(t) > longest for t in of)}
        for name in [name for name in sets if name not in self._sets]:
            progress(f"{name}: no document has {longest + 1:,} tokens; left out")
        if not self._sets:
            raise too_short(longest)
        self.trained = {
            name: training_range(of_set, config.sequence_length, self._rule)
            for name, of_set in self._sets.items()
        }
        limit = windows or config.evaluation.windows
        self._parts = []
        for name, of_set in self._sets.items():
            sizes = [len(tokens) for tokens in of_set]
            for length in self._lengths:
                of_length = protocol.windows(sizes, length, self._lengths, limit)
                self._parts.append(self._part(name, length, of_length))
        del self._bytes

    def _part(self, name: str, length: int, windows: list) -> "_Part":
        of_set, bytes_of_set = self._sets[name], self._bytes[name]
        texts = [of_set[w.document][w.start : w.end + 1] for w in windows]
        blocks = [segments.coordinates(text, self._rule) for text in texts]

        def joined(coordinate, first, last):
            """A coordinate of the tokens `first` … `last` of each window, counted from its end."""
            return np.concatenate(
                [b[coordinate][first(w) : last] for b, w in zip(blocks, windows, strict=True)]
            )

        inputs = {n: joined(n, lambda w: 0, -1) for n in blocks[0]}
        unseen = []
        for n in blocks[0]:
            values = joined(n, lambda w: -w.scored - 1, -1)  # where targets are predicted from
            trained = self.trained[name][n]
            share = float((values > trained).mean())
            unseen.append(
                {"set": name, "length": length, "coordinate": n, "trained_max": trained,
                 "max": int(values.max()), "share": share}
            )  # fmt: skip
        targets = np.concatenate(
            [text[-w.scored :] for text, w in zip(texts, windows, strict=True)]
        )
        sizes = [bytes_of_set[w.document][w.end + 1 - w.scored : w.end + 1] for w in windows]
        sizes = np.concatenate(sizes)
        owners = np.repeat([w.document for w in windows], [w.scored for w in windows])
        present, owners = np.unique(owners, return_inverse=True)
        return _Part(
            name=name,
            length=length,
            windows=windows,
            owners=owners,
            bytes=np.bincount(owners, sizes),
            # The position is of the token before the target, 0 … length - 1; others are of the target.
            coordinates={
                "position": joined("position", lambda w: -w.scored - 1, -1),
                "offset": joined("offset", lambda w: -w.scored, None),
                "segment": joined("segment", lambda w: -w.scored, None),
            },
            unseen=unseen,
            facts={
                "tokens": len(targets),
                "documents": len(present),
                "documents_too_short": sum(len(t) <= self._lengths[-1] for t in of_set),
                **segments.statistics(inputs["segment"], inputs["offset"], len(windows)),
            },
        )

    def scores(self, params: dict) -> Iterator[tuple["_Part", np.ndarray]]:
        """Yields each set at each length, and the losses of its targets (n,), float64 nats.

        Args:
          params: sharded over the model's mesh.
        """
        for part in self._parts:
            scores = self._scorer(params, self._sets[part.name], part.windows, part.length)
            losses = -np.concatenate([log_probs for log_probs, _ in scores]).astype(np.float64)
            yield part, losses

    def __call__(self, params: dict) -> dict:
        """Scores parameters that are sharded over the model's mesh.

        Returns:
          "results": a row for each set and length: "set", "length", "perplexity", "loss" (nats a
          token) and "bits_per_byte", each with "…_error" (standard error over documents, None for a
          single one), "tokens" (targets scored), "documents", "documents_too_short", and the
          statistics of segments. "breakdowns": the loss by coordinate of the targets. "unseen": how far
          coordinates exceed those in training. docs/evaluation.md describes them.

        Raises:
          UserError: the loss is not finite, or too large for a perplexity.
        """
        result = {"results": [], "breakdowns": [], "unseen": []}
        for part, losses in self.scores(params):
            if not losses.mean() < LARGEST:
                raise UserError(
                    f"the loss of {part.name} at {part.length:,} tokens is {losses.mean():g} nats: these "
                    "parameters have diverged; evaluate an earlier step"
                )
            row = part.row(losses)
            result["results"].append(row)
            result["breakdowns"] += part.breakdowns(losses)
            result["unseen"] += part.unseen
            self._progress(
                f"{part.name}, {part.length:,} tokens: perplexity {row['perplexity']:.2f}"
            )
        return result


@dataclasses.dataclass(frozen=True)
class _Part:
    """One set at one length, without scores."""

    name: str
    length: int
    windows: list
    owners: np.ndarray  # index of each target's document, among those with targets
    bytes: np.ndarray  # of the targets of each document
    coordinates: dict  # of each target in its block, see `Evaluation._part`
    unseen: list
    facts: dict

    def loss(self, losses: np.ndarray) -> float:
        """The mean loss in nats a token."""
        return float(np.bincount(self.owners, losses).sum() / len(self.owners))

    def row(self, losses: np.ndarray) -> dict:
        totals, counts = np.bincount(self.owners, losses), np.bincount(self.owners)
        loss = self.loss(losses)
        resampled = bootstrap(totals, counts)

        def error(values):
            return float(values.std(ddof=1)) if len(totals) > 1 else None

        return {
            "set": self.name,
            "length": self.length,
            "perplexity": perplexity_of(loss),
            "perplexity_error": error(np.exp(np.minimum(resampled, LARGEST))),
            "loss": loss,
            "loss_error": error(resampled),
            "bits_per_byte": float(totals.sum() / self.bytes.sum() / math.log(2)),
            "bits_per_byte_error": error(bootstrap(totals, self.bytes) / math.log(2)),
            **self.facts,
        }

    def breakdowns(self, losses: np.ndarray) -> list[dict]:
        of_part = {"set": self.name, "length": self.length}
        return [
            of_part | {"by": n, "bins": breakdown(n, values, losses)}
            for n, values in self.coordinates.items()
        ]
