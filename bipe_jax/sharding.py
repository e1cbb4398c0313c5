# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""The mesh of devices, and how parameters, batches and activations are placed on it.

| axis    | what is sharded over it                                                             |
|---------|-------------------------------------------------------------------------------------|
| data    | the batch; parameters are replicated                                                |
| fsdp    | the batch, and parameters and optimizer along the model's width                     |
| tensor  | heads, the feed-forward width and the vocabulary                                    |
| context | the length of each block                                                            |
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bipe_jax.config import Config, value_of
from bipe_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")

# Name of an activation -> mesh axis of each dimension.
ACTIVATIONS = {
    "kernel": P("fsdp", "tensor"),  # (D, V)
    "tokens": P(BATCH, "context"),  # (B, L), and (B, L, ...)
    "hidden": P(BATCH, "context", None),  # (B, L, D)
    "heads": P(BATCH, "context", "tensor", None),  # (B, L, N, H)
    "feed_forward": P(BATCH, "context", "tensor"),  # (B, L, F)
}


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices. `mesh.data` = 0 is what the other axes leave.

    Raises:
      UserError: there are other than `mesh.devices`; the axes do not multiply to the devices, or do not
        divide what they cut.
    """
    devices = jax.devices() if devices is None else devices
    if config.mesh.devices not in (0, len(devices)):
        raise UserError(
            f"config.mesh.devices={config.mesh.devices}, but there are {len(devices)} devices in "
            f"{len({d.process_index for d in devices})} processes: start as many as the config says "
            "(do they find each other?), or set it to 0"
        )
    # Between slices the network is slow: only the gradients' sum over `data` crosses it.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = mesh_shape(config, len(devices), slices)
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within = (shape[0] // slices, *shape[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: Config, devices: int, slices: int = 1) -> tuple[int, ...]:
    """The sizes of AXES over so many devices. Raises UserError as make_mesh does."""
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    rest = sizes["fsdp"] * sizes["tensor"] * sizes["context"]
    sizes["data"] = sizes["data"] or devices // rest
    if math.prod(sizes.values()) != devices:
        shown = " x ".join(f"{axis} {getattr(config.mesh, axis) or 'any'}" for axis in AXES)
        raise UserError(f"config.mesh: {shown} does not multiply to the {devices} devices")
    for field, axis in (
        ("model.width", "fsdp"),
        ("model.heads", "tensor"),
        ("model.kv_heads", "tensor"),
        ("model.feed_forward", "tensor"),
        ("model.vocab_size", "tensor"),
        ("sequence_length", "context"),
        ("loss_chunk", "context"),
    ):
        value = value_of(config, field)
        if value % sizes[axis]:
            raise UserError(
                f"config.{field}={value} does not divide over config.mesh.{axis}={sizes[axis]}"
            )
    if sizes["data"] % slices:
        raise UserError(
            f"config.mesh leaves data {sizes['data']}, which does not divide over {slices} slices"
        )
    return tuple(sizes.values())


def check_batch(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError if the rows that are computed at a time do not divide over the devices."""
    rows, shards = config.batch_size // config.accumulation, batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.batch_size={config.batch_size} in accumulation={config.accumulation} parts is "
            f"{rows} sequences at a time, which do not divide over {shards} devices "
            "(mesh.data x mesh.fsdp)"
        )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def platform(mesh: Mesh | AbstractMesh) -> str:
    """The platform of the devices of a mesh, or without one of this process: "tpu", "gpu" or "cpu"."""
    device = getattr(mesh, "abstract_device", None)
    return device.platform if device else jax.default_backend()


def names(tree: Any) -> Any:
    """Tree of the same structure whose leaves are their own names, parts joined by "/"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def parameter(value: jax.Array, axes: P, inputs: int = 0) -> nnx.Param[Any]:
    """A parameter, declared with its placement.

    Args:
      value: at the start.
      axes: the mesh axis of each dimension; parameters of stacked layers leave out the
        leading axis of layers.
      inputs: how many dimensions, from the first on, a product with the parameter sums over; 0: it is no
        matrix that a hidden state is multiplied with.

    Raises:
      ValueError: the axes are not those of a mesh, or not as many as the dimensions.
    """
    named = [axis for axis in jax.tree.leaves(tuple(axes)) if axis is not None]
    if len(axes) != value.ndim or not set(named) <= set(AXES):
        raise ValueError(f"a parameter of shape {value.shape} cannot have the axes {axes}")
    return nnx.Param(value, axes=axes, inputs=inputs)


class Declaration(NamedTuple):
    """What is declared of a parameter as it is stored: with a leading axis of layers if it is stacked.

    Attributes:
      axes: the mesh axis of each dimension.
      inputs, stacked: as `parameter` says; whether the layers are stacked.
    """

    axes: P
    inputs: int
    stacked: bool


def declarations(state: Any, stacked: str) -> dict[str, Declaration]:
    """Parameter's name -> its declaration.

    Args:
      state: the parameters of a module, perhaps abstract.
      stacked: under this name parameters have a leading axis of layers.
    """
    declared: dict[str, Declaration] = {}
    for path, variable in nnx.to_flat_state(state):
        of_layers = path[0] == stacked
        metadata = variable.get_metadata()
        axes = P(None, *metadata["axes"]) if of_layers else metadata["axes"]
        declared["/".join(map(str, path))] = Declaration(axes, metadata["inputs"], of_layers)
    return declared


def state_shardings(mesh: Mesh, state: Any, declared: Mapping[str, Declaration]) -> Any:
    """Shardings of a train state: whatever is under a parameter's name is placed like it.

    The optimizer keeps trees shaped like the parameters under names of its own; a leaf there is
    recognised by the end of its name. Other leaves (counters) are replicated.

    Raises:
      KeyError: a parameter was not declared.
    """

    def sharding(name: str, leaf: Any) -> NamedSharding:
        parts = name.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        parameter = next((end for end in ends if end in declared), None)
        if parameter and leaf.ndim == len(declared[parameter].axes):
            return NamedSharding(mesh, declared[parameter].axes)
        if name.startswith("params/"):
            raise KeyError(f"parameter {name!r} was not declared with its mesh axes")
        return replicated(mesh)

    return jax.tree.map(sharding, names(state), state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of the arrays (B, L) of a batch."""
    return NamedSharding(mesh, ACTIVATIONS["tokens"])


def data_shard(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(index, count) of the data shard that this process reads: its part of the rows of a batch.

    Processes whose devices have the same rows, because blocks or the model are sharded over them, read
    the same shard.
    """
    parts: dict[int, set[int]] = {}
    indices = batch_sharding(mesh).devices_indices_map((rows, mesh.shape["context"]))
    for device, (cut, _) in indices.items():
        parts.setdefault(device.process_index, set()).add(cut.indices(rows)[0])
    distinct = sorted({tuple(sorted(starts)) for starts in parts.values()})
    if sum(map(len, distinct)) != len({start for starts in distinct for start in starts}):
        raise UserError("config.mesh: the rows of two processes overlap in part: change its axes")
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def place_batch(mesh: Mesh, batch: Mapping[str, Any], shard_count: int = 1) -> dict[str, jax.Array]:
    """The global batch from this process's rows of it (NumPy), see `data_shard`."""
    sharding = batch_sharding(mesh)

    def place(rows: Any) -> jax.Array:
        shape = (len(rows) * shard_count, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: place(rows) for name, rows in batch.items()}


def place(array: Any, placement: NamedSharding) -> jax.Array:
    """An array that every process has whole -> the global array."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, placement, lambda part: array[part])


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device, and so every process, has whole: jitted functions give it to the host."""
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Places an activation as ACTIVATIONS says, where a mesh is set; elsewhere does nothing."""
    spec = ACTIVATIONS[name]
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def context_shards() -> int:
    """The parts that a block is cut into on the mesh that is set."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def all_finite(params: Any) -> bool:
    """Whether all numbers of sharded parameters are finite. All processes call it."""
    return bool(_all_finite(params))
