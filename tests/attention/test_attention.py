import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from tiny import largest_array, tiny_plan

from bipe_jax.attention import attention
from bipe_jax.positions.alibi import Alibi
from bipe_jax.positions.kind import Relative

# The package has a function of that name, too.
module = importlib.import_module("bipe_jax.attention.chunked")


class Added(Relative):
    """An encoding whose bias is any function of the two sides."""

    def __init__(self, function):
        self.function = function

    def bias(self, query, key, heads):
        return self.function(query, key)


def jitted(function):
    """Traces anew: the result depends on module.CHUNK, which jax.jit does not know of."""
    return jax.jit(lambda *args: function(*args))


def draw(seed, B, L, N, K, H=8, dtype="float32"):
    """Queries, keys and values; by NumPy, since JAX would compile for each shape."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, L, heads, H)).astype(jnp.dtype(dtype)) for heads in (N, K, K)]


def segments_of(seed, B, L):
    """Segment indices, (B, L): they grow by one about every fifth token."""
    steps = np.random.default_rng(seed).random((B, L)) < 0.2
    return steps.cumsum(axis=-1).astype(np.int32)


def documents_of(seed, B, L):
    """Ids of packed documents, (B, L); the last one has an id that occurred before."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, L, (B, 3)), axis=-1)
    ids = (np.arange(L)[None, :, None] >= cuts[:, None, :]).sum(axis=-1)
    return np.where(ids == 3, 1, ids).astype(np.int32)


@pytest.mark.parametrize("L", [1, 255, 256, 257, 700, 2500])
def test_attention_equals_a_float64_loop(L):
    assert module.CHUNK == 256, "the lengths were chosen around it"
    q, k, v = draw(L, 1, L, 2, 1)
    got = jitted(attention)(q, k, v)
    np.testing.assert_allclose(got, reference.attend(q, k, v), atol=2e-6, rtol=0)


@pytest.fixture
def small_chunks(monkeypatch):
    """At most two bands of chunks of 8."""
    monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(module, "BANDS", 2)


# Less than a chunk; one; one and some; bands of 2 and 1.75 chunks; bands of 3 and 2.375 chunks.
@pytest.mark.parametrize("L", [3, 8, 9, 30, 43])
def test_attention_with_groups_biases_and_documents_equals_a_float64_loop(L, small_chunks):
    q, k, v = draw(L, 2, L, 6, 2)
    config = tiny_plan(model__width=48, model__heads=6, model__kv_heads=2)
    segment = segments_of(L, 2, L)
    position = np.broadcast_to(np.arange(L, dtype=np.int32), (2, L))
    by_segment = Alibi(config, "segment", jax.random.key(0), slope_scale=96.0)
    by_position = Alibi(config, "position", jax.random.key(0))
    documents = documents_of(L, 2, L)

    def run(q, k, v, segment, position, documents):
        biases = [
            (by_segment, by_segment.features(segment)),
            (by_position, by_position.features(position)),
        ]
        return attention(q, k, v, encodings=biases, document_ids=documents)

    got = jitted(run)(q, k, v, segment, position, documents)
    bias = reference.alibi(segment, 6, 96.0) + reference.alibi(position, 6)
    expected = reference.attend(q, k, v, bias, documents)
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=0)


def plain(q, k, v, bias, visible):
    """Unchunked, float32: all logits at once."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("blnh,bsnh->bnls", q, k) / jnp.sqrt(q.shape[-1]) + bias
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bnls,bsnh->blnh", weights, v)


@pytest.mark.parametrize("L", [7, 43])
def test_gradients_equal_those_of_a_plain_implementation(L, small_chunks):
    q, k, v = draw(L, 2, L, 4, 2)
    documents = documents_of(L, 2, L)
    index = np.arange(L)
    visible = (index[:, None] >= index)[None, None] & (
        documents[:, None, :, None] == documents[:, None, None, :]
    )
    # A bias that is differentiated as well, as a learned one would be.
    left, right = np.random.default_rng(0).normal(size=(2, 2, L, 4)).astype(np.float32)

    def add(left, right):
        return jnp.swapaxes(left, 1, 2)[..., None] * jnp.swapaxes(right, 1, 2)[..., None, :]

    def chunked(q, k, v, left, right):
        biases = [(Added(lambda query, key: add(query[0], key[1])), (left, right))]
        return attention(q, k, v, encodings=biases, document_ids=documents)

    def unchunked(q, k, v, left, right):
        return plain(q, k, v, add(left, right), visible)

    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def gradients(function):
        def loss(*args):
            return jnp.sum(function(*args) * cotangent)

        gradient = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
        return jitted(gradient)(q, k, v, left, right)

    for name, got, expected in zip(
        ("q", "k", "v", "left", "right"), gradients(chunked), gradients(unchunked), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("L", [9, 43])
def test_gradients_equal_finite_differences_in_float64(L, small_chunks):
    """Of the NumPy reference, along directions in which queries, keys and values all change."""
    inputs = draw(L, 2, L, 4, 2)
    documents, segment = documents_of(L, 2, L), segments_of(L, 2, L)
    encoding = Alibi(
        tiny_plan(model__heads=4, model__kv_heads=2), "segment", jax.random.key(0), slope_scale=96.0
    )
    bias = reference.alibi(segment, 4, 96.0)
    rng = np.random.default_rng(1)
    cotangent = rng.normal(size=inputs[0].shape)

    def loss(q, k, v):
        acting = [(encoding, encoding.features(segment))]
        out = attention(q, k, v, encodings=acting, document_ids=documents)
        return jnp.sum(out * cotangent)

    gradients = jitted(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)
    size = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients))
    step = 1e-5
    for _ in range(4):
        direction = [rng.normal(size=x.shape) for x in inputs]

        def moved(by, direction=direction):
            return [x.astype(np.float64) + by * d for x, d in zip(inputs, direction, strict=True)]

        ends = [
            np.sum(reference.attend(*moved(by), bias, documents) * cotangent)
            for by in (step, -step)
        ]
        expected = (ends[0] - ends[1]) / (2 * step)
        got = sum(np.sum(np.float64(g) * d) for g, d in zip(gradients, direction, strict=True))
        assert abs(got - expected) < 1e-6 * size


def test_bfloat16_inputs_keep_float32_logits_and_biases():
    q, k, v = draw(0, 1, 40, 4, 2, dtype="bfloat16")
    # Logits of about 50, whose bfloat16 neighbours are 0.25 apart, and biases of about 1000, with
    # neighbours 4 apart, both of which decide the weights.
    q = 16 * q
    rng = np.random.default_rng(1)
    bias = (rng.normal(size=(1, 4, 40, 40)) - 1000).astype(np.float32)

    def run(q, k, v):
        return attention(q, k, v, encodings=[(Added(lambda query, key: bias), ())])

    got = jitted(run)(q, k, v)
    assert got.dtype == jnp.bfloat16
    # What is rounded to bfloat16: each weight, and the result.
    expected = reference.attend(q, k, v, bias)
    largest = np.abs(np.asarray(v, np.float64)).max()
    actual = np.asarray(got, np.float64)
    np.testing.assert_allclose(actual, expected, atol=2**-8 * largest, rtol=2**-8)


def test_a_query_whose_keys_are_all_far_away_in_bias_still_sees_itself():
    q, k, v = draw(1, 1, 4, 1, 1)

    def far(query, key):
        return -1e30 * (query[:, None, :, None] != key[:, None, None, :])

    got = attention(q, k, v, encodings=[(Added(far), np.arange(4)[None])])
    np.testing.assert_array_equal(got, v)


def test_neither_pass_computes_with_the_whole_square(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)
    L = 512
    q, k, v = draw(0, 1, L, 1, 1)

    def loss(q, k, v):
        return attention(q, k, v).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    assert largest_array(loss, q, k, v) <= 2 * 8 * L
    assert largest_array(gradient, q, k, v) <= 2 * 8 * L
    # The measure does see a square where there is one.
    assert largest_array(lambda q, k, v: plain(q, k, v, 0.0, True), q, k, v) == L * L
