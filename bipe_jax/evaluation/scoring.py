"""Log-probabilities of the targets of windows (see `protocols`), on all devices."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import model, sharding
from bipe_jax.evaluation import loaded
from bipe_jax.evaluation.protocols import Window
from bipe_jax.loss import score
from bipe_jax.plan import Plan
from bipe_jax.positions.draws import apply as apply_draws


class Scorer:
    """Scores windows with one model; compiles once for each length and number of targets.

    Args:
      drawn: whether coordinates are drawn as in training (`position.draws`), by the seed and the window's
        number, and not the true ones.
    """

    def __init__(self, loaded_model: loaded.LoadedModel, drawn: bool = False):
        self._model = loaded_model
        draws = loaded_model.config.encodings.draws if drawn else ()
        self._run = jax.jit(
            functools.partial(_score, loaded_model.config, draws),
            static_argnames=("chunk",),
            out_shardings=sharding.replicated(loaded_model.mesh),
        )

    def __call__(
        self,
        params: dict,
        documents: Sequence[np.ndarray],
        windows: Sequence[Window],
        length: int,
        starts: Sequence[np.ndarray | None] = (),
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores the targets of each window, none of which has more than `length` tokens.

        Memory is linear in length: logits are computed for some targets at a time, attention is chunked.

        Args:
          params: sharded as those of the loaded model.
          documents: (T,) int32 each.
          starts: of their segments, see `segments.coordinates`; (T,) each, or None.

        Returns:
          For each window, log-probabilities (scored,) float32, and whether the target is the most
          probable token (scored,).
        """
        config, mesh = self._model.config, self._model.mesh
        rows = self._model.batch_rows(length, len(windows))
        most = max(w.scored for w in windows)
        # A power of two if it is small, so that few programs are compiled.
        chunk = min(config.loss_chunk, 1 << (most - 1).bit_length())
        parts = mesh.shape["context"]  # over which the targets of a window are sharded
        chunk = -(-chunk // parts) * parts
        count = -(-most // chunk) * chunk
        scores = []
        for first in range(0, len(windows), rows):
            some = windows[first : first + rows]
            padded = [*some, *[some[-1]] * (rows - len(some))]
            texts = [documents[w.document][w.start : w.end] for w in padded]
            marks = [cut(starts[w.document], w.start, w.end) for w in padded if starts]
            inputs = loaded.padded(texts, length, self._model.rule, marks)
            batch = self._model.shard(inputs)
            predecessors = np.empty((rows, count), np.int32)
            targets = np.empty((rows, count), np.int32)
            for row, w in enumerate(padded):
                scored = w.end - w.scored + np.minimum(np.arange(count), w.scored - 1)
                predecessors[row] = scored - w.start
                targets[row] = documents[w.document][scored + 1]
            with jax.set_mesh(mesh):
                numbers = np.arange(first, first + rows)
                result = self._run(params, batch, numbers, predecessors, targets, chunk=chunk)
            log_probs, likeliest = jax.device_get(result)
            scores += [
                (log_probs[row, : w.scored], likeliest[row, : w.scored])
                for row, w in enumerate(some)
            ]
        return scores


def cut(starts: np.ndarray | None, first: int, last: int) -> np.ndarray | None:
    """A slice of a document's starts of segments, if it has them."""
    return None if starts is None else starts[first:last]


def _score(
    config: Plan, draws, params: dict, batch: dict, numbers, predecessors, targets, *, chunk: int
):
    """Scores targets (B, T), each predicted from the token at its index `predecessors` (B, T)."""
    batch = apply_draws(draws, config.seed, 0, batch, numbers)
    hidden, output = model.hidden(config, params, batch)
    chosen = jnp.take_along_axis(hidden, predecessors[..., None], axis=1)
    return score(chosen.astype(output.dtype), output, jnp.asarray(targets), chunk)
