"""A checkpoint's model on the devices that are here: what evaluation and decoding run."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from bipe_jax import checkpoint, positions, segments, sharding
from bipe_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model whose parameters lie on a mesh of all devices.

    Attributes:
      config: resolved, with a mesh of the devices that are here; biases are computed exactly.
      params: placed on `mesh`.
      rule: the segment rule.
      tokenizer: None for a model that came without one.
      step: of training, None for a model that came from elsewhere.
    """

    config: ml_collections.ConfigDict
    params: dict
    mesh: jax.sharding.Mesh
    rule: segments.Rule
    tokenizer: Tokenizer | None = None
    step: int | None = None


def place(config, params: dict, tokenizer=None, step=None) -> Placed:
    """Puts a model on all devices, whatever mesh it was trained on."""
    config = config.copy_and_resolve_references()
    fsdp = math.gcd(jax.device_count(), config.model.width)
    config.mesh.update(devices=0, data=0, fsdp=fsdp, tensor=1, context=1)
    if not all(encoding.rotates for _, encoding in positions.relative_encodings(config)):
        config.model.attention = "chunked"
    mesh = sharding.make_mesh(config)
    params = place_params(mesh, params)
    return Placed(config, params, mesh, segments.rule_of(config), tokenizer, step)


def place_params(mesh: jax.sharding.Mesh, params: dict) -> dict:
    specs = jax.tree.map(sharding.parameter_spec, sharding.names(params))
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    return jax.device_put(params, shardings)


def padded(rows: Sequence[np.ndarray], width: int, rule: segments.Rule) -> dict:
    """Texts (L,) of different lengths as one batch.

    Padding stands behind each text, where causal attention does not see it, and has the coordinates
    of the last token: no coordinate is larger than the text's own.

    Returns:
      "tokens" and the coordinates: (rows, width) int32 each.
    """
    tokens = np.stack([np.pad(row, (0, width - len(row)), mode="edge") for row in rows])
    found = segments.coordinates(tokens.astype(np.int32), rule)
    last = np.array([[len(row) - 1] for row in rows])
    inside = np.arange(width) <= last
    found = {
        name: np.where(inside, array, np.take_along_axis(array, last, axis=1))
        for name, array in found.items()
    }
    return found | {"tokens": tokens.astype(np.int32)}


def load(path, extend: str = "") -> Placed:
    """Reads a checkpoint and places it.

    Args:
      path: see `checkpoint.load`. extend: a scaling of its rotary encoding, see `positions.extend`.

    Raises:
      UserError: as those do.
    """
    meta, params = checkpoint.load(path)
    config = positions.extend(meta.config, extend) if extend else meta.config
    return place(config, params, meta.tokenizer, meta.step)
