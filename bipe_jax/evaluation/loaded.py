"""A checkpoint's model on the devices that are here: what evaluation and decoding run."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from bipe_jax import checkpoint, positions, segments, sharding
from bipe_jax.data.tokenizer import Tokenizer


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
    """Puts a model on all devices of all processes, each of which has all parameters."""
    config = _on_all_devices(config)
    mesh = sharding.make_mesh(config)
    params = jax.tree.map(sharding.place, params, _placements(mesh, params))
    return Placed(config, params, mesh, segments.rule_of(config), tokenizer, step)


def _on_all_devices(config):
    """The config, with a mesh of what is here, whatever mesh it was trained on."""
    config = with_exact_biases(config)
    fsdp = math.gcd(jax.device_count(), config.model.width)
    config.mesh.update(devices=0, data=0, fsdp=fsdp, tensor=1, context=1)
    return config


def with_exact_biases(config):
    """The config of an evaluation: kernels that round biases to the compute dtype are left out."""
    config = config.copy_and_resolve_references()
    if not all(encoding.rotates for _, encoding in positions.relative_encodings(config)):
        config.model.attention = "chunked"
    return config


def _placements(mesh: jax.sharding.Mesh, params: dict) -> dict:
    """Where each parameter lies. Of the arguments only the names of the parameters count."""
    specs = jax.tree.map(sharding.parameter_spec, sharding.names(params))
    return jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)


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


def load(path, extend: str = "", step: int | None = None) -> Placed:
    """Reads a checkpoint; each process reads what its devices hold, none all of it.

    Args:
      path, step: see `checkpoint.load`.
      extend: a scaling of its rotary encoding, see `positions.extend`.

    Raises:
      UserError: as those do.
    """
    meta, shapes = checkpoint.describe(path, step)
    config = positions.extend(meta.config, extend) if extend else meta.config
    config = _on_all_devices(config)
    mesh = sharding.make_mesh(config)
    abstract = jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        shapes,
        _placements(mesh, shapes),
    )
    params = checkpoint.read_params(path, meta.step, abstract)
    return Placed(config, params, mesh, segments.rule_of(config), meta.tokenizer, meta.step)
