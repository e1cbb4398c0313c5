"""Perplexity by length: the same target tokens scored with ever longer contexts to their left.

A *window* is a stretch of one document: its targets are as many tokens as the shortest length. At
length l the model sees the l tokens before the last target, so that the context grows and the
targets stay. Only documents long enough for the longest length take part.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import inference, metrics, model, positions, segments, sharding
from bipe_jax.errors import UserError
from bipe_jax.loss import log_probs


@dataclasses.dataclass(frozen=True)
class Window:
    """The targets tokens[end - shortest + 1 : end + 1] of one document, by its number."""

    document: int
    end: int


def check_lengths(config, lengths: Sequence[int]) -> None:
    """Raises UserError if the model cannot be run at these lengths."""
    if not lengths or min(lengths) < 2:
        raise UserError(f"evaluation.lengths={lengths} must be lengths of at least 2 tokens")
    for entry in positions.absolute(config):
        size = entry.options.get("size", config.sequence_length)
        if entry.kind == "learned" and entry.coordinate == "position" and max(lengths) > size:
            raise UserError(
                f"evaluation.lengths: the learned table of position ends at {size} tokens; the model "
                f"has nothing for length {max(lengths)}"
            )


def choose_windows(
    document_lengths: Sequence[int], lengths: Sequence[int], limit: int
) -> list[Window]:
    """At most `limit` windows whose targets do not overlap, spread evenly over all documents.

    Args:
      document_lengths: tokens of each document.
      lengths: the lengths to evaluate at.
    """
    shortest, longest = min(lengths), max(lengths)
    candidates = [
        Window(document, end)
        for document, length in enumerate(document_lengths)
        for end in range(longest, length, shortest)
    ]
    if len(candidates) > limit:
        chosen = np.linspace(0, len(candidates) - 1, limit).round().astype(int)
        candidates = [candidates[i] for i in chosen]
    return candidates


def ratio_and_error(totals: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Sum of totals over sum of counts, and its standard error over documents.

    The error is that of a ratio estimator with documents as the sampled units (Cochran 1977,
    equation 2.46, no finite-population correction); NaN with fewer than two documents.
    """
    ratio = totals.sum() / counts.sum()
    n = len(totals)
    if n < 2:
        return float(ratio), math.nan
    squares = ((totals - ratio * counts) ** 2).sum()
    return float(ratio), float(math.sqrt(n / (n - 1) * squares) / counts.sum())


class Scorer:
    """Scores windows with one model, on all devices; compiles once for each length."""

    def __init__(self, placed: inference.Placed):
        self._placed = placed
        self._run = jax.jit(functools.partial(_last_log_probs, placed.config), static_argnums=3)

    def __call__(self, documents, windows: Sequence[Window], length: int, shortest: int):
        """Scores the targets of each window with `length` tokens of input.

        Memory is linear in length: logits are made for the targets only, attention is chunked.

        Returns:
          (log-probabilities (windows, shortest) float32, segment statistics of the inputs).
        """
        config, mesh = self._placed.config, self._placed.mesh
        devices = sharding.batch_shards(mesh)
        rows = max(config.evaluation.batch_tokens // length // devices, 1) * devices
        rows = min(rows, -(-len(windows) // devices) * devices)
        scores, statistics = [], []
        for first in range(0, len(windows), rows):
            some = windows[first : first + rows]
            padded = [*some, *[some[-1]] * (rows - len(some))]
            block = np.stack([documents[w.document][w.end - length : w.end + 1] for w in padded])
            inputs = block[:, :-1]
            coordinates = segments.coordinates(inputs, self._placed.rule)
            batch = {"tokens": inputs, **coordinates}
            batch = jax.device_put(batch, sharding.batch_sharding(mesh))
            with jax.set_mesh(mesh):
                score = self._run(self._placed.params, batch, block[:, -shortest:], shortest)
            scores.append(np.asarray(score)[: len(some)])
            statistics.append(
                metrics.segment_statistics(coordinates["segment"], coordinates["offset"])
            )
        mean = {k: float(np.mean([s[k] for s in statistics])) for k in statistics[0]}
        return np.concatenate(scores), mean


def _last_log_probs(config, params, batch, targets, count: int):
    hidden, kernel = model.hidden(config, params, batch)
    # Any chunk that divides will do: the logits of so few tokens are small.
    chunk = math.gcd(count, config.loss_chunk)
    return log_probs(hidden[:, -count:].astype(kernel.dtype), kernel, jnp.asarray(targets), chunk)


def by_length(
    config, params, documents, byte_lengths, lengths, progress=lambda text: None
) -> list[dict]:
    """Perplexity of each data set at each length.

    Args:
      config: a resolved config. params: its parameters.
      documents: {"set": str, "tokens": (T,) int32} each.
      byte_lengths: (V,) bytes of text of each token id.
      lengths: tokens of input, any order.
      progress: called with a line now and then.

    Returns:
      A row for each set and length: "set", "length", "perplexity" and "perplexity_error" (standard
      error over documents), "loss" (nats a token) and "loss_error", "bits_per_byte", "tokens"
      (targets scored), "documents", "documents_too_short", and the statistics of segments.

    Raises:
      UserError: no document is long enough, or the model cannot run at these lengths.
    """
    lengths = sorted(set(lengths))
    check_lengths(config, lengths)
    shortest = lengths[0]
    sets: dict[str, list[np.ndarray]] = {}
    for document in documents:
        sets.setdefault(document["set"], []).append(document["tokens"])
    scorer = Scorer(inference.place(config, params))
    rows = []
    for name, held in sets.items():
        windows = choose_windows([len(t) for t in held], lengths, config.evaluation.windows)
        if not windows:
            progress(f"{name}: no document has {lengths[-1] + 1} tokens; left out")
            continue
        owners = np.array([w.document for w in windows])
        targets = np.stack([held[w.document][w.end - shortest + 1 : w.end + 1] for w in windows])
        text_bytes = int(byte_lengths[targets].sum())
        for length in lengths:
            scores, statistics = scorer(held, windows, length, shortest)
            present = np.unique(owners)
            losses = -scores.sum(axis=1, dtype=np.float64)
            totals = np.array([losses[owners == d].sum() for d in present])
            counts = np.array([(owners == d).sum() * shortest for d in present], np.float64)
            loss, error = ratio_and_error(totals, counts)
            perplexity = metrics.perplexity(loss)
            rows.append(
                {
                    "set": name,
                    "length": length,
                    "perplexity": perplexity,
                    "perplexity_error": perplexity * error,
                    "loss": loss,
                    "loss_error": error,
                    "bits_per_byte": totals.sum() / math.log(2) / text_bytes,
                    "tokens": int(counts.sum()),
                    "documents": len(present),
                    "documents_too_short": sum(len(t) <= lengths[-1] for t in held),
                    **statistics,
                }
            )
            progress(f"{name}, {length} tokens: perplexity {perplexity:.2f}")
    if not rows:
        raise UserError(
            f"evaluation: no document has {lengths[-1] + 1} tokens: choose shorter --lengths"
        )
    return rows
