"""Perplexity by length, with standard errors, loss by coordinate, and coordinates unseen in training."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bipe_jax import segments
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, scoring
from bipe_jax.evaluation.protocols import Protocol
from bipe_jax.evaluation.tally import Tally
from bipe_jax.evaluation.targets import Targets
from bipe_jax.loss import LARGEST
from bipe_jax.plan import Plan

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


def training_range(
    documents: Sequence[np.ndarray],
    length: int,
    rule: segments.Rule,
    starts: Sequence[np.ndarray | None] = (),
) -> dict:
    """The range of coordinates in blocks of the training length, which a model can have seen.

    Args:
      documents: (T,) tokens each. starts: those of segments, see `segments.coordinates`; (T,) each, or None.

    Returns:
      "position", "segment", "offset", ...: the largest value. "segments": the mean number of segments.
    """
    pairs = list(zip(documents, starts or [None] * len(documents), strict=True))
    ends = np.cumsum([len(tokens) // length for tokens, _ in pairs])  # of the blocks' numbers
    step = max(-(-int(ends[-1]) // _TRAINING_BLOCKS), 1)
    blocks = []
    for number in range(0, int(ends[-1]), step):
        tokens, marks = pairs[which := int(np.searchsorted(ends, number, side="right"))]
        start = (number - int(ends[which - 1] if which else 0)) * length
        part = slice(start, start + length)
        blocks.append((tokens[part], None if marks is None else marks[part]))
    # If all documents are shorter than a block, they are the blocks.
    blocks = blocks or [(tokens, marks) for tokens, marks in pairs if len(tokens)]
    largest: dict[str, int] = {}
    counts = []
    for block, marks in blocks:
        coordinates = segments.coordinates(block, rule, starts=marks)
        largest = {n: max(largest.get(n, 0), int(x.max())) for n, x in coordinates.items()}
        counts.append(int(coordinates["segment"][-1]) + 1)
    return largest | {"position": length - 1, "segments": float(np.mean(counts))}


class Evaluation:
    """The scores of a model on the targets of some sets, at each length.

    It scores any parameters of the model's shapes without compiling again.

    Args:
      loaded_model: the model, of which the parameters are not used.
      targets: of each set.
      lengths: in tokens, in any order. protocol: see `protocols`.
      progress: called with a line for each result.
      drawn: see `scoring.Scorer`.

    Raises:
      UserError: the model cannot run at these lengths.
    """

    def __init__(
        self,
        loaded_model: loaded.LoadedModel,
        targets: Sequence[Targets],
        lengths: Sequence[int],
        protocol: Protocol,
        progress: Callable[[str], object] = lambda text: None,
        drawn: bool = False,
    ):
        config = loaded_model.config
        self._lengths = sorted(set(lengths))
        check_lengths(config, self._lengths)
        self._scorer, self._rule = scoring.Scorer(loaded_model, drawn), loaded_model.rule
        self._targets, self._protocol, self._progress = targets, protocol, progress
        self._trained = {
            of_set.set: training_range(
                [document.tokens for document in of_set.documents],
                config.sequence_length,
                self._rule,
                [document.starts for document in of_set.documents],
            )
            for of_set in targets
        }

    def tallies(self, params: dict) -> Iterator[tuple[Targets, int, Tally]]:
        """Yields each set, each length, and the sums over its targets.

        Args:
          params: sharded over the model's mesh.
        """
        for of_set in self._targets:
            texts = [document.tokens for document in of_set.documents]
            starts = [document.starts for document in of_set.documents]
            for length in self._lengths:
                windows = [
                    window
                    for number, document in enumerate(of_set.documents)
                    for first in document.stretches
                    for window in self._protocol.windows(number, first, length)
                ]
                tally = Tally(of_set, length, self._rule, self._trained[of_set.set])
                scores = self._scorer(params, texts, windows, length, starts)
                for window, (log_probs, _) in zip(windows, scores, strict=True):
                    tally.add(window, log_probs)
                yield of_set, length, tally

    def __call__(self, params: dict) -> dict:
        """Scores parameters that are sharded over the model's mesh.

        Returns:
          "targets": those of each set. "results": a row for each set and length. "breakdowns": the loss
          by coordinate of the targets. "unseen": how far coordinates exceed those in training.
          docs/explanation/evaluation.md describes them.

        Raises:
          UserError: the loss is not finite, or too large for a perplexity.
        """
        result = {"targets": [of_set.to_json() for of_set in self._targets]}
        result |= {"results": [], "breakdowns": [], "unseen": []}
        for of_set, length, tally in self.tallies(params):
            if not tally.loss < LARGEST:
                raise UserError(
                    f"the loss of {of_set.set} at {length:,} tokens is {tally.loss:g} nats: these "
                    "parameters have diverged; evaluate an earlier step"
                )
            row = tally.row()
            result["results"].append(row)
            result["breakdowns"] += tally.breakdowns()
            result["unseen"] += tally.unseen()
            self._progress(f"{of_set.set}, {length:,} tokens: perplexity {row['perplexity']:.2f}")
        return result
