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


class Scorer:
    """Scores windows with one model; compiles once for each length and number of targets."""

    def __init__(self, loaded_model: loaded.LoadedModel):
        self._model = loaded_model
        self._run = jax.jit(
            functools.partial(_score, loaded_model.config),
            static_argnames=("chunk",),
            out_shardings=sharding.replicated(loaded_model.mesh),
        )

    def __call__(
        self, params: dict, documents: Sequence[np.ndarray], windows: Sequence[Window], length: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores the targets of each window, none of which has more than `length` tokens.

        Memory is linear in length: logits are computed for some targets at a time, attention is chunked.

        Args:
          params: sharded as those of the loaded model.
          documents: (T,) int32 each.

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
            batch = self._model.shard(loaded.padded(texts, length, self._model.rule))
            predecessors = np.empty((rows, count), np.int32)
            targets = np.empty((rows, count), np.int32)
            for row, w in enumerate(padded):
                scored = w.end - w.scored + np.minimum(np.arange(count), w.scored - 1)
                predecessors[row] = scored - w.start
                targets[row] = documents[w.document][scored + 1]
            with jax.set_mesh(mesh):
                result = self._run(params, batch, predecessors, targets, chunk=chunk)
            log_probs, likeliest = jax.device_get(result)
            scores += [
                (log_probs[row, : w.scored], likeliest[row, : w.scored])
                for row, w in enumerate(some)
            ]
        return scores


def _score(config: Plan, params: dict, batch: dict, predecessors, targets, *, chunk: int):
    """Scores targets (B, T), each predicted from the token at its index `predecessors` (B, T)."""
    hidden, kernel = model.hidden(config, params, batch)
    chosen = jnp.take_along_axis(hidden, predecessors[..., None], axis=1)
    return score(chosen.astype(kernel.dtype), kernel, jnp.asarray(targets), chunk)
