"""Encodings of a model: by layer, with parameters of each layer's own, and every method of a kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from jax.sharding import PartitionSpec as P
from tiny import tiny_plan

from bipe_jax import model, positions
from bipe_jax.errors import UserError
from bipe_jax.evaluation import attention_distance, loaded
from bipe_jax.evaluation.decode import Generator
from bipe_jax.positions import registry
from bipe_jax.positions.kind import Relative
from bipe_jax.positions.t5 import bucket_bounds
from bipe_jax.sharding import parameter
from tests.model.test_model import annotated, close, draw, draw_tokens

KEY = jax.random.key(0)
DOCUMENTS = np.array([[0] * 5 + [1] * 9 + [2] * 10, [0] * 20 + [1] * 4])

# Every position and combination of layers; all of them have four layers.
BY_LAYER = {
    "every fourth without": (("rope", "position", ("layers", "0,1,2/4")),),
    "two rotations in turn": (
        ("rope", "position", ("layers", "0/2")),
        ("rope", "segment", ("layers", "1/2"), ("theta", 500.0)),
    ),
    "one kind and coordinate twice": (
        ("rope", "position", ("layers", "0,3")),
        ("rope", "position", ("layers", "1,2"), ("theta", 100.0)),
    ),
    "tables of each layer's own": (("t5", "segment", ("shared", False)),),
    "tables of some layers": (
        ("t5", "position", ("shared", False), ("layers", "1,3")),
        ("kerple-log", "segment", ("layers", "0/2")),
    ),
}


def config_of(relative, **overrides):
    overrides = {"model__layers": 4, "position__absolute": ()} | overrides
    return tiny_plan(position__relative=relative, **overrides)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("relative", BY_LAYER.values(), ids=BY_LAYER)
def test_layers_have_the_encodings_that_their_entries_say(relative, remat):
    config = config_of(relative, model__remat=remat)
    params = draw(config)
    inputs = annotated(draw_tokens(0, 2, 24), document_ids=DOCUMENTS)
    got = jax.jit(functools.partial(model.apply, config))(params, inputs)
    wanted = reference.logits(config, params, inputs)
    close(got, wanted, atol=2e-5)
    everywhere = tuple(tuple(x for x in e if x[0] != "layers") for e in relative[:1])
    if "layers" in str(relative):
        other = config_of(everywhere)
        shapes = jax.eval_shape(functools.partial(model.init, other), KEY)
        if jax.tree.structure(shapes) == jax.tree.structure(params):  # the same parameters serve
            assert np.abs(reference.logits(other, params, inputs) - wanted).max() > 1e-2


@pytest.mark.parametrize("relative", BY_LAYER.values(), ids=BY_LAYER)
def test_decoding_by_layer_equals_the_whole_forward_pass(relative):
    check_decoding(config_of(relative))


def check_decoding(config):
    """Each drawn token is the most probable one of the whole forward pass."""
    loaded_model = loaded.on_all_devices(config, draw(config))
    forward = jax.jit(functools.partial(model.apply, config))
    prompts = [draw_tokens(i, 1, n)[0].astype(np.int32) for i, n in enumerate((1, 19))]
    for prompt, answer in zip(prompts, Generator(loaded_model, 60)(prompts, 10), strict=True):
        row = np.concatenate([prompt, answer])[None]
        logits = np.asarray(forward(loaded_model.params, annotated(row)))[0]
        picked = logits[np.arange(len(prompt) - 1, row.size - 1), answer]
        assert (picked > logits[len(prompt) - 1 : -1].max(axis=-1) - 1e-4).all()


def test_periods_and_names():
    period = {name: config_of(relative).encodings.period for name, relative in BY_LAYER.items()}
    assert list(period.values()) == [4, 2, 4, 1, 2]
    twice = config_of(BY_LAYER["one kind and coordinate twice"])
    assert [e.name for e in twice.encodings.relative] == ["rope_position", "rope_position_2"]
    params = jax.eval_shape(
        functools.partial(model.init, config_of(BY_LAYER["tables of some layers"])), KEY
    )
    assert params["layers"]["relative"]["t5_position"]["table"].shape == (2, 32, 4)
    assert params["relative"]["kerple-log_segment"]["p"].shape == (4,)


@pytest.mark.parametrize(
    ("relative", "words"),
    [
        ((("rope", "segment", ("layers", "4")),), "layers='4' must be numbers of the 4 layers"),
        ((("rope", "segment", ("layers", "1/1")),), "layers='1/1' must be numbers"),
        ((("rope", "segment", ("layers", "x")),), "layers='x' must be numbers"),
        ((("rope", "segment", ("layers", "5/8")),), "is none of the model's 4 layers"),
        ((("rope", "segment", ("layers", 3)),), "layers=3 must be a string"),
        ((("t5", "segment", ("shared", 1)),), "shared=1 must be True or False"),
        (
            (("rope", "segment", ("layers", "0,1")), ("rope", "position", ("layers", "1/2"))),
            "rope_segment and rope_position would turn the same pairs",
        ),
        (
            (("t5", "segment", ("layers", "0,1")), ("t5", "segment", ("layers", "1/2"))),
            "names the same kind and coordinate twice",
        ),
        ((("t5", "offset"),), r"\('t5', 'offset'\).*use 'position' or 'segment'"),
        ((("t5", "segment", ("buckets", 7)),), "buckets=7 must be an even number"),
        ((("t5", "segment", ("distance", 16)),), "distance=16 must be above buckets / 2 = 16"),
        ((("kerple-log", "offset"),), r"\('kerple-log', 'offset'\)"),
    ],
)
def test_entries_that_make_no_sense_are_refused_by_name(relative, words):
    with pytest.raises(UserError, match=f"position.relative.*{words}"):
        config_of(relative)


# Kinds of one class each: every method that a kind can override.


class Stretched(Relative):
    """Queries and keys are treated unlike, and both get two more features."""

    def __init__(self, config, coordinate, key):
        pass

    def queries(self, q, features):
        return jnp.concatenate([q, jnp.cos(features)[..., None, None] + 0 * q[..., :2]], axis=-1)

    def keys(self, k, features):
        return jnp.concatenate(
            [2 * k, jnp.sin(features)[..., None, None] + 0 * k[..., :2]], axis=-1
        )


class Window(Relative):
    """Only keys less than 3 away are visible."""

    def __init__(self, config, coordinate, key):
        pass

    def visible(self, query, key):
        return query[:, None, :, None] - key[:, None, None, :] < 3


class Forgetting(Relative):
    """A bias by running sums of gates, which read the layer's input."""

    shared = False
    reads_input = True
    running = True

    def __init__(self, config, coordinate, key):
        shape = (config.model.width, config.model.heads)
        self.gate = parameter(jax.random.normal(key, shape), P("fsdp", "tensor"))

    def features(self, coordinate, x=None, before=None):
        steps = jax.nn.log_sigmoid(x.astype(jnp.float32) @ self.gate[...])
        sums = jnp.cumsum(steps, axis=1)
        return sums if before is None else sums + before

    def bias(self, query, key, heads):
        query, key = (jnp.moveaxis(x, -1, 1) for x in (query, key))
        return query[..., None] - key[..., None, :]


class Capped(Relative):
    """Whole rows of logits: what lies above each row's mean of what is visible is halved."""

    def __init__(self, config, coordinate, key):
        pass

    def logits(self, logits, q, query, key, visible, heads):
        count = jnp.sum(visible, axis=-1, keepdims=True)
        mean = jnp.sum(jnp.where(visible, logits, 0), axis=-1, keepdims=True) / count
        return jnp.where(logits > mean, (logits + mean) / 2, logits)


KINDS = {"stretched": Stretched, "window": Window, "forgetting": Forgetting, "capped": Capped}


@pytest.fixture
def kinds(monkeypatch):
    for name, kind in KINDS.items():
        monkeypatch.setitem(registry.RELATIVE, name, kind)


def plain_forward(config, kind, params, inputs):
    """Final hidden states by the reference backend's formula, all logits at once, layer by layer."""
    p, m = jax.tree.map(np.float64, params), config.model
    tokens, segment = inputs["tokens"], np.asarray(inputs["segment"])
    x = p["embed"]["table"][tokens]
    causal = np.tri(tokens.shape[1], dtype=bool)[None, None]
    for i in range(m.layers):
        layers = p["layers"]
        w = {name: stacked[i] for name, stacked in layers["attention"].items()}
        y = reference.rms_norm(x, layers["attention_norm"]["scale"][i], m.norm_epsilon)
        q, k, v = (np.einsum("bld,dnh->blnh", y, w[name]) for name in ("query", "key", "value"))
        if kind == "stretched":
            more = [np.repeat(f(segment)[..., None, None], m.heads, 2) for f in (np.cos, np.sin)]
            q = np.concatenate([q, more[0], more[0]], axis=-1)
            k = np.concatenate([2 * k, more[1], more[1]], axis=-1)
        z = np.einsum("blnh,bsnh->bnls", q, k) / np.sqrt(q.shape[-1])
        visible = np.broadcast_to(causal, z.shape)
        if kind == "window":
            visible = visible & (segment[:, None, :, None] - segment[:, None, None, :] < 3)
        if kind == "forgetting":
            gates = y @ layers["relative"]["forgetting_segment"]["gate"][i]
            sums = np.cumsum(-np.log1p(np.exp(-gates)), axis=1)
            z = z + np.moveaxis(sums[:, :, None] - sums[:, None], -1, 1)
        if kind == "capped":
            seen = np.where(visible, z, np.nan)
            mean = np.nanmean(seen, axis=-1, keepdims=True)
            z = np.where(z > mean, (z + mean) / 2, z)
        z = np.where(visible, z, -np.inf)
        weights = np.exp(z - z.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + np.einsum("bnls,bsnh,nhd->bld", weights, v, w["output"])
        y = reference.rms_norm(x, layers["feed_forward_norm"]["scale"][i], m.norm_epsilon)
        x = x + reference.swiglu(y, **{n: s[i] for n, s in layers["feed_forward"].items()})
    return reference.rms_norm(x, p["norm"]["scale"], m.norm_epsilon)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_of_a_kind_reaches_training_decoding_and_analysis(kinds, kind):
    config = config_of(((kind, "segment"),), model__layers=2)
    params = draw(config)
    inputs = annotated(draw_tokens(0, 2, 24))
    hidden = jax.jit(lambda p, i: model.hidden(config, p, i)[0])(params, inputs)
    close(hidden, plain_forward(config, kind, params, inputs), atol=3e-5)
    attend = attention_distance.attend_and_measure(config, inputs, {"segment": 3})
    close(model.run(config, params, inputs, attend)[0], hidden, atol=1e-5)
    check_decoding(config)


def test_parameters_get_gradients_through_layers_chunks_and_remat(kinds, monkeypatch):
    """Those of a finite difference along one direction, in float32."""
    relative = (("forgetting", "segment"), ("t5", "position"), ("kerple-log", "segment"))
    config = config_of(relative, model__remat="full", model__attention="chunked")
    params = draw(config)
    inputs = annotated(draw_tokens(0, 2, 24))
    cotangent = np.random.default_rng(2).normal(size=(2, 24, 64))

    @jax.jit
    def loss(params):
        return jnp.sum(model.apply(config, params, inputs) * cotangent)

    gradients = jax.jit(jax.grad(loss))(params)
    named = {"relative": gradients["relative"], "layers": gradients["layers"]["relative"]}
    for leaf in jax.tree.leaves(named):
        assert np.abs(leaf).max() > 1e-3
    direction = jax.tree.map(jnp.zeros_like, params)
    rng = np.random.default_rng(3)
    for of in (direction, direction["layers"]):
        of["relative"] = jax.tree.map(lambda x: rng.normal(size=x.shape), of["relative"])
    step = 1e-2
    ends = [loss(jax.tree.map(lambda x, d: x + s * step * d, params, direction)) for s in (1, -1)]  # noqa: B023
    wanted = float(ends[0] - ends[1]) / (2 * step)
    got = sum(
        float(jnp.sum(g * d))
        for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
    )
    assert got == pytest.approx(wanted, rel=2e-2)


# T5 and KERPLE by themselves, through the function for arrays.


@pytest.mark.parametrize(
    ("buckets", "distance", "upper"),
    [
        (32, 128, [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]),
        (8, 64, [4, 8, 16, 32]),
    ],
)
def test_t5_buckets_begin_where_the_formula_says(buckets, distance, upper):
    half = buckets // 2
    assert bucket_bounds(buckets, distance) == (*range(1, half + 1), *upper[1:])


def arrays(L, N, K, H=8, rows=2):
    rng = np.random.default_rng(L)
    q, k, v = (rng.normal(size=(rows, L, heads, H)) for heads in (N, K, K))
    segment = (rng.random((rows, L)) < 0.3).cumsum(axis=1)
    position = np.broadcast_to(np.arange(L), (rows, L))
    return q, k, v, {"segment": segment, "position": position}


T5_TABLE = np.random.default_rng(0).normal(size=(32, 4))


def test_a_clamped_parameter_has_a_gradient_and_can_come_back():
    q, k, v, coordinates = arrays(20, 4, 4)

    def output(p):
        params = {"kerple-log_position": {"p": p, "a": jnp.ones(4)}}
        attended = positions.attend((("kerple-log", "position"),), coordinates, q, k, v, params)
        return attended["output"]

    below = jnp.array([-1.0, -1.0, 0.5, 0.5])
    np.testing.assert_array_equal(output(below), output(jnp.array([0.01, 0.01, 0.5, 0.5])))
    weights = np.random.default_rng(0).normal(size=q.shape)
    gradient = jax.grad(lambda p: jnp.sum(output(p) * weights))(below)
    assert (np.abs(gradient) > 1e-3).all()


def test_attend_has_the_initial_parameters_of_its_seed_and_refuses_others():
    q, k, v, coordinates = arrays(20, 4, 2)
    relative = (("rope", "segment"), ("t5", "position"))
    first, again, other = (
        positions.attend(relative, coordinates, q, k, v, seed=seed)["logits"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    for params, words in (
        ({"t5_segment": {"table": T5_TABLE}}, "t5_segment/table.*t5_position: table"),
        ({"t5_position": {"tables": T5_TABLE}}, "t5_position/tables"),
        ({"t5_position": {"table": T5_TABLE[1:]}}, r"\(31, 4\), and must have \(32, 4\)"),
    ):
        with pytest.raises(UserError, match=words):
            positions.attend(relative, coordinates, q, k, v, params)
