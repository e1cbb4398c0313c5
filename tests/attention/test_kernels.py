"""Flash kernels: splash attention interpreted, cuDNN's path computed by XLA, both against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
from tiny import tiny_plan

from bipe_jax.attention import choose, kernels
from bipe_jax.attention.chunked import chunked
from bipe_jax.attention.columns import COLUMNS, linear_columns
from bipe_jax.attention.scoring import Side
from bipe_jax.errors import UserError
from bipe_jax.positions.alibi import Alibi, alibi_slopes
from bipe_jax.positions.kind import Relative
from tests.attention.test_attention import draw, segments_of

BACKENDS = {
    "splash": functools.partial(kernels.splash, interpret=True),
    "cudnn": functools.partial(kernels.cudnn, implementation="xla"),
}
# The rounding of inputs, of softmax weights and of results to bfloat16, relative to values near 1.
BFLOAT16_ERROR = 2**-7


def runs_of(seed, B, L):
    """Ids of documents, each one run of tokens, not counted from 0; (B, L)."""
    return segments_of(seed, B, L) // 7 + 3


def sides(encodings, coordinates, documents):
    L = coordinates.shape[1]
    features = [encoding.features(jnp.asarray(coordinates)) for encoding in encodings]
    documents = None if documents is None else jnp.asarray(documents)
    return Side(jnp.arange(L)[None], documents, features)


def alibi_of(N, K, **options):
    config = tiny_plan(model__width=8 * N, model__heads=N, model__kv_heads=K)
    return Alibi(config, "segment", jax.random.key(0), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("scales", [(), (96.0,), (96.0, 0.5)], ids=["rope", "alibi", "two"])
def test_kernels_equal_a_float64_loop(backend, dtype, with_documents, scales):
    L, N, K, H = 200, 4, 2, 16  # no multiple of a tile; heads in groups
    q, k, v = draw(3, 1, L, N, K, H, dtype=dtype)
    segment = segments_of(3, 1, L)
    documents = runs_of(4, 1, L) if with_documents else None
    encodings = [alibi_of(N, K, slope_scale=scale) for scale in scales]
    side = sides(encodings, segment, documents)
    got = jax.jit(lambda q, k, v: BACKENDS[backend](q, k, v, side, side, encodings, jnp.arange(N)))(
        q, k, v
    )
    assert got.dtype == jnp.dtype(dtype)
    bias = sum(reference.alibi(segment, N, scale) for scale in scales) if scales else None
    expected = reference.attend(q, k, v, bias, documents)
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    # Columns are exact in bfloat16, whatever the dtype; each slope is off by 2^-17 of itself.
    limit = {"float32": 2e-4 if scales else 1e-5, "bfloat16": 4 * BFLOAT16_ERROR}[dtype]
    assert error < limit
    if scales:  # the measure sees a bias that is not there
        dropped = reference.attend(q, k, v, None, documents)
        assert np.abs(dropped - expected).max() > 20 * limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_documents", [False, True], ids=["", "documents"])
def test_gradients_of_kernels_equal_those_of_the_chunked_path(backend, with_documents):
    L, N, K, H = 140, 4, 2, 16
    q, k, v = draw(5, 2, L, N, K, H)
    encodings = [alibi_of(N, K, slope_scale=96.0)]
    documents = runs_of(6, 2, L) if with_documents else None
    side = sides(encodings, segments_of(5, 2, L), documents)
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def gradients(attend, *more):
        def loss(q, k, v):
            out = attend(q, k, v, side, side, encodings, jnp.arange(N), *more)
            return jnp.sum(out * cotangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for name, got, expected in zip(
        "qkv", gradients(BACKENDS[backend]), gradients(chunked, True), strict=True
    ):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=5e-4, err_msg=name)
        assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    "length, width, dtype, block",
    [
        (1024, 64, "bfloat16", 512),
        (4095, 64, "bfloat16", 512),
        (4096, 64, "bfloat16", 1024),
        (4096, 256, "bfloat16", 1024),
        (4096, 256, "float32", 512),
        (131072, 512, "bfloat16", 512),
        (131072, 1024, "bfloat16", 256),
        (8192, 4096, "bfloat16", 256),  # none fits: the smallest
    ],
)
def test_long_blocks_are_cut_into_larger_ones_if_they_fit(length, width, dtype, block):
    assert kernels._largest(length, width * jnp.dtype(dtype).itemsize) == block


@pytest.mark.parametrize("length, blocks", [(300, 128), (520, 256)])
def test_splash_in_larger_blocks_equals_a_float64_loop(length, blocks, monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCKS", {256: 400, 128: 0})
    sizes = []
    monkeypatch.setattr(kernels, "BlockSizes", lambda *a: sizes.append(a) or BlockSizes(*a))
    q, k, v = draw(3, 1, length, 2, 1, 16)
    side = sides([], segments_of(3, 1, length), None)
    got = BACKENDS["splash"](q, k, v, side, side, [], jnp.arange(2))
    assert set(sizes[0]) == {blocks}
    expected = reference.attend(q, k, v, None, None)
    assert np.abs(np.asarray(got, np.float64) - expected).max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_stay_apart_where_coordinates_restart(backend):
    """An earlier document's end then has larger coordinates than the next one's beginning."""
    L, N, K, H = 200, 4, 2, 16
    q, k, v = draw(7, 1, L, N, K, H, dtype="bfloat16")
    documents = np.repeat([[3, 5, 4]], [90, 30, 80], axis=1)
    coordinate = np.concatenate([np.arange(n) for n in (90, 30, 80)])[None].astype(np.int32)
    encodings = [alibi_of(N, K, slope_scale=96.0)]  # up to 24 x 89 for what is masked
    side = sides(encodings, coordinate, documents)
    got = BACKENDS[backend](q, k, v, side, side, encodings, jnp.arange(N))
    expected = reference.attend(q, k, v, reference.alibi(coordinate, N, 96.0), documents)
    assert np.abs(np.asarray(got, np.float64) - expected).max() < 4 * BFLOAT16_ERROR


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("heads", [np.arange(12), np.array([5, 6])])
def test_columns_carry_the_bias_of_far_segments(H, heads):
    """Products of bfloat16 columns, summed in float64, against the bias itself."""
    scale = H**-0.5
    coordinates = np.array([[0, 1, 255, 256, 70_000, 70_001, 16_000_000, 16_000_003]])
    slopes = 96 * alibi_slopes(12)
    of_query, of_key = linear_columns(slopes, *[jnp.asarray(coordinates)] * 2, heads, scale)
    assert of_query.shape[-1] == of_key.shape[-1] == COLUMNS
    for columns in (of_query, of_key):
        np.testing.assert_array_equal(columns, columns.astype(jnp.bfloat16).astype(jnp.float32))
    got = scale * np.einsum(
        "blnc,bsc->bnls", *(np.asarray(c, np.float64) for c in (of_query, of_key))
    )
    distance = coordinates[:, :, None] - coordinates[:, None, :]
    expected = -slopes[heads][:, None, None] * distance[:, None]
    # What a softmax over keys sees: differences from the query's own key.
    own = np.einsum("bnll->bnl", got)[..., None]
    np.testing.assert_allclose(got - own, expected, rtol=2**-16, atol=1e-6)


Q = jax.ShapeDtypeStruct((2, 1000, 4, 64), jnp.bfloat16)


class Curved(Relative):
    def __init__(self):
        pass

    def bias(self, query, key, heads):
        raise AssertionError("it is not computed")


@pytest.mark.parametrize(
    ("platform", "options", "chosen"),
    [
        ("tpu", {}, "splash"),
        ("tpu", {"encodings": [alibi_of(4, 4)]}, "splash"),
        ("tpu", {"encodings": [Curved()]}, "chunked"),
        ("tpu", {"context": 2}, "chunked"),  # 500 tokens a device are no multiple of 128
        ("gpu", {}, "cudnn"),
        ("gpu", {"encodings": [alibi_of(4, 4)], "documents": True}, "cudnn"),
        ("gpu", {"context": 2}, "chunked"),
        ("gpu", {"encodings": [alibi_of(4, 4)] * 9}, "chunked"),  # too wide
        ("cpu", {}, "chunked"),
    ],
)
def test_auto_takes_the_kernel_that_can_do_it(platform, options, chosen):
    assert choose("auto", platform, Q, **options) == chosen


@pytest.mark.parametrize(
    ("backend", "platform", "options", "message"),
    [
        ("splash", "cpu", {}, "config.model.attention='splash' runs on TPUs, and this is a cpu"),
        ("cudnn", "cpu", {}, "'cudnn' runs on NVIDIA GPUs, and this is a cpu: use 'auto'"),
        ("splash", "tpu", {"encodings": [Curved()]}, "no form of the encoding Curved"),
        (
            "splash",
            "tpu",
            {"context": 2},
            "mesh.context=2 takes lengths .* multiple of 256, not 1000",
        ),
        ("cudnn", "gpu", {"context": 2}, "mesh.context=2"),
        ("cudnn", "gpu", {"encodings": [alibi_of(4, 4)] * 9}, "not 136"),
    ],
)
def test_a_backend_that_cannot_do_it_is_refused(backend, platform, options, message):
    with pytest.raises(UserError, match=message):
        choose(backend, platform, Q, **options)


def test_cudnn_refuses_float32():
    with pytest.raises(UserError, match="bfloat16, not float32"):
        choose("cudnn", "gpu", jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.float32))
