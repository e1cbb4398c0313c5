"""Checkpoints that are kept besides the latest: one every so many steps, and the best."""

import json
import os
import random

import pytest
from tiny import tiny, tiny_plan

from bipe_jax import plan
from bipe_jax.checkpoint import deleting
from bipe_jax.errors import UserError
from bipe_jax.evaluation import periodic
from bipe_jax.training import trainer
from bipe_jax.training.keeping import Keeping


def rows(*losses, length=16):
    return [
        {"set": f"a/{i}", "length": n, "loss": loss + (n != length), "tokens": 1}
        for i, loss in enumerate(losses)
        for n in (length, 2 * length)
    ]


def names(workdir):
    return sorted(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdecimal())


@pytest.mark.slow
def test_a_run_keeps_them_over_its_starts(config, tmp_path, monkeypatch):
    """Held-out losses are given: that of step 4 is the lowest at the training length."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: float("nan"), 10: 2.5, 12: 1.5}

    class Given:
        def __init__(self, *_):
            self.steps = iter(
                range(2 if not os.path.exists(tmp_path / "checkpoints" / "6") else 8, 13, 2)
            )

        def __call__(self, _):
            # At other lengths the order is another.
            step = next(self.steps)
            length = config.sequence_length
            return [*rows(losses[step], length=length), *rows(-step, length=4 * length)]

    monkeypatch.setattr(trainer, "PeriodicEvaluation", Given)
    config.steps, config.evaluation.every = 12, 2
    config.checkpoint.every, config.checkpoint.keep = 2, 1
    config.checkpoint.keep_every, config.checkpoint.keep_best = 6, True
    assert not trainer.train(config, str(tmp_path), stop_at=6)
    assert trainer.train(config, str(tmp_path))
    # 10 is the last one that is proved good, since no step follows 12.
    assert names(tmp_path) == [4, 6, 10, 12]


def chosen(steps, losses, tmp_path, **fields):
    named = {f"checkpoint__{name}": value for name, value in fields.items()}
    keeping = Keeping(tiny_plan(evaluation__every=2, **named), str(tmp_path))
    for step, of_sets in losses.items():
        keeping.evaluated(step, rows(*of_sets))
    return keeping(steps)


def test_which_are_chosen(tmp_path):
    losses = {8: (1.0, 3.0), 2: (2.5, 0.5), 4: (1.5, 1.5), 6: (0.0, float("inf"))}
    # The sum of 2 and of 4 is the same: the first is kept. 6 has diverged.
    assert chosen((2, 4, 6, 8), losses, tmp_path, keep_best=True) == {2}
    assert chosen((6, 8, 10), losses, tmp_path, keep_best=True) == {8}
    assert chosen((6, 10), losses, tmp_path, keep_best=True) == set()
    assert chosen((2, 4, 6, 8, 9), {}, tmp_path, keep_every=4) == {4, 8}
    assert chosen((2, 4), {2: (1.0,)}, tmp_path) == set()


def test_the_losses_of_earlier_starts_are_in_the_metrics(tmp_path):
    lines = [{"step": 1, "loss": 3.0}]
    lines += [
        {"step": s, "loss": 3.0, **periodic.metrics(rows(l))} for s, l in ((2, 1.0), (4, 2.0))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 6, "evaluation/a')
    assert chosen((2, 4, 6), {6: (1.5,)}, tmp_path, keep_best=True) == {2}
    assert chosen((4, 6), {6: (1.5,)}, tmp_path, keep_best=True) == {6}
    # A step that is trained again after a rewind has another loss.
    assert chosen((2, 4), {2: (2.5,)}, tmp_path, keep_best=True) == {4}


def test_what_is_kept_is_not_superfluous():
    draw = random.Random(1)
    for _ in range(300):
        steps = sorted(draw.sample(range(1, 30), draw.randint(1, 8)))
        others = set(draw.sample(steps, draw.randint(0, len(steps))))
        gone = deleting.superfluous(steps, 30, 1, 4, others)
        assert set(gone) == set(deleting.superfluous(steps, 30, 1, 4)) - others


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint__keep_every": 3}, r"config.checkpoint.every=2 must divide .*keep_every=3"),
        ({"checkpoint__keep_best": True}, "keep_best=True needs config.evaluation.every above 0"),
        (
            {"checkpoint__keep_best": True, "evaluation__every": 4},
            r"config.evaluation.every=4 must divide config.checkpoint.every=2",
        ),
        ({"checkpoint__keep_every": -2}, "keep_every=-2 must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        plan.make(tiny(**fields))
