import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from tiny import ENCODINGS, tiny_plan

import bipe_jax
from bipe_jax import model, plan, segments
from bipe_jax.segments import Rule
from configs import base

VOCAB = 64
RULE = Rule(separators=(1, 2))
DOCUMENTS = np.array([[0] * 5 + [1] * 9 + [2] * 10, [0] * 20 + [1] * 4])


def encoded(name, **overrides):
    absolute, relative = ENCODINGS[name]
    return tiny_plan(position__absolute=absolute, position__relative=relative, **overrides)


def draw(config, seed=0):
    """Parameters as after training: no entry is at a special value such as a norm's 1.

    They are large enough for attention, and with it every encoding, to matter to the logits.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: model.init(config, key), jax.random.key(0))

    def leaf(path, x):
        mean = jax.tree_util.keystr(path).endswith("['scale']")
        return jnp.asarray(rng.normal(mean, 0.2, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def draw_tokens(seed, B, L):
    """About every third token ends a segment."""
    rng = np.random.default_rng(seed)
    separators = rng.integers(1, 3, (B, L))
    return np.where(rng.random((B, L)) < 0.3, separators, rng.integers(3, VOCAB, (B, L)))


def annotated(tokens, rule=RULE, document_ids=None):
    """What the model takes, with documents apart if their ids are given."""
    inputs = {"tokens": tokens, **segments.coordinates(tokens, rule, document_ids)}
    return inputs if document_ids is None else inputs | {"document_ids": document_ids}


def forward(config):
    return jax.jit(functools.partial(model.apply, config))


@functools.cache
def forward_of(name):
    return forward(encoded(name))


def without_intra(params):
    """The parameters of a model without a table, and the same with a table of zeros."""
    rest = {name: leaf for name, leaf in params.items() if name != "absolute"}
    return rest, {**rest, "absolute": jax.tree.map(jnp.zeros_like, params["absolute"])}


def close(actual, expected, atol):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=atol, rtol=0)


# The reference.


def check_against_reference(config, run, document_ids=None):
    params = draw(config)
    inputs = annotated(draw_tokens(0, 2, 24), document_ids=document_ids)
    logits = run(params, inputs)
    assert logits.dtype == jnp.float32
    expected = reference.logits(config, params, inputs)
    assert expected.std() > 1  # so that 1e-5 is little
    close(logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_equals_the_float64_reference(name):
    check_against_reference(encoded(name), forward_of(name))


@pytest.mark.parametrize(
    "config",
    [
        encoded("bipe_alibi", model__width=48, model__heads=6, model__kv_heads=2),
        encoded("bipe_rope", model__kv_heads=1, model__tied_output=True),
        encoded("bipe_rope", model__kv_heads=2, model__qk_norm=True, model__logit_softcap=4.0),
        tiny_plan(  # several encodings at once, and a table shorter than the segments
            position__absolute=(("learned", "offset", ("size", 3)), ("sinusoidal", "segment")),
            position__relative=(
                ("rope", "segment", ("theta", 500.0)),
                ("alibi", "position", ("slope_scale", 0.5)),
            ),
        ),
    ],
    ids=[
        "grouped-queries",
        "one-key-head-and-tied-output",
        "qk-norm-and-soft-cap",
        "several-encodings",
    ],
)
def test_documents_apart_and_other_shapes_equal_the_float64_reference(config):
    check_against_reference(config, forward(config), DOCUMENTS)


def test_bfloat16_is_close_to_float32_and_leaves_gradients_in_float32():
    config = encoded("bipe_alibi", model__dtype="bfloat16")
    params, inputs = draw(config), annotated(draw_tokens(0, 2, 24))
    logits = forward(config)(params, inputs)
    assert logits.dtype == jnp.float32
    expected = reference.logits(config, params, inputs)
    error = np.sqrt(((np.asarray(logits) - expected) ** 2).mean())
    assert 1e-4 < error < 0.02 * expected.std()

    gradients = jax.eval_shape(
        jax.grad(lambda params: model.apply(config, params, inputs).sum()), params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


# What logits depend on. Rows: one document; two documents.

APART = np.array([[0] * 14, [0] * 5 + [1] * 9])


@pytest.fixture(scope="module", params=ENCODINGS)
def case(request):
    """(config, params, run).

    run(table, inputs, b, l) gives the logits, with `table` as embedding, and the gradient of a
    mixture of those at (b, l) with respect to `table`.
    """
    config = encoded(request.param)
    params = draw(config)
    mixture = np.random.default_rng(1).normal(size=VOCAB)

    @jax.jit
    def run(table, inputs, b, l):
        def at(table):
            logits = model.apply(config, params | {"embed": {"table": table}}, inputs)
            return logits[b, l] @ mixture, logits

        gradient, logits = jax.grad(at, has_aux=True)(table)
        return logits, gradient

    # So that a block is cut into bands and chunks.
    with pytest.MonkeyPatch.context() as patch:
        attention = importlib.import_module("bipe_jax.attention.chunked")
        patch.setattr(attention, "CHUNK", 8)
        yield config, params, run


def test_logits_depend_on_all_earlier_tokens_of_the_document_and_on_no_others(case):
    _, params, run = case
    # No token occurs twice, so that a row of the table stands for one place.
    tokens = np.random.default_rng(0).permutation(np.arange(VOCAB))[:28].reshape(2, 14)
    inputs = annotated(tokens, Rule(separators=tuple(range(0, VOCAB, 3))), APART)
    assert (inputs["segment"].max(axis=-1) > 2).all()
    for b in range(2):
        for l in range(14):
            _, gradient = run(params["embed"]["table"], inputs, b, l)
            depends = (np.asarray(gradient)[tokens] != 0).any(axis=-1)
            expected = np.zeros((2, 14), bool)
            expected[b, : l + 1] = APART[b, : l + 1] == APART[b, l]
            np.testing.assert_array_equal(depends, expected, err_msg=f"logits at {b}, {l}")


def test_a_packed_document_has_the_logits_that_it_has_alone(case):
    config, params, run = case
    tokens = draw_tokens(3, 2, 14)
    edited = tokens.copy()
    edited[1, :5] = [1, 9, 1, 2, 1]  # also another number of segments
    table = params["embed"]["table"]
    before, after = (run(table, annotated(t, RULE, APART), 0, 0)[0] for t in (tokens, edited))
    assert np.abs(before[1, 1:5] - after[1, 1:5]).max() > 0.1
    np.testing.assert_array_equal(before[1, 5:], after[1, 5:])
    alone = reference.logits(config, params, annotated(tokens[1:, 5:]))
    close(before[1:, 5:], alone, atol=1e-5)


# What BiPE becomes in its limits.


@pytest.mark.parametrize("name", ["bipe_rope", "bipe_alibi"])
def test_bipe_on_one_segment_without_intra_vectors_is_no_encoding(name):
    rest, zeroed = without_intra(draw(encoded(name)))
    tokens = draw_tokens(0, 2, 24)
    inputs = annotated(tokens, Rule())
    expected = forward_of("nope")(rest, inputs)
    close(forward_of(name)(zeroed, inputs), expected, atol=1e-5)
    # On several segments it is one.
    assert np.abs(forward_of(name)(zeroed, annotated(tokens)) - expected).max() > 0.1


@pytest.mark.parametrize(
    "name, relative",
    [
        ("bipe_rope", (("rope", "position"),)),
        ("bipe_alibi", (("alibi", "position", ("slope_scale", 96.0)),)),
    ],
)
def test_bipe_with_every_token_a_segment_is_its_plain_encoding(name, relative):
    rest, zeroed = without_intra(draw(encoded(name)))
    inputs = annotated(draw_tokens(0, 2, 24), Rule(separators=tuple(range(VOCAB))))
    plain = forward(tiny_plan(position__absolute=(), position__relative=relative))
    close(forward_of(name)(zeroed, inputs), plain(rest, inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["bipe_rope", "bipe_alibi"])
def test_only_differences_of_segment_indices_matter(name):
    params, inputs = draw(encoded(name)), annotated(draw_tokens(0, 2, 24))
    segment = inputs["segment"]
    before = forward_of(name)(params, inputs)
    shifted = forward_of(name)(params, inputs | {"segment": segment + 11})
    close(shifted, before, atol=1e-5)
    torn = segment + 11 * (np.arange(24, dtype=np.int32) >= 12)
    assert np.abs(forward_of(name)(params, inputs | {"segment": torn}) - before).max() > 0.1


# Rematerialisation.


@functools.cache
def loss_and_gradients(remat, attention):
    """And the bytes that the compiled function needs beside its arguments and results."""
    config = encoded("nope", model__remat=remat, model__attention=attention, model__layers=4)
    params, inputs = draw(config), annotated(draw_tokens(0, 4, 64))
    cotangent = np.random.default_rng(0).normal(size=(4, 64, 32))

    def loss(params, inputs, cotangent):
        hidden, _ = model.hidden(config, params, inputs)
        return jnp.sum(hidden * cotangent)

    arguments = (params, inputs, cotangent)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return *compiled(*arguments), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_neither_loss_nor_gradients(remat):
    """With plain attention: that in chunks computes again in any case, see test_attention."""
    loss, gradients, _ = loss_and_gradients("none", "reference")
    same_loss, same_gradients, _ = loss_and_gradients(remat, "reference")
    assert float(same_loss) == pytest.approx(float(loss), rel=1e-6)
    for same, gradient in zip(
        jax.tree.leaves(same_gradients), jax.tree.leaves(gradients), strict=True
    ):
        close(same, gradient, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.slow
def test_remat_saves_memory():
    none, dots, full = (
        loss_and_gradients(remat, "chunked")[2] for remat in ("none", "dots", "full")
    )
    assert full < dots < none


# Parameters.


def test_the_authors_model_has_the_authors_number_of_parameters():
    def count(config):
        shapes = jax.eval_shape(lambda key: model.init(config, key), jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    bipe = plan.make(base.get_config())
    absolute, relative = ENCODINGS["rope"]
    plain = bipe.replace({"position.absolute": absolute, "position.relative": relative})
    # Embedding and output; attention, SwiGLU and norms of 12 layers; the last norm.
    expected = 2 * 32000 * 768 + 12 * (4 * 768**2 + 3 * 768 * 3072 + 2 * 768) + 768
    assert count(plain) == expected
    assert count(bipe) == expected + 1024 * 768
    assert round(count(plain) / 1e6, 1) == 162.4
    assert round(count(bipe) / 1e6, 1) == 163.2


def test_all_matrices_start_from_independent_normal_draws():
    tables = (("learned", "offset"), ("learned", "position"))
    config = tiny_plan(model__init_std=0.05, position__absolute=tables)
    init = jax.jit(functools.partial(model.init, config))
    params = init(jax.random.key(0))
    matrices = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32
        if name.endswith("['scale']"):
            np.testing.assert_array_equal(leaf, 1)
        elif "layers" in name:
            matrices |= {f"{name}[{i}]": layer.ravel() for i, layer in enumerate(np.asarray(leaf))}
        else:
            matrices[name] = np.ravel(leaf)
    assert len(matrices) == 4 + 7 * config.model.layers
    for name, matrix in matrices.items():  # within five standard errors
        assert abs(matrix.std() / 0.05 - 1) < 5 / np.sqrt(2 * matrix.size), name
        assert abs(matrix.mean()) < 5 * 0.05 / np.sqrt(matrix.size), name
    names = list(matrices)
    for i, first in enumerate(names):
        for second in names[:i]:
            n = min(matrices[first].size, matrices[second].size)
            correlation = np.corrcoef(matrices[first][:n], matrices[second][:n])[0, 1]
            assert abs(correlation) < 5 / np.sqrt(n), (first, second)


# The public function.


@pytest.mark.parametrize(
    "rule, segment, offset",
    [
        ("newline", [0, 0, 1, 1, 1, 2, 3], [0, 1, 0, 1, 2, 0, 0]),
        ("fixed:3", [0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 0, 1, 2, 0]),
    ],
)
def test_public_apply_finds_the_coordinates_itself(rule, segment, offset):
    config = tiny_plan(
        position__relative=(("rope", "segment"), ("alibi", "position")),
        segments__rule=rule,
        separators=(1, 2),
    )
    params = draw(config)
    tokens = np.array([[5, 1, 6, 7, 2, 1, 9], [9, 2, 8, 9, 1, 2, 4]])
    by_hand = {"position": list(range(7)), "segment": segment, "offset": offset}
    inputs = {name: np.array([row, row]) for name, row in by_hand.items()} | {"tokens": tokens}
    logits = jax.jit(functools.partial(bipe_jax.apply, config))
    close(logits(params, tokens), forward(config)(params, inputs), atol=1e-5)
