"""The mesh of devices, and the one table that places parameters and batches on it.

Axes: `data` (each device holds all parameters) and `fsdp` (parameters and optimizer are cut along
the model width). A batch is cut over both.
"""

import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bipe_jax.errors import UserError

AXES = ("data", "fsdp")
BATCH = P(AXES)

# Parameter name, parts joined by "/" -> mesh axis of each dimension. Layers are stacked in front.
RULES = (
    (r"embed/table", P(None, "fsdp")),
    (r"absolute/\w+/table", P(None, "fsdp")),
    (r"layers/attention/(query|key|value)", P(None, "fsdp", None, None)),
    (r"layers/attention/output", P(None, None, None, "fsdp")),
    (r"layers/feed_forward/(gate|up)", P(None, "fsdp", None)),
    (r"layers/feed_forward/down", P(None, None, "fsdp")),
    (r"layers/\w+_norm/scale", P(None, None)),
    (r"norm/scale", P(None)),
    (r"output/kernel", P("fsdp", None)),
)


def make_mesh(config, devices=None) -> Mesh:
    """A mesh over all devices: `mesh.fsdp` of them share one copy of the parameters.

    Raises:
      UserError: `mesh.fsdp` does not divide the devices, or the model's width does not divide by it.
    """
    devices = devices or jax.devices()
    fsdp = config.mesh.fsdp
    if len(devices) % fsdp:
        raise UserError(f"config.mesh.fsdp={fsdp} does not divide the {len(devices)} devices")
    if config.model.width % fsdp:
        raise UserError(
            f"config.model.width={config.model.width} does not divide by mesh.fsdp={fsdp}"
        )
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(config, mesh: Mesh) -> None:
    """Raises UserError if the rows that are computed at a time do not divide over the devices."""
    rows = config.batch_size // config.accumulation
    if rows % mesh.size:
        raise UserError(
            f"config.batch_size={config.batch_size} in accumulation={config.accumulation} parts is "
            f"{rows} sequences at a time, which do not divide over {mesh.size} devices"
        )


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
        return NamedSharding(mesh, P())

    return jax.tree.map(sharding, names(state), state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all devices."""
    return NamedSharding(mesh, BATCH)


def place_batch(mesh: Mesh, batch: dict) -> dict:
    """This process's rows of a batch (NumPy) -> the global batch on the devices."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps activations (B, ...) cut along B, where a mesh is set; elsewhere does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)
