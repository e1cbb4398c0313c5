"""Coordinates that are drawn in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_plan

from bipe_jax import model
from bipe_jax.data.batches import annotate
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, scoring
from bipe_jax.evaluation.evaluator import Settings, resolve
from bipe_jax.evaluation.protocols import Window
from bipe_jax.positions import draws
from bipe_jax.training import step
from tests.model.test_model import annotated, draw_tokens

COORDINATES = np.array(
    [[0, 0, 1, 1, 1, 2, 3, 3], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 0, 0, 1, 2]]
)


def drawn(entry, coordinates=COORDINATES, steps=200, seed=3):
    """(steps, rows, L)."""
    parsed = tiny_plan(position__draws=(entry,), position__absolute=()).encodings.draws
    apply = jax.jit(lambda s: draws.apply(parsed, seed, s, {"segment": jnp.asarray(coordinates)}))
    return np.array([apply(s)["segment"] for s in range(steps)])


def test_randomized_is_a_sorted_sample_without_repetition_of_the_rows_length():
    found = drawn(("randomized", "segment", ("maximum", 12)), steps=600)
    for row, counts in zip(range(3), (4, 8, 3), strict=True):
        values = np.stack(
            [found[:, row, list(COORDINATES[row]).index(i)] for i in range(counts)], 1
        )
        assert (np.diff(values, axis=1) > 0).all() and values.min() >= 0 and values.max() < 12
        for i in range(counts):  # equal values stay equal
            same = found[:, row, COORDINATES[row] == i]
            assert (same == same[:, :1]).all()
        # Each number is in the sample equally often: counts / 12 of 600 draws.
        often = np.bincount(values.ravel(), minlength=12)
        expected = 600 * counts / 12
        assert np.abs(often - expected).max() < 5 * np.sqrt(expected)
    assert len({tuple(row) for row in found[:, 1]}) > 150  # of 495
    assert (found[:, 0, :4] != found[:, 1, :4]).any()


def test_a_row_that_runs_beyond_the_maximum_stays_as_it_is():
    found = drawn(("randomized", "segment", ("maximum", 4)), steps=20)
    np.testing.assert_array_equal(found[:, 1], np.broadcast_to(COORDINATES[1], (20, 8)))
    np.testing.assert_array_equal(found[:, 0], np.broadcast_to(COORDINATES[0], (20, 8)))
    assert (found[:, 2] != COORDINATES[2]).any()


def test_shift_moves_a_row_by_one_number():
    found = drawn(("shift", "segment", ("maximum", 5))) - COORDINATES
    assert (found == found[:, :, :1]).all()
    assert set(found.ravel().tolist()) == set(range(6))
    assert (found[:, 0, 0] != found[:, 1, 0]).any()


def test_pose_moves_what_comes_after_a_cut():
    found = drawn(("pose", "segment", ("target", 20)), steps=1000)[:, 1] - COORDINATES[1]
    for moved in found:
        cut = int(np.argmax(moved > 0)) if moved.any() else 8
        assert not moved[:cut].any() and len(set(moved[cut:].tolist())) <= 1
    moves = found[:, -1]
    assert set(moves.tolist()) == set(range(13))  # 0 … 20 - 8
    cuts = np.argmax(found[moves > 0] > 0, axis=1)
    assert set(cuts.tolist()) == {1, 2, 3, 4}  # 1 … (8 + 1) / 2


def test_draws_depend_on_seed_step_and_row_alone():
    entry = ("randomized", "segment", ("maximum", 50))
    found = drawn(entry, steps=5)
    np.testing.assert_array_equal(found, drawn(entry, steps=5))
    assert (found != drawn(entry, steps=5, seed=4)).any()
    np.testing.assert_array_equal(found[:, :2], drawn(entry, COORDINATES[:2], steps=5))
    assert len({row.tobytes() for row in found[:, 0]}) == 5


def train(config, start=None, first=0, steps=3):
    state = start or step.init_state(config, jax.random.key(0))
    run = jax.jit(functools.partial(step.train_step, config))
    losses = []
    for number in range(first, steps):
        batch = annotate(draw_tokens(number, 4, 17).astype(np.int32), config.segment_rule)
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


def test_training_draws_and_goes_on_the_same_after_a_stop_and_under_accumulation():
    of = functools.partial(
        tiny_plan,
        position__absolute=(("learned", "offset", ("size", 64)),),
        position__draws=(
            ("randomized", "segment", ("maximum", 40)),
            ("shift", "offset", ("maximum", 48)),
        ),
    )
    config = of()
    losses, _ = train(config)
    plain, _ = train(tiny_plan(position__absolute=(("learned", "offset", ("size", 64)),)))
    assert losses[0] != plain[0]
    begun, state = train(config, steps=1)
    resumed, _ = train(config, state, first=1)
    assert begun + resumed == losses
    np.testing.assert_allclose(train(of(accumulation=2))[0], losses, rtol=2e-6)


def test_evaluation_has_true_coordinates():
    drawing = tiny_plan(position__draws=(("randomized", "segment", ("maximum", 400)),))
    inputs = annotated(draw_tokens(0, 2, 16))
    params = model.init(drawing, jax.random.key(0))
    np.testing.assert_array_equal(
        model.apply(drawing, params, inputs), model.apply(tiny_plan(), params, inputs)
    )


def test_evaluation_draws_when_asked_by_seed_and_window():
    drawing = tiny_plan(position__draws=(("randomized", "segment", ("maximum", 400)),), seed=5)
    params = model.init(drawing, jax.random.key(0))
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 64, size, dtype=np.int32) for size in (60, 40)]
    windows = [Window(0, 0, 16, 9), Window(1, 8, 24, 9), Window(0, 30, 46, 9), Window(1, 0, 16, 9)]
    found = []
    for rows in (1, 4):
        config = drawing.replace({"evaluation.batch_tokens": 16 * rows})
        loaded_model = loaded.on_all_devices(config, params)
        scorer = scoring.Scorer(loaded_model, drawn=True)
        found.append([x for x, _ in scorer(loaded_model.params, documents, windows, 16)])
    for number, window in enumerate(windows):
        tokens = documents[window.document][window.start : window.end + 1]
        batch = annotate(tokens[None], drawing.segment_rule)
        inputs = {n: jnp.asarray(batch[n]) for n in ("tokens", "position", "segment", "offset")}
        rows = jnp.asarray([number])
        inputs = draws.apply(drawing.encodings.draws, 5, 0, inputs, rows)
        log_probs = jax.nn.log_softmax(model.apply(drawing, params, inputs))[0]
        wanted = log_probs[jnp.arange(16), tokens[1:]][-9:]
        assert (inputs["segment"] != batch["segment"]).any()
        for of_rows in found:
            np.testing.assert_allclose(of_rows[number], wanted, atol=2e-5)


def test_evaluation_with_draws_needs_draws():
    settings = Settings(lengths=(16,), draws=True)
    with pytest.raises(UserError, match=r"--draws: the model has no config\.position\.draws"):
        resolve(settings, tiny_plan(data__evaluation="held_out.jsonl"))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            (("random", "segment"),),
            "'random' is unknown (did you mean 'randomized'?): use one of randomized",
        ),
        ((("shift", "sentence", ("maximum", 3)),), "coordinate 'sentence' is unknown"),
        ((("shift", "segment"),), "shift maximum=None must be from 1 to 16777216"),
        ((("shift", "segment", ("maximum", 0)),), "shift maximum=0 must be from 1"),
        (
            (("pose", "segment", ("maximum", 9)),),
            "'pose' has no option 'maximum': use one of target",
        ),
        (("shift",), "'shift' must be (draw, coordinate, (option, value))"),
        (
            (("shift", "segment", ("maximum", 3)), ("pose", "segment", ("target", 3))),
            "draws 'segment' twice",
        ),
        (
            (("randomized", "offset", ("maximum", 64)),),
            "values up to 63, and the learned table has 16 rows: give it ('size', 64)",
        ),
    ],
)
def test_entries_that_make_no_sense_are_refused(entries, words):
    with pytest.raises(UserError) as caught:
        tiny_plan(position__draws=entries)
    assert str(caught.value).startswith("position.draws") and words in str(caught.value)
