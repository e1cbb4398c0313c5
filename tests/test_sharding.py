"""Sharding: eight devices compute what one does, and hold what they should.

Run as a program, this file prints what it measured on eight devices, as JSON. Tests that need no
more than one device run in pytest's own process.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from bipe_jax import model, sharding, step
from bipe_jax.data.stream import annotate
from bipe_jax.errors import UserError
from bipe_jax.segments import Rule

# (devices of axis data, of axis fsdp) -> parts of the batch.
MESHES = {(8, 1): 1, (4, 2): 2, (1, 8): 1}
# The dimension that fsdp cuts: the model's width. Layers are stacked in front; norms stay whole.
CUT = {
    "embed/table": 1,
    "absolute/learned_offset/table": 1,
    "layers/attention/query": 1,
    "layers/attention/key": 1,
    "layers/attention/value": 1,
    "layers/attention/output": 3,
    "layers/attention_norm/scale": None,
    "layers/feed_forward/gate": 1,
    "layers/feed_forward/up": 1,
    "layers/feed_forward/down": 2,
    "layers/feed_forward_norm/scale": None,
    "norm/scale": None,
    "output/kernel": 0,
}


def mesh_config(fsdp=1, **overrides):
    return tiny(
        batch_size=16,
        mesh__fsdp=fsdp,
        schedule__warmup_steps=0,
        optimizer__learning_rate=0.01,
        # So that the update follows the size of the gradient, which Adam else divides away.
        optimizer__epsilon=1e-3,
        **overrides,
    )


def make_state(config) -> dict:
    """A state of random parameters, on the host."""
    shapes = jax.eval_shape(functools.partial(step.init_state, config), jax.random.key(0))
    generator = np.random.default_rng(0)
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    state["params"] = jax.tree.map(
        lambda s: (0.2 * generator.standard_normal(s.shape)).astype(np.float32), shapes["params"]
    )
    return state


def make_batches(config) -> list[dict]:
    """Two; their rows have unequal numbers of targets."""
    generator = np.random.default_rng(1)
    batches = []
    for _ in range(2):
        ids = generator.integers(0, 64, (16, 17), dtype=np.int32)
        batch = annotate(ids, Rule(separators=(1, 2)))
        batch["weights"][:3] = 0
        batch["weights"][5, 4:] = 0
        batches.append(batch)
    return batches


def named(tree) -> dict:
    return dict(zip(jax.tree.leaves(sharding.names(tree)), jax.tree.leaves(tree), strict=True))


def placement(array) -> list:
    """Shape of the whole and of what one device holds, and how many different parts there are."""
    parts = {str(shard.index) for shard in array.addressable_shards}
    return [list(array.shape), list(array.addressable_shards[0].data.shape), len(parts)]


def run_on(mesh, config) -> tuple[dict, list]:
    """Two train steps on a mesh -> (state, metrics)."""
    with jax.set_mesh(mesh):
        _, train_step, abstract = step.compile_on(config, mesh)
        state = jax.tree.map(
            lambda x, s: jax.device_put(x, s.sharding), make_state(config), abstract
        )
        metrics = []
        for batch in make_batches(config):
            state, values = train_step(state, sharding.place_batch(mesh, batch))
            metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def refusal(function, *args) -> str:
    try:
        function(*args)
    except UserError as error:
        return str(error)
    return ""


def measure() -> dict:
    """What the tests below ask for, on eight devices."""
    config = mesh_config()
    update = jax.jit(functools.partial(step.train_step, config))
    one, losses = make_state(config), []
    for batch in make_batches(config):
        one, values = update(one, batch)
        losses.append({name: float(value) for name, value in values.items()})
    one = {name: np.asarray(x) for name, x in named(one).items()}

    found = {"devices": jax.device_count(), "single": losses, "meshes": {}}
    for (data, fsdp), parts in MESHES.items():
        config = mesh_config(fsdp, accumulation=parts)
        mesh = sharding.make_mesh(config)
        sharding.check_batch(config, mesh)
        state, metrics = run_on(mesh, config)
        state = named(state)
        batch = sharding.place_batch(mesh, make_batches(config)[0])
        found["meshes"][f"{data} {fsdp}"] = {
            "shape": dict(mesh.shape),
            "metrics": metrics,
            "names": sorted(state) == sorted(one),
            "differences": {n: float(abs(np.asarray(x) - one[n]).max()) for n, x in state.items()},
            "placements": {name: placement(x) for name, x in state.items()},
            "batch": {name: placement(x) for name, x in batch.items()},
        }

    found["refused"] = {
        "fsdp 3": refusal(sharding.make_mesh, mesh_config(3)),
        "fsdp 16": refusal(sharding.make_mesh, mesh_config(16)),
        "width 36": refusal(sharding.make_mesh, mesh_config(8, model__width=36)),
        "batch 12": refusal(sharding.check_batch, tiny(batch_size=12), mesh),
        "parts": refusal(sharding.check_batch, tiny(batch_size=16, accumulation=4), mesh),
        "batch 24": refusal(sharding.check_batch, tiny(batch_size=24, accumulation=3), mesh),
    }
    return found


@pytest.fixture(scope="module")
def measured():
    here = Path(__file__).parent
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
    }
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 8
    return found


@pytest.fixture(params=MESHES, ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
def on_mesh(request, measured):
    data, fsdp = request.param
    found = measured["meshes"][f"{data} {fsdp}"]
    assert found["shape"] == {"data": data, "fsdp": fsdp}
    return fsdp, found


def test_train_steps_equal_those_of_one_device(on_mesh, measured):
    _, found = on_mesh
    assert found["names"]
    for one, many in zip(measured["single"], found["metrics"], strict=True):
        assert one.keys() == many.keys()
        assert many["targets"] == (16 - 3) * 16 - 12
        for name in one:
            assert many[name] == pytest.approx(one[name], rel=2e-6), name
    for name, difference in found["differences"].items():
        assert difference < 2e-6, name


def test_each_parameter_and_its_moments_lie_where_they_should(on_mesh):
    fsdp, found = on_mesh
    moments = {"params": 0, "mu": 0, "nu": 0}
    for name, (shape, part, parts) in found["placements"].items():
        parameter = next((p for p in CUT if name.endswith(f"/{p}")), None)
        if parameter is None:  # a counter
            assert shape == part == []
            continue
        expected = list(shape)
        if CUT[parameter] is not None:
            assert shape[CUT[parameter]] == 32  # the width
            expected[CUT[parameter]] //= fsdp
        assert part == expected, name
        assert parts == (1 if CUT[parameter] is None else fsdp), name
        prefix = name.removesuffix(f"/{parameter}").rpartition("/")[2]
        moments[prefix] += 1
    assert moments == dict.fromkeys(moments, len(CUT))


def test_rows_of_a_batch_are_spread_over_all_devices(on_mesh):
    _, found = on_mesh
    assert {"tokens", "targets", "weights", "offset"} < found["batch"].keys()
    for shape, part, parts in found["batch"].values():
        assert (shape, part, parts) == ([16, 16], [2, 16], 8)


def test_meshes_and_batches_that_do_not_divide_are_refused(measured):
    refused = measured["refused"]
    assert refused.pop("batch 24") == ""  # 8 rows at a time
    for message, parts in zip(
        refused.values(),
        [
            ("config.mesh.fsdp=3", "8 devices"),
            ("config.mesh.fsdp=16", "8 devices"),
            ("config.model.width=36", "mesh.fsdp=8"),
            ("config.batch_size=12", "8 devices"),
            ("config.batch_size=16", "accumulation=4", "8 devices"),
        ],
        strict=True,
    ):
        assert all(part in message for part in parts), (message, parts)
        assert "\n" not in message


def test_fsdp_over_more_devices_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"config\.mesh\.fsdp=2 does not divide the 1 devices"):
        sharding.make_mesh(tiny(mesh__fsdp=2), jax.devices()[:1])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("absolute", [(), (("learned", "offset"),), (("learned", "position"),)])
def test_every_parameter_has_exactly_one_rule_of_its_rank(tied, absolute):
    config = tiny(model__tied_output=tied, position__absolute=absolute)
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    for name, leaf in named(params).items():
        assert len(sharding.parameter_spec(name)) == leaf.ndim, name


@pytest.mark.parametrize(
    "name", ["new/table", "layers/attention/gate", "layers/embed/table", "embed"]
)
def test_a_parameter_without_a_rule_is_an_error(name):
    with pytest.raises(KeyError, match=f"0 sharding rules match parameter '{name}'"):
        sharding.parameter_spec(name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("new/table", (4, 32)),
        ("layers/attention/gate", (2, 32, 4, 8)),
        ("embed/table", (4, 32, 1)),  # no rule for this rank
    ],
)
def test_a_state_with_a_parameter_without_a_rule_is_an_error(name, shape):
    leaf = jnp.zeros(shape)
    for part in reversed(name.split("/")):
        leaf = {part: leaf}
    mesh = sharding.make_mesh(tiny(), jax.devices()[:1])
    with pytest.raises(KeyError, match=f"'params/{name}'"):
        sharding.state_shardings(mesh, {"params": leaf})


if __name__ == "__main__":
    print(json.dumps(measure()))
