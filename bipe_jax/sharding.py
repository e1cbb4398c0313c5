"""The mesh of devices, and the tables that place parameters, batches and activations on it.

| axis    | what it cuts                                                                        |
|---------|-------------------------------------------------------------------------------------|
| data    | the batch; each part has all parameters                                             |
| fsdp    | the batch, and parameters and optimizer along the model's width                     |
| tensor  | heads, the feed-forward width and the vocabulary                                    |
| context | the length of each block                                                            |
"""

import functools
import json
import math
import operator
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bipe_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")

# Parameter name, parts joined by "/" -> mesh axis of each dimension. Layers are stacked in front.
RULES = (
    (r"embed/table", P("tensor", "fsdp")),
    (r"absolute/\w+/table", P(None, "fsdp")),
    (r"layers/attention/(query|key|value)", P(None, "fsdp", "tensor", None)),
    (r"layers/attention/output", P(None, "tensor", None, "fsdp")),
    (r"layers/feed_forward/(gate|up)", P(None, "fsdp", "tensor")),
    (r"layers/feed_forward/down", P(None, "tensor", "fsdp")),
    (r"layers/\w+_norm/scale", P(None, None)),
    (r"norm/scale", P(None)),
    (r"output/kernel", P("fsdp", "tensor")),
)

# Name of an activation -> mesh axis of each dimension.
ACTIVATIONS = {
    "kernel": P("fsdp", "tensor"),  # (D, V)
    "tokens": P(BATCH, "context"),  # (B, L), and (B, L, ...)
    "hidden": P(BATCH, "context", None),  # (B, L, D)
    "heads": P(BATCH, "context", "tensor", None),  # (B, L, N, H)
    "feed_forward": P(BATCH, "context", "tensor"),  # (B, L, F)
}


def make_mesh(config, devices=None) -> Mesh:
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


def mesh_shape(config, devices: int, slices: int = 1) -> tuple[int, ...]:
    """The sizes of AXES over so many devices. Raises UserError as make_mesh does."""
    sizes = {axis: config.mesh[axis] for axis in AXES}
    rest = sizes["fsdp"] * sizes["tensor"] * sizes["context"]
    sizes["data"] = sizes["data"] or devices // rest
    if math.prod(sizes.values()) != devices:
        shown = " x ".join(f"{axis} {config.mesh[axis] or 'any'}" for axis in AXES)
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
        value = operator.attrgetter(field)(config)
        if value % sizes[axis]:
            raise UserError(
                f"config.{field}={value} does not divide over config.mesh.{axis}={sizes[axis]}"
            )
    if sizes["data"] % slices:
        raise UserError(
            f"config.mesh leaves data {sizes['data']}, which does not divide over {slices} slices"
        )
    return tuple(sizes.values())


def check_batch(config, mesh: Mesh) -> None:
    """Raises UserError if the rows that are computed at a time do not divide over the devices."""
    rows, shards = config.batch_size // config.accumulation, batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.batch_size={config.batch_size} in accumulation={config.accumulation} parts is "
            f"{rows} sequences at a time, which do not divide over {shards} devices "
            "(mesh.data x mesh.fsdp)"
        )


def batch_shards(mesh: Mesh) -> int:
    """The parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def platform(mesh) -> str:
    """ "tpu", "gpu" or "cpu": of a (abstract) mesh's devices, or of this process without a mesh."""
    device = getattr(mesh, "abstract_device", None)
    return device.platform if device else jax.default_backend()


def names(tree) -> dict:
    """Tree of the same structure whose leaves are their own names, parts joined by "/"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def parameter_spec(name: str) -> P:
    """The placement of a parameter. Raises KeyError if no rule, or more than one, matches."""
    matches = [spec for pattern, spec in RULES if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise KeyError(f"{len(matches)} sharding rules match parameter {name!r}; one must")
    return matches[0]


def state_shardings(mesh: Mesh, state):
    """Shardings of a train state: whatever lies under a parameter's name is placed like it.

    The optimizer keeps trees shaped like the parameters under names of its own; a leaf there is
    recognised by the end of its name. Other leaves (counters) are on every device.
    """

    def sharding(name, leaf):
        for pattern, spec in RULES:
            match = re.search(rf"(^|/)({pattern})$", name)
            if match and leaf.ndim == len(spec):
                return NamedSharding(mesh, spec)
        if name.startswith("params/"):
            raise KeyError(f"no sharding rule matches parameter {name!r}")
        return replicated(mesh)

    return jax.tree.map(sharding, names(state), state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of the arrays (B, L) of a batch."""
    return NamedSharding(mesh, ACTIVATIONS["tokens"])


def reader(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(which, of how many) parts of a batch's rows this process has to read.

    Processes whose devices hold the same rows, since a block or the model is cut over them, read the
    same part.
    """
    parts: dict[int, set] = {}
    indices = batch_sharding(mesh).devices_indices_map((rows, mesh.shape["context"]))
    for device, (cut, _) in indices.items():
        parts.setdefault(device.process_index, set()).add(cut.indices(rows)[0])
    distinct = sorted({tuple(sorted(starts)) for starts in parts.values()})
    if sum(map(len, distinct)) != len({start for starts in distinct for start in starts}):
        raise UserError("config.mesh: the rows of two processes overlap in part: change its axes")
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def place_batch(mesh: Mesh, batch: dict, readers: int = 1) -> dict:
    """This process's rows of a batch (NumPy), read as `reader` says -> the global batch."""
    sharding = batch_sharding(mesh)

    def place(rows):
        shape = (len(rows) * readers, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: place(rows) for name, rows in batch.items()}


def place(array, placement: NamedSharding) -> jax.Array:
    """An array that every process has whole -> the global array."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, placement, lambda part: array[part])


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device, and so every process, has whole: jitted functions give it to the host."""
    return NamedSharding(mesh, P())


def of_all_processes(value) -> list:
    """A value of JSON's types from each process, in the order of their numbers."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text))).tolist()
    padded = np.pad(text, (0, max(sizes) - len(text)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Places an activation as ACTIVATIONS says, where a mesh is set; elsewhere does nothing."""
    spec = ACTIVATIONS[name]
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def context_shards() -> int:
    """The parts that a block is cut into on the mesh that is set."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


class Devices:
    """Collectives over axes of the mesh, inside `on_each`. Over axes of one device they do nothing."""

    def __init__(self, sizes: dict):
        self._sizes = sizes

    def count(self, axis: str) -> int:
        return self._sizes.get(axis, 1)

    def index(self, axis: str):
        """Which of the parts along an axis this is."""
        return jax.lax.axis_index(axis) if self.count(axis) > 1 else 0

    def sum(self, x, *axes: str):
        return jax.lax.psum(x, self._cut(axes))

    def max(self, x, *axes: str):
        return jax.lax.pmax(x, cut) if (cut := self._cut(axes)) else x

    def gather(self, tree, axis: str, dimension: int):
        """All parts along an axis, in order."""
        if self.count(axis) == 1:
            return tree
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=dimension, tiled=True), tree)

    def sum_part(self, x, axis: str, dimension: int):
        """This device's part of a sum over an axis."""
        if self.count(axis) == 1:
            return x
        return jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)

    def _cut(self, axes) -> tuple:
        return tuple(axis for axis in axes if self.count(axis) > 1)


def on_each(function, in_specs, out_specs):
    """`function(devices, *args)` on each device's parts of arrays placed as the specs say.

    Where no mesh of several devices is set, it gets the whole arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(function, Devices(dict(mesh.shape)))
    if mesh.size <= 1:
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def look_up(name: str, table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows (B, L, D) of a parameter (R, D), by its name in RULES, for integers (B, L).

    Each device gathers the table; its gradients come back in parts, each summed once.
    """
    spec = parameter_spec(name)

    def local(devices, table, ids):
        for dimension, axis in enumerate(spec):
            table = devices.gather(table, axis, dimension)
        return table[ids]

    run = on_each(local, (spec, ACTIVATIONS["tokens"]), ACTIVATIONS["hidden"])
    return run(table, ids)
