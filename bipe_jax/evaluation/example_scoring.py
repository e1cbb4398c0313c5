"""Which tokens of examples a model has right: those it writes, or the sets that label them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import model, segments, sharding
from bipe_jax.data import examples
from bipe_jax.evaluation import loaded
from bipe_jax.loss import score, set_logits
from bipe_jax.plan import Plan


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example as tokens.

    Attributes:
      document: see `data.examples`. row: arrays (T,), see `data.marked.encode`.
      largest: coordinate -> its largest value.
    """

    document: dict[str, Any]
    row: dict[str, np.ndarray]
    largest: dict[str, int]

    @property
    def is_prompt_and_completion(self) -> bool:
        """Whether all that is learned follows all that is not."""
        return len(self.document["learned"]) == 1 and examples.ends_with_eos(self.document)

    @property
    def has_starts(self) -> bool:
        """Whether segments begin where the text says, which a decoded text does not."""
        return "starts" in self.row

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the completion."""
        return self.row["tokens"][: int(np.flatnonzero(self.row["learned"])[0])]


class Scorer:
    """Scores examples with one model; compiles once for each width, of which each is twice the last."""

    def __init__(self, loaded_model: loaded.LoadedModel):
        self._model = loaded_model
        whole = sharding.replicated(loaded_model.mesh)
        config = loaded_model.config
        self._likeliest = jax.jit(functools.partial(_likeliest, config), out_shardings=whole)
        self._sets = jax.jit(functools.partial(_sets, config), out_shardings=whole)

    def _batches(
        self, encoded: Sequence[Encoded]
    ) -> Iterator[tuple[list[int], int, dict[str, jax.Array]]]:
        """Yields numbers of examples, the width, and the model's inputs."""
        context = self._model.mesh.shape["context"]
        chunk = -(-self._model.config.loss_chunk // context) * context
        widths = [_width(len(one.row["tokens"]), chunk) for one in encoded]
        for width in sorted(set(widths)):
            numbers = [i for i, own in enumerate(widths) if own == width]
            rows = self._model.batch_rows(width, len(numbers))
            for first in range(0, len(numbers), rows):
                some = numbers[first : first + rows]
                padded = [*some, *[some[-1]] * (rows - len(some))]
                tokens = [encoded[i].row["tokens"] for i in padded]
                starts = [encoded[i].row.get("starts") for i in padded]
                inputs = loaded.padded(tokens, width, self._model.rule, starts)
                yield some, width, self._model.shard(inputs)

    def completions(self, encoded: Sequence[Encoded], items: list[dict[str, Any]]) -> None:
        """Scores what examples with completions learn.

        It adds to the items "whole", whether all that is learned is right; "first_wrong", the number of the
        first wrong token of those that are learned, or None; and "learned", the number of them.
        """
        for some, width, batch in self._batches(encoded):
            targets = np.zeros((len(batch["tokens"]), width), np.int32)
            for row, i in enumerate(some):
                tokens = encoded[i].row["tokens"]
                targets[row, : len(tokens) - 1] = tokens[1:]
            with jax.set_mesh(self._model.mesh):
                shared = self._model.shard({"targets": targets})["targets"]
                right = np.asarray(self._likeliest(self._model.params, batch, shared))
            for row, i in enumerate(some):
                learned = encoded[i].row["learned"][1:] != 0
                of_learned = right[row, : len(learned)][learned]
                wrong = np.flatnonzero(~of_learned)
                items[i] |= {
                    "whole": not len(wrong),
                    "first_wrong": int(wrong[0]) if len(wrong) else None,
                    "learned": len(of_learned),
                }

    def sets(
        self,
        encoded: Sequence[Encoded],
        groups: Mapping[str, Sequence[str]],
        items: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Scores the sets of examples.

        It adds to the items, by group, how many tokens have the "right" set of all with one ("total"), and
        whether the "last" one is right.

        Args:
          groups: name -> words, the part of a set that is right or wrong by itself.

        Returns:
          "by": group -> coordinate -> [[value, right, total], ...], over all examples.
        """
        ids = self._model.tokenizer.ids()
        masks = {name: sum(1 << ids[word] for word in words) for name, words in groups.items()}
        tallies: dict[str, dict[str, np.ndarray]] = {name: {} for name in masks}
        for some, _, batch in self._batches(encoded):
            with jax.set_mesh(self._model.mesh):
                predicted = np.asarray(self._sets(self._model.params, batch))
            for row, i in enumerate(some):
                own = encoded[i].row
                coordinates = segments.coordinates(
                    own["tokens"], self._model.rule, starts=own.get("starts")
                )
                wrong = (predicted[row, : len(own["sets"])] ^ own["sets"]) & own["among"]
                items[i]["groups"] = {}
                for name, mask in masks.items():
                    asked = np.flatnonzero(own["among"] & mask)
                    right = wrong[asked] & mask == 0
                    if not len(asked):
                        continue
                    items[i]["groups"][name] = {
                        "right": int(right.sum()),
                        "total": len(asked),
                        "last": bool(right[-1]),
                    }
                    for by in ("segment", "offset"):
                        _count(tallies[name], by, coordinates[by][asked], right)
        return {
            "by": {
                name: {by: _rows(counts) for by, counts in of_group.items()}
                for name, of_group in tallies.items()
            }
        }


def _count(tally: dict[str, np.ndarray], by: str, values: np.ndarray, right: np.ndarray) -> None:
    """Adds tokens to the counts (2, values) of right ones and of all."""
    counts = tally.get(by, np.zeros((2, 0), int))
    size = max(counts.shape[1], int(values.max()) + 1)
    counts = np.pad(counts, ((0, 0), (0, size - counts.shape[1])))
    counts[0] += np.bincount(values[right], minlength=size)
    counts[1] += np.bincount(values, minlength=size)
    tally[by] = counts


def _rows(counts: np.ndarray) -> list[list[int]]:
    return [[i, int(right), int(total)] for i, (right, total) in enumerate(counts.T) if total]


def _width(length: int, chunk: int) -> int:
    """The least chunk * 2^k that is at least a length."""
    return chunk << max(-(-length // chunk) - 1, 0).bit_length()


def _likeliest(config: Plan, params: dict, batch: dict, targets: jax.Array) -> jax.Array:
    """Whether the target of each token is the most probable one, (B, L)."""
    hidden, output = model.hidden(config, params, batch)
    return score(hidden.astype(output.dtype), output, targets, config.loss_chunk)[1]


def _sets(config: Plan, params: dict, batch: dict) -> jax.Array:
    """The set of each token that the model predicts, (B, L) integers, see `loss.sets_error_sum`."""
    logits = set_logits(*model.hidden(config, params, batch))
    return jnp.sum((logits > 0).astype(jnp.int32) << jnp.arange(logits.shape[-1]), axis=-1)
