"""Every kind that acts in attention: formulas, and what each must do wherever it is used."""

import functools
import importlib

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from tiny import largest_array, tiny_plan

from bipe_jax import model, positions
from bipe_jax.attention import kernels
from bipe_jax.attention.scoring import Side
from bipe_jax.errors import UserError
from bipe_jax.evaluation import attention_distance
from bipe_jax.positions.angles import angles
from tests.model.test_model import annotated, close, draw, draw_tokens
from tests.positions.test_encodings import check_decoding, config_of

chunks = importlib.import_module(
    "bipe_jax.attention.chunked"
)  # the package has a function of that name

# What an entry says -> options and parameters that are unlike the initial ones.
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return RNG.normal(size=shape) * scale


def perceptron(inputs, hidden, outputs):
    return {
        "first_kernel": normal(inputs, hidden, scale=inputs**-0.5),
        "first_bias": normal(hidden),
        "second_kernel": normal(hidden, outputs, scale=hidden**-0.5),
        "second_bias": normal(outputs),
    }


# Four heads of 8, two key heads, a width of 32.
CASES = {
    "alibi": ("alibi", {"slope_scale": 3.0}, {}),
    "t5": ("t5", {}, {"table": normal(32, 4)}),
    "t5 of few buckets": ("t5", {"buckets": 8, "distance": 24}, {"table": normal(8, 4)}),
    "kerple-log": (
        "kerple-log",
        {},
        {"p": np.array([0.5, 2.0, -1.0, 0.005]), "a": np.array([1.0, 0.1, 3.0, -0.2])},
    ),
    "kerple-power": ("kerple-power", {}, {"p": normal(4), "a": 2 * normal(4)}),
    "fire": (
        "fire",
        {"threshold": 20.0},
        perceptron(1, 32, 4) | {"c": np.float64(-0.3), "threshold_scale": np.float64(0.7)},
    ),
    "rope": ("rope", {}, {}),
    "rope of some pairs": ("rope", {"pairs": (1, 3), "theta": 50.0}, {}),
    "rope with its own spectrum": ("rope", {"pairs": (0, 3), "spectrum": "own"}, {}),
    "xpos": ("xpos", {"base": 40.0}, {}),
    "pope": ("pope", {"theta": 100.0}, {"delta": normal(2, 8, scale=4)}),
    "ssmax": ("ssmax", {}, {"s": normal(4)}),
    "ssmax with a bias": ("ssmax", {"bias": True}, {"s": normal(4), "b": normal(4)}),
    "temperature": ("temperature", {"unit": 7.0, "beta": 0.5}, {}),
    "temperature of Ministral": ("temperature", {"unit": 16.0, "first": 0}, {}),
    "window": ("window", {"size": 5}, {}),
    "chunks": ("window", {"size": 6, "chunked": True}, {}),
    "fox": ("fox", {}, {"gate_kernel": normal(32, 4, scale=0.3), "gate_bias": normal(4)}),
    "cope": ("cope", {"positions": 6}, {"table": normal(6, 8)}),
    "cope divided": ("cope", {"positions": 9, "divided": True}, {"table": normal(9, 8)}),
    "dape": ("dape", {}, perceptron(8, 32, 4) | {"base/p": normal(4), "base/a": normal(4)}),
    "dape of alibi": ("dape", {"bias": "alibi", "hidden": 5}, perceptron(8, 5, 4)),
}
DOCUMENTS = np.repeat([[3, 1, 1], [2, 2, 5]], [30, 20, 20], axis=1)


def entry(case, coordinate):
    kind, options, _ = CASES[case]
    return (kind, coordinate, *options.items())


def arrays(L=70, N=4, K=2, H=8, documents=None):
    """Two rows with different segments; coordinates restart at documents."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(2, L, heads, H)) for heads in (N, K, K))
    x = rng.normal(size=(2, L, N * H))
    starts = rng.random((2, L)) < 0.3
    position, segment = np.zeros((2, L), int), np.zeros((2, L), int)
    for row in range(2):
        for i in range(1, L):
            if documents is not None and documents[row, i] != documents[row, i - 1]:
                continue
            position[row, i] = position[row, i - 1] + 1
            segment[row, i] = segment[row, i - 1] + starts[row, i]
    return q, k, v, x, {"position": position, "segment": segment}


def attended(case, coordinate, q, k, v, x, coordinates, documents=None, params=None):
    kind, _, own = CASES[case]
    params = own if params is None else params

    @jax.jit
    def run(q, k, v, x, params):
        return positions.attend(
            (entry(case, coordinate),), coordinates, q, k, v,
            params={f"{kind}_{coordinate}": params} if params else {},
            x=x, document_ids=documents,
        )  # fmt: skip

    return run(q, k, v, x, params)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("coordinate", ["position", "segment"])
@pytest.mark.parametrize("case", CASES)
def test_attend_equals_the_formula_in_float64(case, coordinate, documents, dtype):
    kind, options, params = CASES[case]
    q, k, v, x, coordinates = arrays(documents=documents)
    with jax.enable_x64(dtype == "float64"):
        cast = [jnp.asarray(a, dtype) for a in (q, k, v, x)]
        own = {name: jnp.asarray(a, dtype) for name, a in params.items()}
        got = attended(case, coordinate, *cast, coordinates, documents, own)
        assert got["output"].dtype == dtype
    logits, output, visible = kinds.attend(
        kinds.FORMULAS[kind], q, k, v, coordinates[coordinate], params, x, documents, **options
    )
    error = np.abs(np.where(visible, np.asarray(got["logits"]) - np.where(visible, logits, 0), 0))
    size = np.abs(np.where(visible, logits, 0)).max()
    assert error.max() < {"float32": 5e-6, "float64": 1e-11}[dtype] * max(size, 1)
    tolerance = {"float32": 5e-6, "float64": 1e-11}[dtype]
    np.testing.assert_allclose(got["output"], output, atol=tolerance)


@pytest.mark.parametrize("coordinate", ["position", "segment"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(case, coordinate):
    q, k, v, x, coordinates = arrays(L=24)
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        # Within the bounds where parameters are clamped: outside of them the gradient is another's.
        bounds = {"delta": (-6.0, -0.5), "p": (0.1, 3), "a": (0.1, 1.9)}
        own = {
            name: rng.uniform(*bounds[name.split("/")[-1]], array.shape)
            if name.split("/")[-1] in bounds
            else array
            for name, array in CASES[case][2].items()
        }
        point = jax.tree.map(jnp.asarray, (q, k, v, x, own))
        weights = rng.normal(size=q.shape)

        @jax.jit
        def loss(q, k, v, x, own):
            output = attended(case, coordinate, q, k, v, x, coordinates, params=own)["output"]
            return jnp.sum(output * weights)

        gradient = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*point)
        for number, of_one in enumerate(gradient):
            for path, leaf in jax.tree_util.tree_leaves_with_path(of_one):
                direction = rng.normal(size=leaf.shape)

                def moved(step, number=number, path=path, direction=direction):
                    def move(at, value):
                        return value + step * direction if at == path else value

                    changed = list(point)
                    changed[number] = jax.tree_util.tree_map_with_path(move, point[number])
                    return loss(*changed)

                wanted = float(moved(1e-6) - moved(-1e-6)) / 2e-6
                got = float(jnp.sum(leaf * direction))
                assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7), (number, path)
    if case.startswith("fox"):
        assert np.abs(gradient[3]).max() > 1e-3  # the layer's input


@pytest.mark.parametrize("case", CASES)
def test_no_query_depends_on_later_tokens(case):
    q, k, v, x, coordinates = arrays(L=20)
    own = CASES[case][2]

    def loss(q, k, v, x):
        output = attended(case, "segment", q, k, v, x, coordinates, params=own)["output"]
        return jnp.sum(output[:, :9] ** 2)

    for gradient in jax.grad(loss, argnums=(0, 1, 2, 3))(*map(jnp.float32, (q, k, v, x))):
        assert not np.abs(gradient[:, 9:]).any()


@pytest.mark.parametrize("coordinate", ["position", "segment"])
@pytest.mark.parametrize("case", CASES)
def test_a_document_does_not_see_what_lies_before_it(case, coordinate):
    """A document of a block is as it is by itself, whatever it follows."""
    documents = np.repeat([[3, 1], [2, 5]], [30, 40], axis=1)
    q, k, v, x, coordinates = arrays(documents=documents)
    with jax.enable_x64(True):
        whole = attended(case, coordinate, q, k, v, x, coordinates, documents)["output"]
        part = [a[:, 30:] for a in (q, k, v, x)]
        alone = {name: c[:, 30:] for name, c in coordinates.items()}
        got = attended(case, coordinate, *part, alone)["output"]
        close(got, whole[:, 30:], atol=1e-11)


CHANGED_BY_SHIFTS = {"fire", "ssmax", "ssmax with a bias", "chunks"}
CHANGED_BY_SHIFTS |= {"temperature", "temperature of Ministral"}


@pytest.mark.parametrize("case", CASES)
def test_a_shift_of_the_segments_numbers_changes_nothing_where_that_is_promised(case):
    q, k, v, x, coordinates = arrays()
    with jax.enable_x64(True):
        moved = coordinates | {"segment": coordinates["segment"] + 1000}
        here, there = (
            np.asarray(attended(case, "segment", q, k, v, x, c)["output"])
            for c in (coordinates, moved)
        )
    assert (np.abs(here - there).max() > 1e-10) == (case in CHANGED_BY_SHIFTS)


@pytest.mark.slow
@pytest.mark.parametrize("relative", kinds.MODELS.values(), ids=kinds.MODELS)
def test_training_decoding_and_analysis_compute_the_same(relative):
    config = config_of(relative, model__kv_heads=2, model__remat="full", position__absolute=())
    params = draw(config)
    inputs = annotated(draw_tokens(0, 2, 24))
    hidden = jax.jit(lambda p, i: model.hidden(config, p, i)[0])(params, inputs)
    attend = attention_distance.attend_and_measure(config, inputs, {"segment": 3})
    close(model.run(config, params, inputs, attend)[0], hidden, atol=2e-5)
    check_decoding(config)


@pytest.mark.slow
@pytest.mark.parametrize("relative", kinds.MODELS.values(), ids=kinds.MODELS)
def test_chunks_of_queries_and_remat_change_nothing(relative, monkeypatch):
    """Neither the loss nor any gradient."""
    monkeypatch.setattr(chunks, "CHUNK", 16)
    documents = np.repeat([[0, 1, 2], [4, 5, 5]], [10, 40, 22], axis=1)
    inputs = annotated(draw_tokens(0, 2, 72), document_ids=documents)
    cotangent = np.random.default_rng(2).normal(size=(2, 72, 32))
    results = []
    for backend, remat in (("reference", "none"), ("chunked", "full")):
        config = config_of(
            relative, model__kv_heads=2, model__attention=backend, model__remat=remat,
            sequence_length=72,
        )  # fmt: skip
        params = jax.tree.map(lambda x: x / 3, draw(config))

        def loss(params, config=config):
            return jnp.mean(model.hidden(config, params, inputs)[0] * cotangent)

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    (loss, gradients), (of_chunks, those_of_chunks) = results
    assert float(of_chunks) == pytest.approx(float(loss), rel=1e-4)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    for path, wanted in jax.tree_util.tree_leaves_with_path(gradients):
        got = functools.reduce(lambda tree, key: tree[key.key], path, those_of_chunks)
        # What is the same for all keys of a query has a gradient of 0 but for rounding: of terms as large as
        # other gradients, whose sum is off by a unit in the last place of the largest.
        rounding = np.finfo(np.float32).eps * largest
        atol = max(2e-4 * np.abs(wanted).max(), rounding)
        np.testing.assert_allclose(got, wanted, atol=atol, err_msg=str(path))


KERNELS = {
    "splash": functools.partial(kernels.splash, interpret=True),
    "cudnn": functools.partial(kernels.cudnn, implementation="xla"),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["alibi", "fox", "xpos"])
def test_flash_kernels_equal_chunks_with_gradients(case, kernel, kv_heads):
    """Heads of 8, whose root bfloat16 does not have; documents apart, no multiple of a tile."""
    kind, options, params = CASES[case]
    q, k, v, x, coordinates = arrays(
        L=150, K=kv_heads, documents=np.repeat([[1, 2]] * 2, 75, axis=1)
    )
    documents = jnp.asarray(np.repeat([[1, 2]] * 2, 75, axis=1))
    config = tiny_plan(
        model__kv_heads=kv_heads, position__absolute=(), sequence_length=150, loss_chunk=150,
        position__relative=((kind, "position", *options.items()),),
    )  # fmt: skip
    weights = np.random.default_rng(5).normal(size=q.shape)

    def loss(arrays, backend, *more):
        q, k, v, x, params = arrays
        modules = config.encodings.make_layer(jax.random.key(0))
        positions.attending._set(modules, {f"{kind}_position": params} if params else {})
        layer = config.encodings.of_layer(0, modules, coordinates, {})
        features = layer.features(x)
        q, k = layer.turn(q, k, features)
        acting = layer.scoring(features, documents)
        side = Side(jnp.arange(150)[None], documents, [f for _, f in acting])
        out = backend(q, k, v, side, side, [e for e, _ in acting], jnp.arange(4), *more)
        return jnp.sum(out * weights), out

    point = jax.tree.map(jnp.float32, (q, k, v, x, params))
    run = jax.value_and_grad(loss, has_aux=True)
    (_, got), gradients = jax.jit(lambda a: run(a, KERNELS[kernel]))(point)
    (_, wanted), expected = jax.jit(lambda a: run(a, chunks.chunked, True))(point)
    # Columns add up to sums of gates, some 400 here, where float32 numbers are 3e-5 apart.
    close(got, wanted, atol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        close(one, other, atol=1e-4 * max(np.abs(other).max(), 1))


@pytest.mark.parametrize("case", ["fire", "dape", "fox", "cope", "xpos"])
def test_memory_grows_linearly_with_the_length(case):
    """No array of a long row has more than a chunk's logits, or what 8 hidden units take."""
    kind, options, _ = CASES[case]
    config = tiny_plan(
        model__kv_heads=2, position__absolute=(), sequence_length=2048, model__layers=1, loss_chunk=2048,
        position__relative=((kind, "segment", *options.items()),), model__attention="chunked",
    )  # fmt: skip
    params = draw(config)
    inputs = annotated(draw_tokens(0, 1, 2048))

    def loss(params):
        return jnp.sum(model.hidden(config, params, inputs)[0])

    assert largest_array(jax.grad(loss), params) <= 8 * 256 * 2048


def test_sums_of_gates_stay_exact_at_large_totals():
    """A difference of neighbours after 30,000 tokens that each forget much."""
    config = tiny_plan(position__relative=(("fox", "position"),), position__absolute=())
    fox = config.encodings.make_layer(jax.random.key(0))["fox_position"]
    x = np.random.default_rng(0).normal(size=(1, 30_000, 32)).astype(np.float32) * 40
    position = jnp.arange(30_000)[None]
    features = jax.jit(lambda x: fox.features(position, x))(x)
    gates = x.astype(np.float64) @ np.asarray(fox.gate_kernel[...], np.float64)
    forgotten = np.cumsum(np.logaddexp(0, -gates)[:, 1:], axis=1)
    whole, rest = (np.asarray(features[name], np.float64)[:, 1:] for name in ("whole", "rest"))
    assert forgotten.max() > 30_000 and (whole == np.round(whole)).all()
    total = whole + rest
    np.testing.assert_allclose(np.diff(total, axis=1), np.diff(forgotten, axis=1), atol=4e-6)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_angles_are_exact_at_any_integer(theta):
    coordinates = np.array([0, 1, 9, 1023, 100_000, 500_003, 2**24 + 1, 2**30 + 7, 2**31 - 1, -5])
    frequencies = theta ** (-np.arange(32) / 32)
    got = np.asarray(angles(jnp.asarray(coordinates, jnp.int32), frequencies), np.float64)
    # In units of 2^-64 of a turn, with integers of any size.
    turn = 2 * np.pi
    for c, row in zip(coordinates.tolist(), got, strict=True):
        for f, angle in zip(frequencies.tolist(), row, strict=True):
            fixed = int(f / turn * 2**80)
            wanted = (c * fixed % 2**80) / 2**80 * turn
            difference = (angle - wanted + np.pi) % turn - np.pi
            assert abs(difference) < 4e-7 + abs(c) * 2.0**-52 * 4, (c, f)


REFUSED = {
    "('fire', 'offset')": ("fire", "offset"),
    "fire hidden=0 must be": ("fire", "segment", ("hidden", 0)),
    "fire threshold=0 must be above 0": ("fire", "segment", ("threshold", 0.0)),
    "('kerple-power', 'offset')": ("kerple-power", "offset"),
    "('xpos', 'offset')": ("xpos", "offset"),
    "xpos base=0 must be above 0": ("xpos", "segment", ("base", 0.0)),
    "('ssmax', 'offset')": ("ssmax", "offset"),
    "temperature unit=0 must be above 0": ("temperature", "position", ("unit", 0.0)),
    "('window', 'offset')": ("window", "offset"),
    "window size=0 must be at least 1": ("window", "position"),
    "('fox', 'offset')": ("fox", "offset"),
    "('cope', 'offset')": ("cope", "offset"),
    "cope positions=1 must be at least 2": ("cope", "position", ("positions", 1)),
    "dape bias='rope' is unknown": ("dape", "position", ("bias", "rope")),
    "('dape', 'offset')": ("dape", "offset", ("bias", "alibi")),
    "rope pairs=(0.0, 5.0) must be (from, to) with 0 <= from < to <= 4": (
        "rope", "position", ("pairs", (0.0, 5.0)),
    ),
    "must begin at 0 with spectrum='own'": (
        "rope", "position", ("pairs", (1, 2)), ("spectrum", "own"),
    ),
    "rope spectrum='wide' is unknown": ("rope", "position", ("spectrum", "wide")),
    "rope pairs='all' must be a tuple of finite numbers": ("rope", "position", ("pairs", "all")),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_entries_that_make_no_sense_are_refused_by_name(words):
    with pytest.raises(UserError) as caught:
        config_of((REFUSED[words],))
    assert words in str(caught.value) and str(caught.value).startswith("position.relative: ")


@pytest.mark.parametrize(
    "relative",
    [
        (("rope", "offset", ("pairs", (0, 3))), ("rope", "segment", ("pairs", (2, 4)))),
        (("rope", "offset", ("pairs", (0, 2)), ("spectrum", "own")), ("rope", "segment", ("pairs", (2, 4)))),
        (("pope", "offset"), ("rope", "segment", ("pairs", (2, 4)))),
        (("xpos", "position"), ("rope", "segment")),
    ],
)  # fmt: skip
def test_features_that_would_be_turned_twice_are_refused(relative):
    with pytest.raises(UserError, match="would turn the same pairs"):
        config_of(relative)


def test_dape_refuses_heads_that_are_sharded():
    with pytest.raises(UserError, match=r"dape mixes the heads, which mesh.tensor=2 shards"):
        config_of((("dape", "position"),), mesh__tensor=2)
