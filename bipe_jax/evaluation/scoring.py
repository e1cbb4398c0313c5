"""How probable the targets of windows are (see `protocols`), on all devices."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import model, sharding
from bipe_jax.evaluation import loaded
from bipe_jax.evaluation.protocols import Window
from bipe_jax.loss import score


class Scorer:
    """Scores windows with one model; compiles once for each length and number of targets."""

    def __init__(self, loaded_model: loaded.LoadedModel):
        self.config, self.mesh, self.rule = (
            loaded_model.config,
            loaded_model.mesh,
            loaded_model.rule,
        )
        self._run = jax.jit(
            functools.partial(_score, loaded_model.config),
            static_argnames=("chunk",),
            out_shardings=sharding.replicated(loaded_model.mesh),
        )

    def batch_rows(self, length: int, windows: int) -> int:
        """How many windows are run at a time: as many as `evaluation.batch_tokens` allows."""
        devices = sharding.batch_shards(self.mesh)
        rows = max(self.config.evaluation.batch_tokens // length // devices, 1) * devices
        return min(rows, -(-windows // devices) * devices)

    def __call__(self, params, documents, windows: Sequence[Window], length: int) -> list:
        """Scores the targets of each window, none of which has more than `length` tokens.

        Memory is linear in length: logits are made for some targets at a time, attention is chunked.

        Args:
          params: loaded_model as `loaded.place` does.
          documents: (T,) int32 each.

        Returns:
          For each window, log-probabilities (scored,) float32, and whether no token is more probable
          than the target (scored,).
        """
        rows = self.batch_rows(length, len(windows))
        most = max(w.scored for w in windows)
        # Powers of two where they are few: programs for one number of targets serve others.
        chunk = min(self.config.loss_chunk, 1 << (most - 1).bit_length())
        parts = self.mesh.shape["context"]  # that the targets of a window are sharded over
        chunk = -(-chunk // parts) * parts
        count = -(-most // chunk) * chunk
        scores = []
        for first in range(0, len(windows), rows):
            some = windows[first : first + rows]
            padded = [*some, *[some[-1]] * (rows - len(some))]
            texts = [documents[w.document][w.start : w.end] for w in padded]
            batch = loaded.padded(texts, length, self.rule)
            places = np.empty((rows, count), np.int32)
            targets = np.empty((rows, count), np.int32)
            for row, w in enumerate(padded):
                scored = w.end - w.scored + np.minimum(np.arange(count), w.scored - 1)
                places[row] = scored - w.start
                targets[row] = documents[w.document][scored + 1]
            placement = sharding.batch_sharding(self.mesh)
            batch = {name: sharding.place(array, placement) for name, array in batch.items()}
            with jax.set_mesh(self.mesh):
                found = self._run(params, batch, places, targets, chunk=chunk)
            log_probs, likeliest = jax.device_get(found)
            scores += [
                (log_probs[row, : w.scored], likeliest[row, : w.scored])
                for row, w in enumerate(some)
            ]
        return scores


def _score(config, params, batch, places, targets, *, chunk: int):
    hidden, kernel = model.hidden(config, params, batch)
    chosen = jnp.take_along_axis(hidden, places[..., None], axis=1)
    return score(chosen.astype(kernel.dtype), kernel, jnp.asarray(targets), chunk)
