# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Collectives: over the axes of the mesh inside a program, and between the processes of a run."""

import contextlib
import functools
import json
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from bipe_jax.sharding import ACTIVATIONS


@contextlib.contextmanager
def _losing_none() -> Generator[None]:
    """A context of collectives of all processes. Raises JaxRuntimeError if one of them is lost.

    JAX raises ValueError where it learns of that while it dispatches the program.
    """
    try:
        yield
    except ValueError as error:
        raise jax.errors.JaxRuntimeError(str(error)) from error


def of_all_processes(value: Any) -> list[Any]:
    """A value of JSON's types from each process, in the order of their numbers."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with _losing_none():
        sizes = multihost_utils.process_allgather(np.int32(len(text))).tolist()
        padded = np.pad(text, (0, max(sizes) - len(text)))
        texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def of_first_process(make: Callable[[], Any]) -> Any:
    """A value of JSON's types that the first process makes, in all processes."""
    return of_all_processes(make() if jax.process_index() == 0 else None)[0]


def bytes_of_first_process(make: Callable[[], bytes]) -> bytes:
    """Bytes that the first process makes, in all processes."""
    data = np.frombuffer(make(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    with _losing_none():
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        padded = data if len(data) else np.zeros(size, np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


class Devices:
    """Collectives over axes of the mesh, inside `on_each`. Over axes of one device they do nothing."""

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = sizes

    def count(self, axis: str | None) -> int:
        return self._sizes.get(axis, 1) if axis else 1

    def index(self, axis: str) -> jax.Array | int:
        """Which of the parts along an axis this is."""
        return jax.lax.axis_index(axis) if self.count(axis) > 1 else 0

    def sum(self, x: jax.Array, *axes: str) -> jax.Array:
        return jax.lax.psum(x, self._cut(axes))

    def max(self, x: jax.Array, *axes: str) -> jax.Array:
        return jax.lax.pmax(x, cut) if (cut := self._cut(axes)) else x

    def gather(self, tree: Any, axis: str | None, dimension: int) -> Any:
        """All parts along an axis, in order."""
        if self.count(axis) == 1:
            return tree

        def all_parts(x: jax.Array) -> jax.Array:
            return jax.lax.all_gather(x, axis, axis=dimension, tiled=True)

        return jax.tree.map(all_parts, tree)

    def sum_part(self, x: jax.Array, axis: str | None, dimension: int) -> jax.Array:
        """This device's part of a sum over an axis."""
        if self.count(axis) == 1:
            return x
        # The parts become a dimension: XLA for TPUs sums all of an array that is cut along its last one.
        before, after = x.shape[:dimension], x.shape[dimension + 1 :]
        parts = x.reshape(*before, self.count(axis), -1, *after)
        return jax.lax.psum_scatter(jnp.moveaxis(parts, dimension, 0), axis)

    def _cut(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.count(axis) > 1)


def on_each(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function(devices, *args)` on each device's parts of arrays that are sharded by the specs.

    Where no mesh of several devices is set, it gets the whole arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(function, Devices(dict(mesh.shape)))
    if mesh.size <= 1:
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def look_up(parameter: nnx.Param[Any], ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows (B, L, D) of a parameter (R, D) for integers (B, L), rounded to a dtype, in the parameter's own.

    Each device gathers the table in that dtype. Its gradients are summed over a device's tokens in the
    parameter's dtype, and over the devices in that one, in parts, each once.
    """
    spec, own = parameter.get_metadata()["axes"], parameter[...].dtype

    def local(devices: Devices, table: jax.Array, ids: jax.Array) -> jax.Array:
        @jax.custom_vjp
        def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
            for dimension, axis in enumerate(spec):
                table = devices.gather(table, axis, dimension)
            return table[ids].astype(own)

        def forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            return rows(table, ids), ids

        def backward(ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
            shape = [
                size * devices.count(axis) for size, axis in zip(table.shape, spec, strict=True)
            ]
            grad = jnp.zeros(shape, own).at[ids].add(gradient).astype(table.dtype)
            for dimension, axis in enumerate(spec):
                grad = devices.sum_part(grad, axis, dimension)
            return grad, None

        rows.defvjp(forward, backward)
        return rows(table, ids)

    run = on_each(local, (spec, ACTIVATIONS["tokens"]), ACTIVATIONS["hidden"])
    return run(parameter[...].astype(dtype), ids)
