"""Sums over the targets of one set at one length: losses by document and by coordinate, and segments."""

import math
from collections.abc import Mapping

import numpy as np

from bipe_jax import segments
from bipe_jax.data.survey import Histogram
from bipe_jax.evaluation.protocols import Window
from bipe_jax.evaluation.targets import Targets
from bipe_jax.loss import LARGEST
from bipe_jax.loss import perplexity as perplexity_of
from bipe_jax.report.statistics import bootstrap

_LARGEST_COORDINATE = 2**31 - 1


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


class _Breakdown:
    """The losses of targets by bins of a coordinate."""

    def __init__(self, name: str):
        self._starts = edges(name, _LARGEST_COORDINATE)
        self._sums = np.zeros(len(self._starts))
        self._counts = np.zeros(len(self._starts), np.int64)

    def add(self, values: np.ndarray, losses: np.ndarray) -> None:
        which = np.searchsorted(self._starts, values, side="right") - 1
        self._counts += np.bincount(which, minlength=len(self._starts))
        self._sums += np.bincount(which, losses, minlength=len(self._starts))

    def bins(self) -> list[dict]:
        """{"from", "to" (inclusive), "loss" (nats a token), "tokens"} each; empty bins are left out."""
        return [
            {
                "from": int(self._starts[i]),
                "to": int(self._starts[i + 1]) - 1,
                "loss": float(self._sums[i] / self._counts[i]),
                "tokens": int(self._counts[i]),
            }
            for i in np.flatnonzero(self._counts)
        ]


class Tally:
    """The sums over the targets of one set at one length, window by window.

    Args:
      targets: of the set. length: in tokens.
      trained: the largest value of each coordinate in training, see `perplexity.training_range`.

    Attributes:
      losses: the summed loss of each document's targets in nats, (documents,) float64.
    """

    def __init__(
        self, targets: Targets, length: int, rule: segments.Rule, trained: Mapping[str, float]
    ):
        self._targets, self._rule, self._trained = targets, rule, trained
        self._of_part = {"set": targets.set, "length": length}
        self._tokens = np.array([len(d.stretches) * targets.size for d in targets.documents])
        self._bytes = np.array([d.target_bytes(targets.size) for d in targets.documents])
        self.losses = np.zeros(len(targets.documents))
        self._by = {name: _Breakdown(name) for name in ("position", "offset", "segment")}
        self._unseen: dict[str, list[int]] = {}  # coordinate -> [largest, targets beyond training]
        self._segments, self._largest_segment, self._windows = Histogram(), 0, 0

    def add(self, window: Window, log_probs: np.ndarray) -> None:
        """Adds the targets of a window, with their log-probabilities (scored,)."""
        document = self._targets.documents[window.document]
        starts = document.starts
        blocks = segments.coordinates(
            document.tokens[window.start : window.end + 1],
            self._rule,
            starts=None if starts is None else starts[window.start : window.end + 1],
        )
        losses = -log_probs.astype(np.float64)
        self.losses[window.document] += losses.sum()
        # The position is of the token before the target, 0 … length - 1; others are of the target.
        before, own = slice(-window.scored - 1, -1), slice(-window.scored, None)
        for name, breakdown in self._by.items():
            breakdown.add(blocks[name][before if name == "position" else own], losses)
        for name, values in blocks.items():
            unseen = self._unseen.setdefault(name, [0, 0])
            unseen[0] = max(unseen[0], int(values[before].max()))
            unseen[1] += int((values[before] > self._trained[name]).sum())
        first = np.flatnonzero(blocks["offset"][:-1] == 0)
        self._segments.add(np.diff(np.append(first, len(blocks["offset"]) - 1)))
        self._largest_segment = max(self._largest_segment, int(blocks["segment"][-2]))
        self._windows += 1

    @property
    def loss(self) -> float:
        """The mean loss in nats a token."""
        return float(self.losses.sum() / self._tokens.sum())

    def row(self) -> dict:
        """The result of the set at the length; docs/explanation/evaluation.md describes it."""
        per_token = bootstrap(self.losses, self._tokens)
        per_byte = bootstrap(self.losses, self._bytes) / math.log(2)

        def error(values: np.ndarray) -> float | None:
            return float(values.std(ddof=1)) if len(self.losses) > 1 else None

        return self._of_part | {
            "perplexity": perplexity_of(self.loss),
            "perplexity_error": error(np.exp(np.minimum(per_token, LARGEST))),
            "loss": self.loss,
            "loss_error": error(per_token),
            "bits_per_byte": float(self.losses.sum() / self._bytes.sum() / math.log(2)),
            "bits_per_byte_error": error(per_byte),
            "tokens": int(self._tokens.sum()),
            "documents": len(self.losses),
            "documents_of_set": self._targets.documents_of_set,
            "segment_tokens_mean": self._segments.mean,
            "segment_tokens_p99": self._segments.quantile(0.99),
            "segments_per_block": self._segments.total / self._windows,
            "segment_max": self._largest_segment,
            "document_losses": self.losses.tolist(),
        }

    def breakdowns(self) -> list[dict]:
        """The loss by each coordinate of the targets."""
        return [self._of_part | {"by": name, "bins": b.bins()} for name, b in self._by.items()]

    def unseen(self) -> list[dict]:
        """How far each coordinate exceeds its values in training, where targets are predicted from."""
        return [
            self._of_part
            | {"coordinate": name, "max": largest, "trained_max": self._trained[name]}
            | {"share": beyond / int(self._tokens.sum())}
            for name, (largest, beyond) in self._unseen.items()
        ]
