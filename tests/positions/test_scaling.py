"""Scalings of rotary frequencies: float64 formulas of the papers, limits, config, whole models."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from tiny import tiny_plan

import bipe_jax
from bipe_jax import positions, segments
from bipe_jax.config import from_json, to_json
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded
from bipe_jax.evaluation.decode import Generator
from bipe_jax.positions.rope import Rope
from tests.model.test_model import draw, draw_tokens

SCALINGS = {
    "linear": {"scaling": "linear", "factor": 8.0},
    "ntk": {"scaling": "ntk", "factor": 8.0},
    "dynamic-ntk": {"scaling": "dynamic-ntk", "factor": 2.0, "original": 80.5},
    "dynamic-ntk of factor 1": {"scaling": "dynamic-ntk", "factor": 1.0, "original": 20.0},
    "yarn": {"scaling": "yarn", "factor": 8.0, "original": 80.0},
    "yarn of a long training": {"scaling": "yarn", "factor": 16.0, "original": 4096.0},
    "yarn as released": {"scaling": "yarn-released", "factor": 8.0, "original": 80.0},
    "yarn as released, long": {"scaling": "yarn-released", "factor": 16.0, "original": 4096.0},
    "llama3": {"scaling": "llama3", "factor": 8.0, "original": 80.0},
}
LONGROPE = {
    "longrope": {"scaling": "longrope", "factor": 8.0, "original": 80.0},
    "longrope of short texts": {"scaling": "longrope", "factor": 8.0, "original": 80.0},
}
FACTORS = tuple(np.linspace(1, 9, 32).tolist())
LONGROPE["longrope"] |= {"long": FACTORS}
LONGROPE["longrope of short texts"] |= {"long": FACTORS, "short": FACTORS[::-1]}
# Rows that stay within the original length, that leave it, and that fall back as offsets do.
COORDINATES = np.array([[0, 1, 2, 19, 19], [3, 70, 80, 81, 640], [7, 5000, 0, 1, 130_000]])


def built(width=64, theta=10000.0, **options):
    config = tiny_plan(model__width=2 * width, model__heads=2, model__kv_heads=2)
    Rope.check(config, "segment", theta=theta, **options)
    return Rope(config, "segment", jax.random.key(0), theta=theta, **options)


def angles_and_magnitude(rope, coordinates):
    """(B, L, H/2) each: the angles between -pi and pi."""
    cos, sin = (
        np.asarray(x[..., 0, :], np.float64) for x in rope.features(jnp.asarray(coordinates))
    )
    return np.arctan2(sin, cos), np.hypot(sin, cos)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("options", (SCALINGS | LONGROPE).values(), ids=SCALINGS | LONGROPE)
def test_angles_are_those_of_the_papers(options, theta):
    angles, magnitudes = angles_and_magnitude(built(theta=theta, **options), COORDINATES)
    expected, magnitude = reference.rope_angles(COORDINATES, 64, theta, **options)
    np.testing.assert_allclose(magnitudes, magnitude, rtol=1e-6)
    # A float32 angle is rounded in its frequency (three operations where it depends on the row) and
    # in the product.
    difference = np.abs(np.angle(np.exp(1j * (angles - expected))))
    assert (difference <= 4 * 2.0**-24 * expected + 1e-6).all()


@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_queries_and_keys_are_turned_and_stretched_alike(options):
    x = np.random.default_rng(0).normal(size=(3, 5, 2, 64)).astype(np.float32)
    coordinates = COORDINATES % 700
    rope = built(**options)
    turned = rope.queries(x, rope.features(jnp.asarray(coordinates)))
    expected = reference.rope(x, coordinates, **options)
    np.testing.assert_allclose(turned, expected, atol=5e-4)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
def test_a_factor_of_one_is_the_plain_encoding(scaling):
    original = {"original": 80.0} if scaling == "yarn" else {}
    scaled = built(scaling=scaling, factor=1.0, **original).features(jnp.asarray(COORDINATES))
    jax.tree.map(np.testing.assert_array_equal, scaled, built().features(jnp.asarray(COORDINATES)))


def test_ntk_leaves_the_first_pair_and_divides_the_last_by_the_factor():
    rope, plain = built(scaling="ntk", factor=8.0), built()
    far = jnp.asarray([[8]])
    (first, *_, last), (plain_first, *_) = (
        angles_and_magnitude(r, far)[0][0, 0] for r in (rope, plain)
    )
    assert first == plain_first
    assert last == pytest.approx(plain.frequencies[-1], rel=1e-6)


def test_dynamic_ntk_is_plain_until_a_row_is_longer_than_the_training():
    plain, dynamic = built(), built(scaling="dynamic-ntk", factor=4.0, original=50.0)
    rows = np.array([[0, 7, 49], [0, 7, 50], [0, 7, 400]])
    ours, theirs = dynamic.features(jnp.asarray(rows)), plain.features(jnp.asarray(rows))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a[0], b[0])  # 49 is the 50th value
        assert (a[1] != b[1]).any() and (a[1, 1] != a[2, 1]).any()


def test_yarn_leaves_fast_pairs_and_divides_slow_ones():
    rope, plain = built(**SCALINGS["yarn of a long training"]), built()
    turns = 4096 * np.array(plain.frequencies) / (2 * math.pi)
    cos, sin = rope.features(jnp.asarray([[1]]))
    ratio = np.arctan2(sin, cos)[0, 0, 0] / np.array(plain.frequencies)
    fast, slow = turns > 32, turns < 1
    assert fast.sum() > 8 and slow.sum() > 8 and (~fast & ~slow).sum() > 4
    np.testing.assert_allclose(ratio[fast], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[slow], 1 / 16, rtol=1e-6)
    assert ((ratio[~fast & ~slow] > 1 / 16) & (ratio[~fast & ~slow] < 1)).all()
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(16) + 1, rtol=1e-6)


def test_only_dynamic_ntk_is_not_steady():
    assert {name for name, options in SCALINGS.items() if not built(**options).cacheable} == {
        "dynamic-ntk",
        "dynamic-ntk of factor 1",
    }
    assert built().cacheable


def config_with(coordinate="segment", **options):
    entry = ("rope", coordinate, *options.items())
    return tiny_plan(position__relative=(entry,), sequence_length=64)


@pytest.mark.parametrize("coordinate", ["position", "segment", "offset"])
@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_logits_are_those_of_the_reference(options, coordinate):
    """In whole models, with rows of different numbers of segments."""
    options = options | ({"original": 9.0} if "original" in options else {})
    config = config_with(coordinate, **options)
    params, tokens = draw(config), draw_tokens(0, 2, 64)
    inputs = {"tokens": tokens, **segments.coordinates(tokens, config.segment_rule)}
    assert len(set(np.asarray(inputs["segment"]).max(axis=1))) == 2
    logits = jax.jit(lambda p, t: bipe_jax.apply(config, p, t))(params, tokens)
    expected = reference.logits(config, params, inputs)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)
    plain = reference.logits(config_with(coordinate), params, inputs)
    assert np.abs(expected - plain).max() > 1e-2


@pytest.mark.parametrize("scaling", ["dynamic-ntk", "yarn"])
def test_decoding_follows_the_whole_forward_pass(scaling):
    """Dynamic NTK turns all keys anew when a new segment begins, as each token does here."""
    config = config_with("segment", theta=4.0, scaling=scaling, factor=8.0, original=3.0)
    config = config.replace({"segments.rule": "fixed:1"})
    model = loaded.on_all_devices(config, draw(config))
    prompts = [
        draw_tokens(seed, 1, length)[0].astype(np.int32) for seed, length in ((1, 2), (2, 9))
    ]
    for prompt, answer in zip(prompts, Generator(model, 64)(prompts, 24), strict=True):
        row = np.concatenate([prompt, answer])[None]
        for end in range(len(prompt), row.size):
            inputs = {"tokens": row[:, :end], **segments.coordinates(row[:, :end], model.rule)}
            logits = reference.logits(model.config, model.params, inputs)[0, -1]
            assert logits[row[0, end]] > logits.max() - 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scaling": "spiral", "factor": 2.0}, "'spiral' is unknown: use one of linear, ntk"),
        ({"scaling": 3, "factor": 2.0}, "rope scaling=3 must be a string"),
        ({"scaling": "yarn", "original": 8.0}, "'yarn' needs a factor"),
        ({"scaling": "yarn", "factor": 2.0}, "'yarn' needs 'original'"),
        ({"scaling": "dynamic-ntk", "factor": 2.0}, "'dynamic-ntk' needs 'original'"),
        ({"scaling": "linear", "factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"scaling": "linear", "factor": math.nan}, "factor=nan must be a finite float"),
        ({"scaling": "linear", "factor": "8"}, "factor='8' must be a finite float"),
        ({"scaling": "linear", "factor": 2.0, "original": 8.0}, "original=8 has no meaning"),
        ({"scaling": "ntk", "factor": 2.0, "original": 8.0}, "original=8 has no meaning"),
        ({"scaling": "yarn", "factor": 2.0, "original": 0}, "original=0 must be above 0"),
        ({"factor": 2.0}, "factor=2 needs a scaling: linear, ntk, dynamic-ntk, yarn"),
        ({"original": 8.0}, "original=8 needs a scaling"),
        ({"long": (1.0,)}, "long=(1.0,) needs a scaling"),
        ({"scaling": "ntk", "factor": 2.0, "long": (1.0,)}, "is for scaling='longrope'"),
        ({"scaling": "longrope", "factor": 2.0, "original": 8.0}, "needs 'long'"),
        ({"scaling": "llama3", "factor": 2.0}, "'llama3' needs 'original'"),
        (
            {"scaling": "longrope", "factor": 2.0, "original": 8.0, "long": (1.0,)},
            "long=(1.0,) must be 4 numbers above 0, one for each pair",
        ),
        (
            {"scaling": "longrope", "factor": 2.0, "original": 1.0, "long": (1.0,) * 4},
            "original=1 must be above 1",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UserError) as caught:
        config_with(**options)
    assert "position.relative: rope" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ntk", "dynamic-ntk"])
def test_a_head_of_one_pair_cannot_be_stretched_unequally(name):
    config = config_with(**SCALINGS[name])
    narrow = {"model.heads": 16, "model.kv_heads": 16}
    with pytest.raises(UserError, match="2 features have only one"):
        config.replace(narrow)
    config_with(**SCALINGS["yarn"]).replace(narrow)


def entry(relative):
    (rope,) = relative
    return rope


def test_extend_scales_the_rotary_encoding_of_any_coordinate():
    of_position, of_segment = config_with("position", theta=500.0), config_with("segment")
    assert entry(positions.extend(of_position, "ntk:4")) == (
        "rope", "position", ("theta", 500.0), ("scaling", "ntk"), ("factor", 4.0)
    )  # fmt: skip
    yarn = ("scaling", "yarn"), ("factor", 8.0)
    assert entry(positions.extend(of_position, "yarn:8"))[3:] == (*yarn, ("original", 64))
    ran = {"segment": 12.5}
    assert entry(positions.extend(of_position, "yarn:8", ran))[3:] == (*yarn, ("original", 64))
    assert entry(positions.extend(of_segment, "yarn:8", ran))[2:] == (*yarn, ("original", 12.5))
    assert entry(positions.extend(of_segment, "yarn:8:80", ran))[2:] == (*yarn, ("original", 80.0))
    assert entry(positions.extend(config_with("offset"), "linear:2"))[1] == "offset"
    assert entry(of_position.position.relative) == ("rope", "position", ("theta", 500.0))
    both = tiny_plan(position__relative=(("alibi", "position"), ("rope", "segment")))
    alibi, rope = positions.extend(both, "linear:2")
    assert alibi == ("alibi", "position") and rope[2:] == (("scaling", "linear"), ("factor", 2.0))
    extended = of_segment.replace({"position.relative": positions.extend(of_segment, "yarn:8:80")})
    assert from_json(json.loads(json.dumps(to_json(extended)))).position == extended.position


def test_a_model_that_is_extended_can_be_extended_further():
    """What the coordinate ran to before the first extension stays, though blocks are longer now."""
    yarn = config_with("position", scaling="yarn", factor=4.0, original=16.0)
    again = positions.extend(yarn, "yarn:8", {"position": 64})
    assert entry(again)[2:] == (("scaling", "yarn"), ("factor", 8.0), ("original", 16.0))
    assert entry(positions.extend(yarn, "ntk:8"))[2:] == (("scaling", "ntk"), ("factor", 8.0))
    linear = config_with("position", scaling="linear", factor=4.0)
    with pytest.raises(UserError, match=r"how far 'position' ran before.*as in yarn:8:80"):
        positions.extend(linear, "yarn:8")
    assert entry(positions.extend(linear, "yarn:8:16"))[2:] == entry(again)[2:]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("yarn", "must be SCALING:FACTOR"),
        ("yarn:", "must be SCALING:FACTOR"),
        ("yarn:x", "must be SCALING:FACTOR"),
        ("yarn:nan", "must be SCALING:FACTOR"),
        ("yarn:8:80:1", "must be SCALING:FACTOR"),
        ("yarn:8:inf", "must be SCALING:FACTOR"),
        ("spiral:8", "SCALING one of linear, ntk, dynamic-ntk, yarn"),
        (":8", "must be SCALING:FACTOR"),
        ("", "must be SCALING:FACTOR"),
        ("yarn:8", "how far 'segment' ran before the model was extended is not known"),
        ("ntk:0.5", "factor=0.5 must be at least 1"),
        ("ntk:4:80", "original=80 has no meaning for scaling='ntk'"),
        ("yarn:8:-1", "original=-1 must be above 0"),
    ],
)
def test_an_extension_that_makes_no_sense_is_refused(spec, words):
    with pytest.raises(UserError) as caught:
        positions.extend(config_with("segment"), spec)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("relative", "has"), [((), "nothing"), ((("alibi", "segment"),), "alibi")])
def test_a_model_without_rotary_encoding_cannot_be_extended(relative, has):
    with pytest.raises(UserError, match=f"'yarn:8:80' scales a rotary encoding.*has {has}"):
        positions.extend(tiny_plan(position__relative=relative), "yarn:8:80")
