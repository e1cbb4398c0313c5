"""What a run says of itself before its first step."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bipe_jax import sharding
from bipe_jax.attention import choose
from bipe_jax.config import spec
from bipe_jax.data import identity
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir


def lines(config: Plan, mesh: Mesh, params: Any, workdir: str) -> list[str]:
    """Lines on the model, the devices, the data and TensorBoard. To be called where the mesh is set.

    Args:
      config: with the shards of its sources. params: of the model, perhaps abstract.

    Raises:
      UserError: the backend of attention that the config asks for cannot do it.
    """
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    device, axes = mesh.devices.flat[0], [(a, n) for a, n in mesh.shape.items() if n > 1]
    cut = "".join(f", {axis} {size}" for axis, size in axes)
    sources = zip(config.training.sources, config.training.shares, config.shards, strict=True)
    return [
        f"Model: {count:,} parameters, attention by {' and '.join(backends(config))}",
        f"Devices: {mesh.size} of {device.device_kind} in {_of(jax.process_count(), 'process', 'es')}{cut}",
        *(
            f"Data: {source.text}: {_of(len(shards), 'shard', 's')}, "
            f"{sum(max(shard.size, 0) for shard in shards) / 1e6:,.1f} MB, "
            f"{_documents(source, config.data.sets)}{share:.0%} of the blocks"
            for source, share, shards in sources
        ),
        f"TensorBoard: tensorboard --logdir {Workdir(workdir).tensorboard}",
    ]


def _documents(source: spec.Source, sets: Sequence[str]) -> str:
    """The number of documents, where it is known without reading the source."""
    count = identity.count_documents(source, sets)
    return "" if count is None else f"{_of(count, 'document', 's')}, "


def backends(config: Plan) -> list[str]:
    """The backends of attention that training has on the mesh that is set; of all layers, each once.

    Raises:
      UserError: the one that the config asks for cannot do it.
    """
    m, encodings, chosen = config.model, config.encodings, list[str]()
    shape = (config.batch_size // config.accumulation, config.sequence_length)
    platform_of_mesh = sharding.platform(jax.sharding.get_abstract_mesh())

    def layers() -> None:
        x, ids = jnp.zeros((*shape, m.width), m.dtype), jnp.zeros(shape, jnp.int32)
        q, k = (x[..., None, : m.width // m.heads].repeat(n, 2) for n in (m.heads, m.kv_heads))
        documents = ids if config.data.separate_documents else None
        modules = encodings.make_layer(jax.random.key(0))
        for number in range(encodings.period):
            coordinates = {entry.coordinate: ids for entry in encodings.relative}
            layer = encodings.of_layer(number, modules, coordinates, {})
            features = layer.features(x)
            acting = [encoding for encoding, _ in layer.scoring(features, documents)]
            name = choose(
                m.attention, platform_of_mesh, layer.turn(q, k, features)[0], encodings=acting,
                documents=documents is not None, context=sharding.context_shards(),
            )  # fmt: skip
            chosen.append(name)

    jax.eval_shape(layers)
    return list(dict.fromkeys(chosen))


def _of(count: int, what: str, plural: str) -> str:
    return f"{count:,} {what}{plural * (count != 1)}"
