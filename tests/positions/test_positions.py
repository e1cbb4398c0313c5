import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from tiny import tiny_plan

from bipe_jax.errors import UserError
from bipe_jax.positions.absolute import Learned, Sinusoidal
from bipe_jax.positions.alibi import Alibi, alibi_slopes
from bipe_jax.positions.rope import Rope

# Row by row: the usual, far beyond any training length, and backwards as offsets are.
COORDINATES = np.array(
    [[0, 1, 2, 9, 10], [99_990, 99_991, 99_999, 100_000, 131_071], [3, 0, 1, 2, 0]]
)
# A float32 angle is rounded twice, in its frequency and in the product.
KEY = jax.random.key(0)
ANGLE_ERROR = 2.0**-23
FLOAT32_ERROR = 1e-6
BFLOAT16_ERROR = 2.0**-8  # of one rounding, relative


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_multiplies_complex_pairs(theta, dtype):
    config = tiny_plan(model__width=48, model__heads=3, model__kv_heads=3)
    rope = Rope(config, "segment", KEY, theta=theta)
    x = np.random.default_rng(0).normal(size=(3, 5, 3, 16)).astype(jnp.dtype(dtype))
    prepared = rope.features(jnp.asarray(COORDINATES))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(prepared))
    turned = rope.queries(x, prepared)
    np.testing.assert_array_equal(turned, rope.keys(x, prepared))
    assert turned.dtype == dtype and turned.shape == x.shape

    x64 = np.asarray(x, np.float64)
    expected = reference.rope(x64, COORDINATES, theta)
    first, second = np.split(np.abs(x64), 2, axis=-1)
    size = np.concatenate([first + second] * 2, axis=-1)
    angle = COORDINATES[..., None, None] * np.tile(theta ** (-np.arange(8) / 8), 2)
    error = size * (angle * ANGLE_ERROR + FLOAT32_ERROR)
    if dtype == "bfloat16":  # its input is exact: only the result is rounded
        error += np.abs(expected) * BFLOAT16_ERROR
    assert (np.abs(np.asarray(turned, np.float64) - expected) <= error).all()


def test_alibi_slopes_of_twelve_heads_times_96_are_those_of_the_paper_notes():
    literal = [48, 24, 12, 6, 3, 1.5, 0.75, 0.375, 67.88, 33.94, 16.97, 8.49]
    np.testing.assert_allclose(96 * alibi_slopes(12), literal, atol=0.005, rtol=0)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 25])
def test_alibi_slopes_follow_the_released_recursion(heads):
    np.testing.assert_allclose(alibi_slopes(heads), reference.alibi_slopes(heads), rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 96.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alibi_is_minus_slope_times_difference(dtype, scale):
    config = tiny_plan(model__width=48, model__heads=12, model__kv_heads=12, model__dtype=dtype)
    coordinates = np.array([[0, 1, 964, 965, 966], [0, 7, 99_999, 100_000, 100_001]])
    alibi = Alibi(config, "segment", KEY, slope_scale=scale)
    query, key = (alibi.features(jnp.asarray(c)) for c in (coordinates[:, 2:], coordinates))
    bias = alibi.bias(query, key, jnp.arange(12))
    assert bias.dtype == jnp.float32
    expected = reference.alibi(coordinates, 12, scale)[:, :, 2:]
    np.testing.assert_allclose(np.asarray(bias, np.float64), expected, rtol=ANGLE_ERROR)


@pytest.mark.parametrize("options", [{}, {"scale": 1.0, "theta": 500000.0}])
def test_sinusoidal_is_sines_then_cosines(options):
    config = tiny_plan(model__dtype="bfloat16")
    encoding = Sinusoidal(config, "position", None, **options)
    vectors = encoding(jnp.asarray(COORDINATES))
    assert vectors.dtype == jnp.float32
    # By default as large as token embeddings are at the start.
    scale, theta = options.get("scale", 0.02), options.get("theta", 10000.0)
    expected = reference.sinusoidal(COORDINATES, 32, scale, theta)
    angle = COORDINATES[..., None] * np.tile(theta ** (-np.arange(16) / 16), 2)
    error = scale * (angle * ANGLE_ERROR + FLOAT32_ERROR)
    assert (np.abs(np.asarray(vectors, np.float64) - expected) <= error).all()


def test_learned_gives_a_row_a_value_and_the_last_row_from_there_on():
    table = Learned(tiny_plan(), "offset", jax.random.key(0), size=4)
    rows = np.asarray(table.table[...])
    assert rows.shape == (4, 32)
    assert len(np.unique(rows)) == rows.size
    picked = table(jnp.array([[0, 1, 2, 3, 4, 1000, 0]]))
    np.testing.assert_array_equal(picked[0], rows[[0, 1, 2, 3, 3, 3, 0]])


def test_learned_has_the_training_length_by_default():
    assert Learned(tiny_plan(), "offset", jax.random.key(0)).table.shape == (16, 32)


def config_with(absolute=(), relative=(), **overrides):
    return tiny_plan(position__absolute=absolute, position__relative=relative, **overrides)


@pytest.mark.parametrize(
    "absolute, relative, words",
    [
        ([("learnt", "offset")], [], "'learnt' is unknown.*learned"),
        ([], [("t6", "segment")], "'t6' is unknown.*rope"),
        ([("rope", "segment")], [], "'rope' belongs to the other list"),
        ([], [("learned", "offset")], "'learned' belongs to the other list"),
        ([], [("rope", "paragraph")], "'paragraph' is unknown.*position, segment, offset"),
        ([], [("rope", "segment", ("base", 500.0))], "'rope' has no option 'base'.*theta"),
        ([("learned", "offset", ("size", 8.0))], [], "learned size=8.0 must be .*int"),
        ([("learned", "offset", ("size", True))], [], "learned size=True must be .*int"),
        ([], [("rope", "segment", ("theta", "1e4"))], "rope theta='1e4' must be .*float"),
        ([], [("rope", "segment", "theta")], "option 'theta' of 'rope' must be"),
        ([], [("rope", "segment", ("theta",))], r"option \('theta',\) of 'rope' must be"),
        ([], ["rope"], "'rope' must be .kind, coordinate"),
        ([], [("rope",)], r"\('rope',\) must be .kind, coordinate"),
        ([], [("rope", "segment"), ("rope", "position")], "rope_segment and rope_position"),
        ([], [("rope", "segment"), ("rope", "segment", ("theta", 9.0))], "twice.*rope_segment"),
        ([("learned", "segment")], [], "'learned', 'segment'.*no bound"),
        ([], [("alibi", "offset")], "'alibi', 'offset'.*distance"),
        ([], [("alibi", "segment", ("slope_scale", 0))], "slope_scale=0.0 must be above 0"),
        ([], [("rope", "segment", ("theta", 1))], "rope theta=1.0 must be above 1"),
        ([("sinusoidal", "position", ("theta", 0.5))], [], "sinusoidal theta=0.5 must be above 1"),
        ([("learned", "offset", ("size", -1))], [], "learned size=-1 must be at least 1"),
        ([("learned", "position", ("size", 15))], [], "size=15 rows.*sequence_length=16"),
    ],
)
def test_an_encoding_that_makes_no_sense_is_refused_by_name(absolute, relative, words):
    list_name = "absolute" if absolute else "relative"
    with pytest.raises(UserError, match=f"position.{list_name}:? .*{words}"):
        config_with(tuple(absolute), tuple(relative))


@pytest.mark.parametrize("size", [0, -5])
def test_a_learned_table_without_rows_is_refused(size):
    with pytest.raises(UserError, match=f"learned size={size} must be at least 1"):
        config_with((("learned", "offset", ("size", size)),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "list_name, kind, option",
    [
        ("absolute", "sinusoidal", "theta"),
        ("absolute", "sinusoidal", "scale"),
        ("relative", "rope", "theta"),
        ("relative", "alibi", "slope_scale"),
    ],
)
def test_an_option_that_is_not_finite_is_refused(list_name, kind, option, value):
    entries = ((kind, "position", (option, value)),)
    with pytest.raises(UserError, match=f"{kind} {option}"):
        config_with(**{list_name: entries})


@pytest.mark.parametrize(
    "entry", [(["rope"], "segment"), ("rope", ["segment"]), ("rope", "segment", (["theta"], 9.0))]
)
def test_a_name_that_is_no_string_is_refused(entry):
    with pytest.raises(UserError, match=r"position\.relative"):
        config_with(relative=(entry,))


def test_heads_that_have_no_pairs_are_refused():
    with pytest.raises(UserError, match=r"rope turns pairs.* = 3 is odd"):
        config_with(relative=(("rope", "segment"),), model__width=12)


def test_an_odd_width_is_refused_for_sinusoidal():
    shape = {"model__width": 33, "model__heads": 3, "model__kv_heads": 3}
    with pytest.raises(UserError, match=r"model\.width=33 must be even for 'sinusoidal'"):
        config_with((("sinusoidal", "offset"),), **shape)


def test_entries_may_be_lists_and_integers_may_stand_for_floats():
    config = config_with(
        [["learned", "offset", ["size", 8]]], [["rope", "segment"], ["alibi", "position", ["slope_scale", 2]]]
    )  # fmt: skip
    encodings = config.encodings
    assert [(e.kind, e.coordinate, e.options) for e in encodings.absolute] == [
        ("learned", "offset", {"size": 8})
    ]
    assert [(e.kind, e.coordinate, e.options) for e in encodings.relative] == [
        ("rope", "segment", {}),
        ("alibi", "position", {"slope_scale": 2.0}),
    ]
