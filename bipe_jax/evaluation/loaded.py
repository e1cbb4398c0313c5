"""A checkpoint's model on all devices, as evaluation and decoding run it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np

from bipe_jax import checkpoint, model, positions, segments, sharding
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model whose parameters lie on a mesh of all devices.

    Attributes:
      config: with its segment rule and a mesh of all devices; encodings that act on logits are
        computed exactly.
      params: sharded over `mesh`.
      tokenizer_if_any: None for a model without one.
      step: of training; None for a model that was not read from a checkpoint.
    """

    config: Plan
    params: dict
    mesh: jax.sharding.Mesh
    tokenizer_if_any: Tokenizer | None = None
    step: int | None = None

    @property
    def rule(self) -> segments.Rule:
        """The segment rule."""
        return self.config.segment_rule

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if the model has none."""
        if self.tokenizer_if_any is None:
            raise UserError("the model has no tokenizer: it can be applied to token ids alone")
        return self.tokenizer_if_any

    def batch_rows(self, length: int, rows: int) -> int:
        """How many of `rows` rows run at a time: as many as `evaluation.batch_tokens` allows."""
        shards = sharding.batch_shards(self.mesh)
        most = max(self.config.evaluation.batch_tokens // length // shards, 1) * shards
        return min(most, -(-rows // shards) * shards)

    def shard(self, batch: dict) -> dict:
        """Arrays (rows, L) on the devices, sharded as a batch."""
        axes = sharding.batch_sharding(self.mesh)
        return {name: sharding.place(array, axes) for name, array in batch.items()}


def on_all_devices(
    config: Plan, params: dict, tokenizer: Tokenizer | None = None, step: int | None = None
) -> LoadedModel:
    """Shards a model, which each process has in full, over all devices of all processes."""
    config = _with_all_devices(config)
    mesh = sharding.make_mesh(config)
    params = jax.tree.map(sharding.place, params, _shardings(config, mesh, params))
    return LoadedModel(config, params, mesh, tokenizer, step)


def _with_all_devices(config: Plan) -> Plan:
    """The config with a mesh of all devices, whatever mesh the model was trained on."""
    fsdp = math.gcd(jax.device_count(), config.model.width)
    mesh = {"devices": 0, "data": 0, "fsdp": fsdp, "tensor": 1, "context": 1}
    return with_exact_encodings(config).replace(
        {f"mesh.{axis}": size for axis, size in mesh.items()}
    )


def with_exact_encodings(config: Plan) -> Plan:
    """The config without kernels that round terms of the logits to the compute dtype."""
    return config.replace({"model.attention": "chunked"}) if config.encodings.scoring else config


def _shardings(config: Plan, mesh: jax.sharding.Mesh, params: dict) -> dict:
    """The sharding of each parameter; of `params` only the names count."""
    declared = model.declared(config)
    return jax.tree.map(
        lambda name: jax.sharding.NamedSharding(mesh, declared[name].axes), sharding.names(params)
    )


def padded(
    rows: Sequence[np.ndarray],
    width: int,
    rule: segments.Rule,
    starts: Sequence[np.ndarray | None] = (),
) -> dict:
    """Token sequences (L,) of different lengths as one batch.

    Padding follows each sequence, where causal attention does not see it, and has the coordinates of
    the last token, so that no coordinate is larger than the sequence's own.

    Args:
      rows: (L,) token ids each. starts: of their segments, see `segments.coordinates`; (L,) each, or None.

    Returns:
      "tokens", the coordinates, and the states of the rule's automata: (rows, width) int32 each.
    """
    tokens = np.stack([np.pad(row, (0, width - len(row)), mode="edge") for row in rows])
    marks = [np.pad(row, (0, width - len(row))) for row in starts if row is not None]
    coordinates = segments.coordinates(
        tokens.astype(np.int32), rule, starts=np.stack(marks) if marks else None, states=True
    )
    last = np.array([[len(row) - 1] for row in rows])
    inside = np.arange(width) <= last
    coordinates = {
        name: np.where(inside, array, np.take_along_axis(array, last, axis=1))
        for name, array in coordinates.items()
    }
    return coordinates | {"tokens": tokens.astype(np.int32)}


def extended(config: Plan, spec: str, measured: Mapping[str, float] = MappingProxyType({})) -> Plan:
    """The config with its rotary encodings scaled, see `positions.extend`."""
    return config.replace({"position.relative": positions.extend(config, spec, measured)})


def load(path: str, extend: str = "", step: int | None = None) -> LoadedModel:
    """Reads a checkpoint; each process reads only the shards of its devices.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      extend: a scaling of the rotary encoding, see `positions.extend`.
      step: of the checkpoint; None: the latest, or that of `path`.

    Raises:
      UserError: as `checkpoint.load` and `positions.extend`; or the parameters are not finite.
    """
    meta, shapes = checkpoint.describe(path, step)
    config = extended(meta.config, extend) if extend else meta.config
    config = _with_all_devices(config)
    mesh = sharding.make_mesh(config)
    abstract = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        _shardings(config, mesh, shapes),
    )
    params = checkpoint.read_params(path, meta.step, abstract)
    if not sharding.all_finite(params):
        raise UserError(
            f"checkpoint {path}: the parameters of step {meta.step} are not finite: use an earlier step"
        )
    return LoadedModel(config, params, mesh, meta.tokenizer, meta.step)
