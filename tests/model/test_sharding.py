"""Sharding: eight devices compute what one does, and hold what they should.

Run as a program, this file prints what it measured on eight devices, as JSON. Tests that need no
more than one device run in pytest's own process.
"""

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import xla_flags
from paths import ROOT
from tiny import ENCODINGS, tiny_plan

from bipe_jax import collectives, model, segments, sharding
from bipe_jax.attention import kernels
from bipe_jax.attention.chunked import reference
from bipe_jax.attention.scoring import Side
from bipe_jax.checkpoint import Checkpoints
from bipe_jax.data.batches import annotate
from bipe_jax.errors import UserError
from bipe_jax.training import step
from tests.segments.test_levels import PIECES

# (devices of the axes data, fsdp, tensor, context) -> parts of the batch.
MESHES = {
    (8, 1, 1, 1): 1,
    (1, 8, 1, 1): 1,
    (4, 2, 1, 1): 2,
    (2, 1, 4, 1): 1,
    (1, 1, 1, 8): 1,
    (1, 2, 2, 2): 2,
}
MIXED = (1, 2, 2, 2)
EVERY = {name: ENCODINGS[name] for name in ("bipe_rope", "bipe_alibi", "sinusoidal")}
EVERY["all kinds"] = ((), kinds.TOGETHER)
OPTIONS = {
    "model__qk_norm": True, "model__logit_softcap": 4.0, "model__dropout": 0.25, "z_loss": 1e-3,
}  # fmt: skip
LEVELS = ("paragraph", "chapter")
EVERY["levels"] = (
    (("learned", "segment_in_paragraph"),),
    (("rope", "paragraph_offset"), ("alibi", "chapter"), ("t5", "paragraph"), ("fox", "chapter")),
)
RULE = segments.resolve("sentence", (5 * PIECES)[:64], 0, [(name, name) for name in LEVELS])
# What each axis cuts: parameter -> (dimension, axis) pairs. Layers are stacked in front; norms stay
# whole.
CUT = {
    "embed/table": {0: "tensor", 1: "fsdp"},
    "absolute/learned_offset/table": {1: "fsdp"},
    "layers/attention/query": {1: "fsdp", 2: "tensor"},
    "layers/attention/key": {1: "fsdp", 2: "tensor"},
    "layers/attention/value": {1: "fsdp", 2: "tensor"},
    "layers/attention/output": {1: "tensor", 3: "fsdp"},
    "layers/attention_norm/scale": {},
    "layers/feed_forward/gate": {1: "fsdp", 2: "tensor"},
    "layers/feed_forward/up": {1: "fsdp", 2: "tensor"},
    "layers/feed_forward/down": {1: "tensor", 2: "fsdp"},
    "layers/feed_forward_norm/scale": {},
    "norm/scale": {},
    "output/kernel": {0: "fsdp", 1: "tensor"},
}
# The same of activations, by name; a batch is cut over both data and fsdp.
ACTIVATION_CUT = {
    "kernel": {0: ("fsdp",), 1: ("tensor",)},
    "hidden": {0: ("data", "fsdp"), 1: ("context",)},
    "heads": {0: ("data", "fsdp"), 1: ("context",), 2: ("tensor",)},
    "feed_forward": {0: ("data", "fsdp"), 1: ("context",), 2: ("tensor",)},
}


def key(mesh) -> str:
    return " ".join(map(str, mesh))


def mesh_config(data=0, fsdp=1, tensor=1, context=1, **overrides):
    return tiny_plan(
        batch_size=16,
        mesh__data=data,
        mesh__fsdp=fsdp,
        mesh__tensor=tensor,
        mesh__context=context,
        segments__levels=LEVELS,
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


def make_batches(documents=False) -> list[dict]:
    """Two; their rows have unequal numbers of targets."""
    generator = np.random.default_rng(1)
    batches = []
    for _ in range(2):
        ids = generator.integers(0, 64, (16, 17), dtype=np.int32)
        runs = (generator.random((16, 17)) < 0.2).cumsum(axis=1) if documents else None
        batch = annotate(ids, RULE, runs)
        assert all(batch[name].max() > 0 for name in segments.coordinate_names(mesh_config()))
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


def run_on(mesh, config, documents=False) -> tuple[dict, list]:
    """Two train steps on a mesh -> (state, metrics)."""
    with jax.set_mesh(mesh):
        _, train_step, abstract = step.compile_on(config, mesh)
        state = jax.tree.map(
            lambda x, s: jax.device_put(x, s.sharding), make_state(config), abstract
        )
        metrics = []
        for batch in make_batches(documents):
            state, values = train_step(state, sharding.place_batch(mesh, batch))
            metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def run_on_one(config, documents=False) -> tuple[dict, list]:
    update = jax.jit(functools.partial(step.train_step, config))
    state, metrics = make_state(config), []
    for batch in make_batches(documents):
        state, values = update(state, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return {name: np.asarray(x) for name, x in named(state).items()}, metrics


def differences(state, one) -> dict:
    return {n: float(abs(np.asarray(x) - one[n]).max()) for n, x in named(state).items()}


def activations(mesh, config) -> dict:
    """Of each activation that the forward pass constrains: name -> [shape, shape of a part]."""
    found = {}
    constrain = sharding.constrain

    def watched(x, name):
        x = constrain(x, name)
        jax.debug.inspect_array_sharding(
            x,
            callback=lambda s: found.update({name: [list(x.shape), list(s.shard_shape(x.shape))]}),
        )
        return x

    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "constrain", watched)
        batch = sharding.place_batch(mesh, make_batches()[0])
        params = make_state(config)["params"]
        jax.block_until_ready(jax.jit(functools.partial(model.hidden, config))(params, batch))
    return found


def splash_in_parts() -> list:
    """Errors of splash attention with queries cut in two: of the result, of its gradient by v."""
    mesh = sharding.make_mesh(mesh_config(4, context=2, sequence_length=512))
    generator = np.random.default_rng(0)
    q, k, v = generator.normal(size=(3, 4, 512, 2, 16)).astype(np.float32)
    documents = np.repeat(np.arange(8), 64)[None].repeat(4, axis=0)

    def local(devices, q, k, v, documents):
        part = devices.index("context")
        query = Side(part * q.shape[1] + jnp.arange(q.shape[1])[None], documents, [])
        k, v, key = devices.gather((k, v, query), "context", 1)
        return kernels.splash(
            q, k, v, query, key, [], jnp.arange(2), shard=(part, 2), interpret=True
        )

    heads, tokens = sharding.ACTIVATIONS["heads"], sharding.ACTIVATIONS["tokens"]

    def splash(v):
        run = collectives.on_each(local, (heads, heads, heads, tokens), heads)
        return run(q, k, v, documents)

    def expected(v):
        side = Side(jnp.arange(512)[None], documents, [])
        return reference(q, k, v, side, side, [], jnp.arange(2))

    def both(function):
        out, pull = jax.vjp(function, v)
        return out, pull(jnp.cos(out))[0]

    with jax.set_mesh(mesh):
        got = jax.jit(lambda: both(splash))()
    wanted = jax.jit(lambda: both(expected))()
    return [
        float(abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(got, wanted, strict=True)
    ]


def restored_elsewhere(directory) -> dict:
    """Largest differences of a state that is saved on one mesh and restored on another."""
    config = mesh_config(*MIXED)
    state, _ = run_on(sharding.make_mesh(config), config)
    with Checkpoints(directory, keep=1, every=1) as checkpoints:
        checkpoints.save(state, {}, config, SimpleNamespace(model=b""), {})
        checkpoints._manager.wait_until_finished()
        other = mesh_config(2, 4)
        mesh = sharding.make_mesh(other)
        restored, _ = checkpoints.restore(step.compile_on(other, mesh)[2], checkpoints.latest)
    placed = named(restored)["params/layers/feed_forward/gate"]
    return {
        "placement": placement(placed),
        "differences": differences(restored, named(jax.tree.map(np.asarray, state))),
    }


def refusal(function, *args) -> str:
    try:
        function(*args)
    except UserError as error:
        return str(error)
    return ""


def measure() -> dict:
    """What the tests below ask for, on eight devices."""
    one, losses = run_on_one(mesh_config())
    found = {"devices": jax.device_count(), "single": losses, "meshes": {}, "encodings": {}}
    for sizes, parts in MESHES.items():
        config = mesh_config(*sizes, accumulation=parts)
        mesh = sharding.make_mesh(config)
        sharding.check_batch(config, mesh)
        state, metrics = run_on(mesh, config)
        batch = sharding.place_batch(mesh, make_batches()[0])
        found["meshes"][key(sizes)] = {
            "shape": dict(mesh.shape),
            "metrics": metrics,
            "names": sorted(named(state)) == sorted(one),
            "differences": differences(state, one),
            "placements": {name: placement(x) for name, x in named(state).items()},
            "batch": {name: placement(x) for name, x in batch.items()},
        }
    found["activations"] = activations(mesh, config)

    for name, (absolute, relative) in EVERY.items():
        encoding = {"position__absolute": absolute, "position__relative": relative}
        if name == "all kinds":
            encoding["model__layers"] = 4
        config = mesh_config(*MIXED, model__kv_heads=2, **encoding)
        one, losses = run_on_one(config, documents=True)
        state, metrics = run_on(sharding.make_mesh(config), config, documents=True)
        found["encodings"][name] = [losses, metrics, differences(state, one)]

    one, losses = run_on_one(mesh_config(**OPTIONS))
    config = mesh_config(*MIXED, accumulation=2, **OPTIONS)
    state, metrics = run_on(sharding.make_mesh(config), config)
    found["options"] = [losses, metrics, differences(state, one)]

    found["splash"] = splash_in_parts()
    with tempfile.TemporaryDirectory() as directory:
        found["restored"] = restored_elsewhere(directory)

    mesh = sharding.make_mesh(mesh_config())
    odd = {"model__width": 36, "model__heads": 2, "model__kv_heads": 2}
    found["refused"] = {
        "fsdp 3": refusal(sharding.make_mesh, mesh_config(fsdp=3)),
        "fsdp 16": refusal(sharding.make_mesh, mesh_config(fsdp=16)),
        "data 2": refusal(sharding.make_mesh, mesh_config(2, 2)),
        "width 36": refusal(sharding.make_mesh, mesh_config(fsdp=8, **odd)),
        "heads 4": refusal(sharding.make_mesh, mesh_config(tensor=8)),
        "kv_heads 2": refusal(sharding.make_mesh, mesh_config(tensor=4, model__kv_heads=2)),
        "length 36": refusal(
            sharding.make_mesh, mesh_config(context=8, sequence_length=36, loss_chunk=4)
        ),
        "batch 12": refusal(sharding.check_batch, tiny_plan(batch_size=12), mesh),
        "parts": refusal(sharding.check_batch, tiny_plan(batch_size=16, accumulation=4), mesh),
        "batch 24": refusal(sharding.check_batch, tiny_plan(batch_size=24, accumulation=3), mesh),
    }
    return found


@pytest.fixture(scope="module")
def measured():
    flags = f"--xla_force_host_platform_device_count=8 {xla_flags.QUICK}"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 8
    return found


@pytest.fixture(params=MESHES, ids=key)
def on_mesh(request, measured):
    found = measured["meshes"][key(request.param)]
    assert found["shape"] == dict(zip(sharding.AXES, request.param, strict=True))
    return found


def assert_same_metrics(single, several):
    for one, many in zip(single, several, strict=True):
        assert one.keys() == many.keys()
        for name in one:
            assert many[name] == pytest.approx(one[name], rel=3e-6), name


def test_train_steps_equal_those_of_one_device(on_mesh, measured):
    assert on_mesh["names"]
    assert_same_metrics(measured["single"], on_mesh["metrics"])
    assert on_mesh["metrics"][0]["targets"] == (16 - 3) * 16 - 12
    for name, difference in on_mesh["differences"].items():
        assert difference < 2e-6, name


@pytest.mark.parametrize("encoding", EVERY)
def test_each_encoding_computes_the_same_on_all_axes_together(encoding, measured):
    single, several, differences = measured["encodings"][encoding]
    assert_same_metrics(single, several)
    for name, difference in differences.items():
        assert difference < 2e-6, name


def test_options_of_the_model_compute_the_same_on_all_axes_and_in_parts(measured):
    """Dropout among them: what is dropped depends on a row's number alone."""
    single, several, differences = measured["options"]
    assert "z_loss" in single[0]
    assert_same_metrics(single, several)
    for name, difference in differences.items():
        assert difference < 2e-6, name


def test_each_parameter_and_its_moments_lie_where_they_should(on_mesh):
    sizes = on_mesh["shape"]
    moments = {"params": 0, "mu": 0, "nu": 0}
    for name, (shape, part, parts) in on_mesh["placements"].items():
        parameter = next((p for p in CUT if name.endswith(f"/{p}")), None)
        if parameter is None:  # counters, and the spikes' (2,) statistics: whole on each device
            assert shape == part and shape in ([], [2]) and parts == 1, name
            continue
        expected, different = list(shape), 1
        for dimension, axis in CUT[parameter].items():
            expected[dimension] //= sizes[axis]
            different *= sizes[axis]
        assert part == expected, name
        assert parts == different, name
        prefix = name.removesuffix(f"/{parameter}").rpartition("/")[2]
        moments[prefix] += 1
    assert moments == dict.fromkeys(moments, len(CUT))


def test_each_activation_lies_where_it_should(measured):
    sizes = dict(zip(sharding.AXES, MIXED, strict=True))
    found = measured["activations"]
    assert found.keys() == ACTIVATION_CUT.keys()
    assert found.keys() | {"tokens"} == sharding.ACTIVATIONS.keys()
    for name, (shape, part) in found.items():
        expected = list(shape)
        for dimension, axes in ACTIVATION_CUT[name].items():
            expected[dimension] //= math.prod(sizes[axis] for axis in axes)
        assert part == expected, name


def test_a_batch_is_cut_along_rows_and_length(on_mesh):
    sizes = on_mesh["shape"]
    rows, context = sizes["data"] * sizes["fsdp"], sizes["context"]
    assert {"tokens", "targets", "weights", "offset"} < on_mesh["batch"].keys()
    for shape, part, parts in on_mesh["batch"].values():
        assert (shape, part) == ([16, 16], [16 // rows, 16 // context])
        assert parts == rows * context


def test_splash_attention_with_queries_cut_in_parts(measured):
    assert max(measured["splash"]) < 1e-5


def test_a_state_is_restored_exactly_onto_another_mesh(measured):
    restored = measured["restored"]
    assert restored["placement"] == [[2, 32, 48], [2, 8, 48], 4]
    assert set(restored["differences"].values()) == {0.0}


def test_meshes_and_batches_that_do_not_divide_are_refused(measured):
    refused = measured["refused"]
    assert refused.pop("batch 24") == ""  # 8 rows at a time
    for message, parts in zip(
        refused.values(),
        [
            ("data any x fsdp 3 x tensor 1 x context 1", "multiply to the 8 devices"),
            ("fsdp 16", "8 devices"),
            ("data 2 x fsdp 2", "8 devices"),
            ("config.model.width=36", "mesh.fsdp=8"),
            ("config.model.heads=4", "mesh.tensor=8"),
            ("config.model.kv_heads=2", "mesh.tensor=4"),
            ("config.sequence_length=36", "mesh.context=8"),
            ("config.batch_size=12", "8 devices"),
            ("config.batch_size=16", "accumulation=4", "8 devices"),
        ],
        strict=True,
    ):
        assert all(part in message for part in parts), (message, parts)
        assert "\n" not in message


def test_activations_name_axes_of_the_mesh_only():
    """JAX ignores a misspelt axis of a constraint in silence."""
    for spec in sharding.ACTIVATIONS.values():
        for entry in spec:
            axes = entry if isinstance(entry, tuple) else (entry,)
            assert set(axes) <= {None, *sharding.AXES}, spec


def test_fsdp_over_more_devices_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"fsdp 2 .* does not multiply to the 1 devices"):
        sharding.make_mesh(tiny_plan(mesh__fsdp=2), jax.devices()[:1])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("absolute", [(), (("learned", "offset"),), (("learned", "position"),)])
@pytest.mark.parametrize(
    "relative", [(), (("t5", "segment"),), (("t5", "segment", ("shared", False)),)]
)
def test_every_parameter_is_declared_with_axes_of_its_rank(tied, absolute, relative):
    config = tiny_plan(
        model__tied_output=tied, position__absolute=absolute, position__relative=relative
    )
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    declared = model.declared(config)
    assert declared.keys() == named(params).keys()
    for name, leaf in named(params).items():
        assert len(declared[name].axes) == leaf.ndim, name


@pytest.mark.parametrize("axes", [("fsdp",), ("fsdp", "width"), ("fsdp", None, None)])
def test_a_parameter_with_wrong_axes_cannot_be_declared(axes):
    with pytest.raises(ValueError, match="cannot have the axes"):
        sharding.parameter(jnp.zeros((4, 8)), sharding.P(*axes))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("new/table", (4, 32)),
        ("layers/attention/gate", (2, 32, 4, 8)),
        ("embed/table", (4, 32, 1)),  # declared with another rank
    ],
)
def test_a_state_with_a_parameter_that_is_not_declared_is_an_error(name, shape):
    leaf = jnp.zeros(shape)
    for part in reversed(name.split("/")):
        leaf = {part: leaf}
    mesh = sharding.make_mesh(tiny_plan(), jax.devices()[:1])
    with pytest.raises(KeyError, match=f"'params/{name}' was not declared"):
        sharding.state_shardings(mesh, {"params": leaf}, model.declared(tiny_plan()))


if __name__ == "__main__":
    print(json.dumps(measure()))
