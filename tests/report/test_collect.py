"""Comparing the points of a sweep: its tables, averages over seeds, and what is not set side by side."""

import csv
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bipe_jax.errors import UserError
from bipe_jax.report import palette, pictures
from launch import collect, points, sweep
from launch.algebra import product
from launch.algebra import sweep as values_of
from tests.launch.test_sweep import RATE, checked, finish


@pytest.fixture
def many(tmp_path):
    """A sweep of 2 x 5 points: 8 finished, one that ended early, one that has not begun."""
    held = checked(
        product(
            values_of("segments.rule", ["newline", "fixed:8"]),
            values_of(RATE, [10.0, 9.0, 0.1, 3e-5, 1e-3]),
        ),
        tmp_path,
    )
    for number, point in enumerate(held):
        points.record(point.job.workdir, point.config)
        if number < 9:
            finish(point.job.workdir, step=20 if number < 8 else 7, perplexity=5.0 + number)
    return tmp_path, held


def test_collect_makes_one_table_of_all_points(many, capsys):
    directory, held = many
    collect.collect(str(directory))
    table = list(csv.DictReader((directory / "sweep.csv").open()))
    assert len(table) == 8 * 2 * 5 + 2
    rows = {(row["point"], row["set"], row["length"]): row for row in table}
    assert len(rows) == len(table)
    first = rows[held[0].job.name, "Plays", "64"]
    assert (first[RATE], first["segments.rule"]) == ("10.0", "newline")
    assert float(first["perplexity"]) == 5.64 and float(first["perplexity_error"]) == 0.5
    assert float(first["final_loss"]) == pytest.approx((6.1 + 6.2) / 2) and first["step"] == "20"
    assert {row["status"] for row in table} == {"finished", "unfinished", "not started"}
    assert rows[held[8].job.name, "", ""]["step"] == "7"
    # Numbers by their size.
    order = list(dict.fromkeys(float(row[RATE]) for row in table))
    assert order == [3e-5, 1e-3, 0.1, 9.0, 10.0]
    scales = [(("alibi", "segment", ("slope_scale", scale)),) for scale in (6.0, 12.0, 96.0, 192.0)]
    assert sorted([(), *scales[::-1]], key=collect._order) == [*scales, ()]
    said = capsys.readouterr()
    assert f"unfinished at step 7: {held[8].job.name}" in said.err
    assert f"not started: {held[9].job.name}" in said.err
    assert "8 of 10 points are finished" in said.err
    page = (directory / "report.html").read_text()
    assert "not started" in page and "rule newline, learning_rate 3e-05" in page


def test_pictures_name_the_best_points_and_no_more_than_there_are_colours(many, monkeypatch):
    directory, _ = many
    drawn = []
    monkeypatch.setattr(pictures, "perplexity", lambda groups, path: drawn.extend(groups))
    collect.collect(str(directory))
    perplexities = [group.first.results[0].perplexity for group in drawn]
    worst = 5.0 + 7 + 0.32
    assert len(drawn) == palette.SERIES + 1 and perplexities[-1] == worst
    assert worst not in perplexities[: palette.SERIES]


@pytest.fixture
def seeded(tmp_path):
    """A sweep of 2 rules x 3 seeds: the second rule is worse by 0.5 to 0.7, whatever the seed."""
    held = checked(
        product(values_of("segments.rule", ["newline", "fixed:8"]), values_of("seed", [1, 2, 3])),
        tmp_path,
    )
    for number, point in enumerate(held):
        points.record(point.job.workdir, point.config)
        finish(point.job.workdir, 20, 9.0 + number % 3 + (0.5 + number % 3 / 10) * (number // 3))
    return tmp_path, held


def test_collect_averages_over_seeds(seeded, capsys):
    directory, _ = seeded
    collect.collect(str(directory))
    printed = capsys.readouterr().out
    losses = {
        rule: [math.log(9.32 + s + (0.5 + s / 10) * i) for s in range(3)]
        for i, rule in enumerate(("newline", "fixed:8"))
    }
    for rule, of_rule in losses.items():
        mean = math.exp(np.mean(of_rule))
        half = mean * stats.t.ppf(0.975, 2) * np.std(of_rule, ddof=1) / math.sqrt(3)
        assert re.search(rf"^rule {rule} +3 +{mean:.2f} ± {half:.2f} ", printed, re.MULTILINE)
    lines = list(csv.DictReader((directory / "comparison.csv").open()))
    assert len(lines) == 2 * 2 * 5
    worse = next(
        line
        for line in lines
        if (line["run"], line["set"], line["length"]) == ("rule fixed:8", "Plays", "32")
    )
    base = "rule newline" if worse["difference"] else "rule fixed:8"
    differences = np.subtract(losses["fixed:8"], losses["newline"])
    sign = 1 if base == "rule newline" else -1
    found = worse if worse["difference"] else next(line for line in lines if line["difference"])
    assert float(found["difference"]) == pytest.approx(sign * differences.mean())
    assert float(found["low"]) < float(found["difference"]) < float(found["high"])
    text = (directory / "report.html").read_text()
    assert "means over the seeds" in text and "Paired by seed" in text
    assert r"\textbf{" in (directory / "comparison.tex").read_text()
    assert len(list(csv.DictReader((directory / "sweep.csv").open()))) == 6 * 2 * 5


def test_collect_over_another_field_and_none(seeded, capsys):
    directory, _ = seeded
    collect.collect(str(directory), over="segments.rule", baseline="seed 2")
    printed = capsys.readouterr().out
    assert re.search(r"^seed 1 +2 ", printed, re.MULTILINE) and "against seed 2:" in printed
    collect.collect(str(directory), over="")
    assert re.search(r"^seed 1, rule newline +1 ", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(
        UserError, match=r"--over=model.width: the points vary in seed, segments.rule"
    ):
        collect.collect(str(directory), over="model.width")
    with pytest.raises(UserError, match="--baseline=x is none of what is compared"):
        collect.collect(str(directory), baseline="x")


def test_collect_sets_no_other_targets_side_by_side(seeded, capsys):
    directory, held = seeded
    content = json.loads(Path(held[4].job.workdir, "evaluation.json").read_text())
    content["targets"][0]["targets"] = "other"
    Path(held[4].job.workdir, "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="scored other targets of 'Plays'"):
        collect.collect(str(directory))
    assert "Plays, 32" not in capsys.readouterr().out
    assert os.path.exists(directory / "sweep.csv")
    assert not os.path.exists(directory / "comparison.csv")
    assert not os.path.exists(directory / "report.html")


def test_collect_refuses_what_is_no_sweep(tmp_path):
    for path, says in (("none", "No such file"), (".", "no directory in it is a point")):
        with pytest.raises(UserError, match=says):
            sweep.main([f"--collect={tmp_path / path}"])
    with pytest.raises(UserError, match="--output is needed"):
        sweep.main(["--collect"])
