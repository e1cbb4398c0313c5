"""The course of a training in a report: every mean, from lines of any kind."""

import itertools
import json

import pytest

import tests.report.test_report as made
from bipe_jax.report import page, training


def write(path, count: int, extra=(), every=1) -> str:
    directory = made.save(path, evaluation=made.evaluation())
    lines = [json.dumps({"step": s, "loss": 9.0 - s / 100}) for s in range(1, count + 1, every)]
    (path / "metrics.jsonl").write_text("\n".join([*lines, *extra]))
    return directory


def test_means_over_ranges_of_steps(tmp_path):
    held_out = [
        json.dumps(
            {"step": s, "loss": 1.5, "evaluation/a/b/64/loss": 2.0 + s, "learning_rate": 1e-3}
        )
        for s in (101, 102)
    ]
    of_run = write(tmp_path / "run", 100, [*held_out, "[]", '{"step": 7, "loss": NaN}', '{"ste'])
    parsed = made.Page(page.build([of_run]))
    for first in range(1, 100, 3):
        mean = 9.0 - (first + 1) / 100
        assert (
            f"run, loss (nats a token), steps {first:,}–{first + 2:,}: {mean:.4g}" in parsed.titles
        )
    assert {"Loss", "Learning rate", "Held-out loss, a/b, 64 tokens"} <= set(parsed.words)
    assert "run, loss (nats a token), step 102: 104" in parsed.titles
    assert "Gradient norm" not in parsed.words
    assert "training" in parsed.ids


def test_several_runs_have_a_curve_each_and_none_is_no_section(tmp_path):
    runs = [write(tmp_path / "a", 5), write(tmp_path / "b", 30, every=10)]
    titles = made.Page(page.build(runs)).titles
    assert "a, loss (nats a token), step 5: 8.95" in titles
    assert "b, loss (nats a token), step 21: 8.79" in titles
    bare = made.save(tmp_path / "c", evaluation=made.evaluation())
    assert "training" not in made.Page(page.build([bare])).ids


@pytest.mark.parametrize("last", [1, 7, 20, 99, 100, 600, 4321, 500_000, 1_000_000])
def test_ticks_are_round_and_few(last):
    ticks = training._ticks(last)
    assert ticks[0] == 0 and 2 <= len(ticks) <= 7 and ticks[-1] <= last
    assert len({b - a for a, b in itertools.pairwise(ticks)}) == 1
    assert all(len(str(tick).rstrip("0")) <= 2 for tick in ticks)
