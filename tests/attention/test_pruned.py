"""Attention that skips what cannot count: equal to attention to everything, and skipping.

Run as a program, this file prints the largest error on eight devices.
"""

import functools
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import numpy_reference as reference
import pytest
import several
from tiny import largest_array, tiny_plan

from bipe_jax import model, sharding
from bipe_jax.attention import skipping
from bipe_jax.positions.alibi import Alibi
from bipe_jax.positions.window import Window
from tests.attention.test_attention import documents_of, draw, plain, segments_of
from tests.model.test_model import annotated, draw_tokens
from tests.model.test_model import draw as draw_params
from tests.positions.test_encodings import config_of

package = importlib.import_module("bipe_jax.attention")
loops = importlib.import_module("bipe_jax.attention.pruned")
SIZE = 8  # of blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(loops, "BLOCK", SIZE)
    monkeypatch.setattr(package, "SKIPS_FROM", 1)


def alibi(N, K, coordinate="segment", **options):
    config = tiny_plan(model__width=8 * N, model__heads=N, model__kv_heads=K)
    return Alibi(config, coordinate, jax.random.key(0), **options)


def attend(q, k, v, encoding, coordinate, documents=None):
    """With a loss's gradients; traced anew, since the result depends on sizes that JAX does not know of."""
    return jax.jit(
        lambda q, k, v: package.attention(
            q, k, v, encodings=[(encoding, encoding.features(coordinate))], document_ids=documents
        )
    )(q, k, v)


@pytest.mark.parametrize("L", [5, 8, 43, 130])
@pytest.mark.parametrize("apart", [False, True], ids=["whole", "documents"])
def test_grouped_heads_and_documents_equal_a_float64_loop(L, apart):
    q, k, v = draw(L, 2, L, 6, 2)
    segment = segments_of(L, 2, L)
    documents = documents_of(L, 2, L) if apart else None
    got = attend(q, k, v, alibi(6, 2, slope_scale=96.0), segment, documents)
    expected = reference.attend(q, k, v, reference.alibi(segment, 6, 96.0), documents)
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=0)


def distant(L=160, scale=1.0):
    """Two heads with slopes of 6 and 0.4 a token, and the first 8 keys, which late queries need not see."""
    q, k, v = (scale * x for x in draw(0, 1, L, 2, 2))
    return q, k, v, np.arange(L)[None], alibi(2, 2, "position", slope_scale=96.0)


def test_what_cannot_count_is_not_read():
    """Values that are no numbers would show."""
    q, k, v, position, encoding = distant()
    v[:, :SIZE] = np.nan
    out = np.isfinite(attend(q, k, v, encoding, position)).all(axis=-1)
    assert not out[:, :SIZE].any()
    assert out[:, 3 * SIZE :, 0].all()  # steep
    assert not out[:, : 5 * SIZE, 1].any() and out[:, 14 * SIZE :, 1].all()  # flat
    # Nor going back.
    gradient = jax.grad(lambda q: attend(q, k, v, encoding, position)[:, 14 * SIZE :].sum())(q)
    assert np.isfinite(gradient[:, 14 * SIZE :]).all()


@pytest.mark.parametrize("where", ["key", "query", "both"])
def test_large_norms_far_away_are_seen(where):
    """One key, or one query, that is large enough to outweigh the bias of the whole row."""
    q, k, v, position, encoding = distant()
    direction = np.ones(8) / np.sqrt(8)
    if where != "query":
        k[0, 3, :] = 60 * direction
        q[0, 150, :] = 60 * direction
    if where != "key":
        q[0, 150, :] = 600 * direction
        k[0, 3, :] = max(6, k[0, 3].max()) * direction
    # The token's own key is against its query.
    k[0, 150, :] = -3 * direction
    got = attend(q, k, v, encoding, position)
    bias = reference.alibi(position, 2, 96.0)
    expected = reference.attend(q, k, v, bias)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
    # It would be another result without that key.
    without = reference.attend(q[:, 8:], k[:, 8:], v[:, 8:], bias[..., 8:, 8:])
    assert np.abs(without[0, 142] - expected[0, 150]).max() > 0.1


def test_a_query_that_all_near_keys_are_against_sees_far_ones():
    """Under the bias of -55 a key of 0 outweighs its own, whose logit is -106."""
    q, k, v, position, encoding = distant()
    direction = np.ones(8) / np.sqrt(8)
    q[0, 150] = 60 * direction
    k[:, :SIZE], k[0, SIZE:] = 0.0, -5 * direction
    got = attend(q, k, v, encoding, position)
    bias = reference.alibi(position, 2, 96.0)
    np.testing.assert_allclose(got, reference.attend(q, k, v, bias), atol=1e-4, rtol=0)
    near = reference.attend(q[:, 8:], k[:, 8:], v[:, 8:], bias[..., 8:, 8:])
    assert np.abs(near[0, 142, 1] - got[0, 150, 1]).max() > 0.1


def test_long_segments_are_seen_whole():
    q, k, v = draw(0, 1, 96, 2, 1)
    segment = (np.arange(96) >= 90).astype(np.int32)[None]
    got = attend(q, k, v, alibi(2, 1, slope_scale=96.0), segment)
    expected = reference.attend(q, k, v, reference.alibi(segment, 2, 96.0))
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=0)


def test_documents_alone_let_blocks_be_skipped():
    q, k, v = draw(0, 1, 96, 2, 1)
    documents = np.repeat([[0, 1, 2]], [20, 40, 36], axis=1)
    run = jax.jit(lambda v: package.attention(q, k, v, document_ids=documents))
    expected = reference.attend(q, k, v, None, documents)
    np.testing.assert_allclose(run(v), expected, atol=2e-6, rtol=0)
    v[:, :16] = np.nan
    assert np.isfinite(run(v)[:, 24:]).all()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_window_hides_blocks_whatever_else_acts(chunked):
    """With a bias that has no bound."""
    config = config_of((("t5", "position"),))
    t5 = config.encodings.make_layer(jax.random.key(0))["t5_position"]
    window = Window(config, "position", jax.random.key(0), size=20, chunked=chunked)
    q, k, v = draw(0, 1, 96, 4, 2)
    position = np.arange(96)[None]

    def run(v):
        acting = [(e, position) for e in (t5, window)]
        return package.attention(q, k, v, encodings=acting)

    hidden = np.subtract.outer(position[0], position[0]) >= 20
    if chunked:
        hidden = np.not_equal.outer(position[0] // 20, position[0] // 20)
    bias = np.asarray(t5.bias(position, position, jnp.arange(4))) - 1e9 * hidden
    expected = reference.attend(q, k, v, bias)
    np.testing.assert_allclose(jax.jit(run)(v), expected, atol=2e-6, rtol=0)
    v[:, :SIZE] = np.nan
    assert np.isfinite(jax.jit(run)(v)[:, 40:]).all()


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "documents"])
def test_gradients_equal_those_of_a_plain_implementation(apart):
    L = 100
    q, k, v = draw(L, 2, L, 4, 2)
    segment = segments_of(L, 2, L)
    documents = documents_of(L, 2, L)
    visible = np.tri(L, dtype=bool)[None, None]
    if apart:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    encoding = alibi(4, 2, slope_scale=96.0)
    bias = reference.alibi(segment, 4, 96.0).astype(np.float32)
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def gradients(function):
        def loss(*args):
            return jnp.sum(function(*args) * cotangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    got = gradients(
        lambda q, k, v: attend(q, k, v, encoding, segment, documents if apart else None)
    )
    expected = gradients(lambda q, k, v: plain(q, k, v, bias, visible))
    for name, one, other in zip("qkv", got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5, err_msg=name)


def test_bfloat16_differs_by_its_rounding():
    q, k, v, position, encoding = distant()
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    got = attend(q, k, v, encoding, position)
    assert got.dtype == jnp.bfloat16
    expected = reference.attend(q, k, v, reference.alibi(position, 2, 96.0))
    largest = np.abs(np.asarray(v, np.float64)).max()
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, atol=2**-8 * largest, rtol=2**-8
    )


BOUNDED = {
    "alibi": (("alibi", "segment", ("slope_scale", 40.0)),),
    "alibi of two coordinates, turned": (
        ("alibi", "segment", ("slope_scale", 40.0)),
        ("alibi", "position"),
        ("rope", "position"),
    ),
    "window": (("window", "segment", ("size", 3)), ("rope", "position")),
    "chunks": (("window", "position", ("size", 13), ("chunked", True)),),
    "fox": (("fox", "position"),),
    "kerple-power": (("kerple-power", "position"),),
    "kerple-log": (("kerple-log", "segment"), ("alibi", "position", ("slope_scale", 9.0))),
    "window and powers": (("xpos", "position", ("base", 40.0)), ("window", "segment", ("size", 3))),
}


def steep(path, x):
    """Parameters of forgetting and of powers with which much is skipped."""
    name = jax.tree_util.keystr(path)
    if "gate_bias" in name:
        return x - 3.0
    return 2.0 + jnp.abs(x) if "kerple-power" in name and name.endswith("['p']") else x


def check_models(relative, monkeypatch, remat):
    """The loss and all gradients of a model with documents, beside attention to everything at once."""
    documents = np.repeat([[0, 1, 2], [4, 5, 5]], [10, 40, 46], axis=1)
    inputs = annotated(draw_tokens(0, 2, 96), document_ids=documents)
    cotangent = np.random.default_rng(2).normal(size=(2, 96, 32))
    results = []
    for backend, own in (("reference", "none"), ("chunked", remat)):
        config = config_of(
            relative, model__kv_heads=2, model__attention=backend, model__remat=own,
            sequence_length=96,
        )  # fmt: skip
        params = jax.tree_util.tree_map_with_path(
            steep, jax.tree.map(lambda x: x / 3, draw_params(config))
        )

        def loss(params, config=config):
            return jnp.mean(model.hidden(config, params, inputs)[0] * cotangent)

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    (wanted, gradients), (got, others) = results
    assert float(got) == pytest.approx(float(wanted), rel=1e-4, abs=1e-7)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    for path, one in jax.tree_util.tree_leaves_with_path(gradients):
        other = functools.reduce(lambda tree, key: tree[key.key], path, others)
        atol = max(2e-4 * np.abs(one).max(), np.finfo(np.float32).eps * largest)
        np.testing.assert_allclose(other, one, atol=atol, err_msg=str(path))


# What is slow to compile: those that take most ways.
USUAL = ("alibi", "fox", "window and powers")
ALL = [case if case in USUAL else pytest.param(case, marks=pytest.mark.slow) for case in BOUNDED]


@pytest.mark.parametrize("case", ALL)
def test_kinds_with_a_bound_give_the_loss_and_gradients_of_attention_to_everything(
    case, monkeypatch
):
    check_models(BOUNDED[case], monkeypatch, remat="dots" if case == "alibi" else "full")


@pytest.mark.slow
@pytest.mark.parametrize("relative", kinds.MODELS.values(), ids=kinds.MODELS)
def test_all_kinds_do(relative, monkeypatch):
    check_models(relative, monkeypatch, remat="full")


@pytest.mark.parametrize("case", BOUNDED)
def test_bounds_hold_for_every_pair_of_tokens(case):
    config = config_of(BOUNDED[case], model__kv_heads=2, sequence_length=96)
    inputs = annotated(draw_tokens(0, 2, 96))
    layer = config.encodings.of_layer(0, config.encodings.make_layer(jax.random.key(3)), inputs, {})
    x = 20 * np.random.default_rng(0).normal(size=(2, 96, 32)).astype(np.float32)
    heads = jnp.arange(4)
    causal = np.tri(96, dtype=bool)
    checked = 0
    for encoding, features in layer.scoring(layer.features(jnp.asarray(x))):
        blocks = skipping.extent(features, SIZE)

        def spread(bound):
            return np.repeat(np.repeat(bound, SIZE, axis=2), SIZE, axis=3)

        if "bias_bound" in encoding.acts:
            bias = np.asarray(encoding.bias(features, features, heads))
            bound = spread(encoding.bias_bound(blocks, blocks, heads))
            assert (np.where(causal, bias - bound, -1) <= 1e-3).all()
            # And they are tight: what a block has at most, or 2 above that with forgetting.
            of_blocks = bias.reshape(2, 4, 12, SIZE, 12, SIZE).max(axis=(3, 5))
            above = np.asarray(encoding.bias_bound(blocks, blocks, heads)) - of_blocks
            assert np.abs(np.where(np.tri(12, k=-1), above, 0)).max() <= 2
            checked += 1
        if "visible_bound" in encoding.acts:
            visible = np.asarray(encoding.visible(features, features)) & causal
            bound = spread(encoding.visible_bound(blocks, blocks))
            assert not (visible & ~bound).any() and not bound.all()
            checked += 1
    assert checked


def test_neither_pass_holds_a_square_nor_a_table_of_blocks(monkeypatch):
    L = 2048
    encoding = alibi(1, 1, slope_scale=96.0)
    q, k, v = draw(0, 1, L, 1, 1)

    def loss(q, k, v):
        return package.attention(q, k, v, encodings=[(encoding, np.arange(L)[None])]).sum()

    assert largest_array(jax.grad(loss, argnums=(0, 1, 2)), q, k, v) <= 2 * SIZE * L


def test_kinds_that_prove_nothing_are_computed_as_before():
    for relative, documents, wanted in (
        ((("rope", "position"),), False, False),
        ((("rope", "position"),), True, True),
        ((("t5", "position"), ("alibi", "position")), False, False),
        ((("cope", "position"), ("window", "position", ("size", 4))), False, False),
        ((("xpos", "position"), ("alibi", "position")), False, False),
        ((("alibi", "position"),), False, True),
    ):
        scoring = config_of(relative).encodings.scoring
        assert skipping.possible(scoring, documents) == wanted, relative


def measure() -> float:
    """The largest difference of a model's hidden states and gradients from those without a mesh."""
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.context": 2}
    relative = (("alibi", "segment", ("slope_scale", 96.0)), ("fox", "position"))
    whole = config_of(
        relative, batch_size=2, model__width=64, model__heads=8, model__kv_heads=4, sequence_length=192,
        model__attention="reference",
    )  # fmt: skip
    config = whole.replace({**mesh, "model.attention": "chunked"})
    documents = np.repeat([[0, 1], [4, 5]], [60, 132], axis=1)
    inputs = annotated(draw_tokens(0, 2, 192), document_ids=documents)
    params = jax.tree.map(lambda x: np.asarray(x / 3), draw_params(whole))
    cotangent = np.random.default_rng(2).normal(size=(2, 192, 64))

    def run(config):
        def loss(params, inputs):
            hidden = model.hidden(config, params, inputs)[0]
            return jnp.sum(hidden * cotangent), hidden

        return jax.jit(jax.grad(loss, has_aux=True))

    wanted = run(whole)(params, inputs)
    devices = sharding.make_mesh(config)
    shardings = sharding.state_shardings(devices, params, model.declared(config))
    with jax.set_mesh(devices):
        placed = jax.tree.map(jax.device_put, params, shardings)
        found = run(config)(placed, sharding.place_batch(devices, inputs))
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max().clip(1e-3))
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
    )


def test_a_mesh_gives_what_one_device_gives():
    ((code, out, err),) = several.finish(several.start(1, 8, __file__))
    assert code == 0, err
    assert json.loads(out) < 1e-3


if __name__ == "__main__":
    assert jax.device_count() == 8
    loops.BLOCK, package.SKIPS_FROM = SIZE, 1
    json.dump(measure(), sys.stdout)
