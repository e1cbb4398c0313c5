"""ALiBi's slopes with 6 and 12 heads and grouped keys, on eight devices under every axis of the mesh.

The truth is the decoder in float64 NumPy, which knows of no mesh. Run as a program, this file prints the
largest errors of the logits, as JSON.
"""

import functools
import json
import sys

import jax
import numpy as np
import numpy_reference
import pytest
import several
from tiny import tiny_plan

from bipe_jax import model, sharding
from bipe_jax.data.batches import annotate
from bipe_jax.segments import Rule

# Devices of the axes data, fsdp, tensor and context; heads, and heads of keys.
CASES = {
    "data": ((8, 1, 1, 1), 6, 2),
    "fsdp": ((1, 8, 1, 1), 12, 4),
    "tensor 2": ((4, 1, 2, 1), 6, 2),
    "tensor 4": ((2, 1, 4, 1), 12, 4),
    "tensor, a head of keys each": ((4, 1, 2, 1), 12, 2),
    "context": ((1, 1, 1, 8), 6, 3),
    "all": ((1, 2, 2, 2), 12, 4),
    "all, 6 heads": ((1, 2, 2, 2), 6, 2),
}
RELATIVE = (("alibi", "segment", ("slope_scale", 96.0)), ("alibi", "position"))


def measure(axes, heads, kv_heads) -> float:
    """The largest difference of the logits from the reference."""
    names = ("mesh__data", "mesh__fsdp", "mesh__tensor", "mesh__context")
    config = tiny_plan(
        batch_size=8, model__width=8 * heads, model__heads=heads, model__kv_heads=kv_heads,
        position__relative=RELATIVE, **dict(zip(names, axes, strict=True)),
    )  # fmt: skip
    generator = np.random.default_rng(0)
    batch = annotate(generator.integers(0, 64, (8, 17), dtype=np.int32), Rule((1, 2)))
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    params = jax.tree.map(
        lambda s: (0.2 * generator.standard_normal(s.shape)).astype(np.float32), shapes
    )
    mesh = sharding.make_mesh(config)
    shardings = sharding.state_shardings(mesh, params, model.declared(config))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, params, shardings)
        inputs = sharding.place_batch(mesh, batch)
        found = jax.jit(functools.partial(model.apply, config))(placed, inputs)
    return float(abs(np.asarray(found) - numpy_reference.logits(config, params, batch)).max())


@pytest.fixture(scope="module")
def errors():
    ((code, out, err),) = several.finish(several.start(1, 8, __file__))
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("case", CASES)
def test_logits_on_a_mesh_are_those_of_the_reference(case, errors):
    assert errors[case] < 2e-5


if __name__ == "__main__":
    assert jax.device_count() == 8
    json.dump({name: measure(*case) for name, case in CASES.items()}, sys.stdout)
