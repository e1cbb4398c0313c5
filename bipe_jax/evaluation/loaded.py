"""A checkpoint's model on the devices that are here: what evaluation and decoding run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np

from bipe_jax import checkpoint, model, positions, segments, sharding
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.plan import Plan


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model whose parameters lie on a mesh of all devices.

    Attributes:
      config: with its segment rule and a mesh of the devices that are here; encodings that act on
        logits are computed exactly.
      params: sharded over `mesh`.
      tokenizer: None for a model that came without one.
      step: of training, None for a model that came from elsewhere.
    """

    config: Plan
    params: dict
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer | None = None
    step: int | None = None

    @property
    def rule(self) -> segments.Rule:
        """The segment rule."""
        return self.config.segment_rule


def place(config: Plan, params: dict, tokenizer=None, step=None) -> LoadedModel:
    """Puts a model on all devices of all processes, each of which has all parameters."""
    config = _on_all_devices(config)
    mesh = sharding.make_mesh(config)
    params = jax.tree.map(sharding.place, params, _shardings(config, mesh, params))
    return LoadedModel(config, params, mesh, tokenizer, step)


def _on_all_devices(config: Plan) -> Plan:
    """The config, with a mesh of what is here, whatever mesh it was trained on."""
    fsdp = math.gcd(jax.device_count(), config.model.width)
    mesh = {"devices": 0, "data": 0, "fsdp": fsdp, "tensor": 1, "context": 1}
    return with_exact_encodings(config).replace(
        {f"mesh.{axis}": size for axis, size in mesh.items()}
    )


def with_exact_encodings(config: Plan) -> Plan:
    """The config without kernels that round what acts on logits to the compute dtype."""
    return config.replace({"model.attention": "chunked"}) if config.encodings.scoring else config


def _shardings(config: Plan, mesh: jax.sharding.Mesh, params: dict) -> dict:
    """The sharding of each parameter. Of the arguments only the names of the parameters count."""
    declared = model.declared(config)
    return jax.tree.map(
        lambda name: jax.sharding.NamedSharding(mesh, declared[name].axes), sharding.names(params)
    )


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


def extended(config: Plan, spec: str, ran: Mapping[str, float] = MappingProxyType({})) -> Plan:
    """The config with its rotary encodings scaled, see `positions.extend`."""
    return config.replace({"position.relative": positions.extend(config, spec, ran)})


def load(path, extend: str = "", step: int | None = None) -> LoadedModel:
    """Reads a checkpoint; each process reads what its devices hold, none all of it.

    Args:
      path, step: see `checkpoint.load`.
      extend: a scaling of its rotary encoding, see `positions.extend`.

    Raises:
      UserError: as those do.
    """
    meta, shapes = checkpoint.describe(path, step)
    config = extended(meta.config, extend) if extend else meta.config
    config = _on_all_devices(config)
    mesh = sharding.make_mesh(config)
    abstract = jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        shapes,
        _shardings(config, mesh, shapes),
    )
    params = checkpoint.read_params(path, meta.step, abstract)
    return LoadedModel(config, params, mesh, meta.tokenizer, meta.step)
