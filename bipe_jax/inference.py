"""A checkpoint's model on the devices that are here: what evaluation and decoding run."""

import dataclasses
import math

import jax
import ml_collections

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
    config.mesh.update(data=0, fsdp=fsdp, tensor=1, context=1)
    if not all(encoding.rotates for _, encoding in positions.relative_encodings(config)):
        config.model.attention = "chunked"
    mesh = sharding.make_mesh(config)
    specs = jax.tree.map(sharding.parameter_spec, sharding.names(params))
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    params = jax.device_put(params, shardings)
    return Placed(config, params, mesh, segments.rule_of(config), tokenizer, step)


def load(path) -> Placed:
    """Reads a checkpoint, see `checkpoint.load`, and places it. Raises UserError as that does."""
    meta, params = checkpoint.load(path)
    return place(meta.config, params, meta.tokenizer, meta.step)
