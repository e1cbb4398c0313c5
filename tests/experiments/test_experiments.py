"""Experiments: their points are valid, their numbers are those of SciPy, and a kill changes no table."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from scipy import stats

from bipe_jax import plan, synthetic
from bipe_jax.config import file
from bipe_jax.errors import UserError
from bipe_jax.evaluation import ending
from bipe_jax.experiments import bi_nfa, extension, files, registry, runner, store, text
from bipe_jax.experiments.experiment import Arm, Cell, Evaluation, encodings
from bipe_jax.experiments.outcomes import Key, Measure, Outcomes
from bipe_jax.experiments.points import point_name, stages


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_points_are_configs_that_can_be_trained_and_evaluated(name):
    experiment = registry.EXPERIMENTS[name]
    for size in experiment.seeds:
        made_points = [p for stage in stages(experiment, size, 1, "out") for p in stage]
        assert len({point.name for point in made_points}) == len(made_points)
        assert len({point.identity for point in made_points}) == len(made_points)
        distinct = {
            (p.overrides.get("data.train"), p.overrides.get("model.vocab_size")): p
            for p in made_points[::-1]
        }
        for point in distinct.values():
            config = file.load(f"{ROOT}/{experiment.config}:{size}")
            for key, value in point.overrides.items():
                *path, last = key.split(".")
                inner = config
                for part in path:
                    inner = inner[part]
                inner[last] = value
            made = plan.make(config)
            ending.of(made)
            if made.training.sources[0].kind != "synthetic":
                continue
            task = synthetic.parse(made.training.sources[0].path)
            assert made.model.vocab_size == 3 + len(task.words)
            # What is trained on fits into a row.
            longest = max(len(task.example(i)["text"].split()) + 2 for i in range(5))
            assert longest <= made.sequence_length + 1, (point.name, longest)
        try:
            sample = next(experiment.samples())
        except UserError as error:
            if "install" not in str(error):
                raise
            pytest.skip(str(error))
        assert json.loads(json.dumps(sample)) == sample


def outcomes() -> Outcomes:
    """Three arms at two places; the last arm lacks a seed."""
    random = np.random.RandomState(0)
    key = Key("share", "all", 8.0), Key("share", "all", 16.0)
    values = {
        arm: {k: {s: (int(random.randint(20, 80)), 100) for s in range(seeds)} for k in key}
        for arm, seeds in (("a", 4), ("b", 4), ("c", 3))
    }
    return Outcomes(["a", "b", "c", "not begun"], values)


def test_means_and_differences_are_scipys():
    made = outcomes()
    rows = {(row.arm, row.key.x): row for row in made.rows()}
    assert {arm for arm, _ in rows} == {"a", "b", "c"}
    ps = {}
    for (arm, x), row in rows.items():
        own = np.array(list(row.values.values()))
        interval = stats.t.interval(0.95, len(own) - 1, own.mean(), stats.sem(own))
        assert (row.mean.mean, row.mean.low, row.mean.high) == pytest.approx(
            (own.mean(), *np.clip(interval, 0, 1))
        )
        if arm != "a":
            first = np.array(list(rows["a", x].values.values()))[: len(own)]
            test = stats.ttest_rel(own, first)
            assert row.difference.mean == pytest.approx((own - first).mean())
            ps[arm, x] = test.pvalue
    # Holm's correction over all differences of the measure and condition, by hand.
    order, largest = sorted(ps, key=ps.get), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, ps[place] * (len(ps) - rank)))
        assert rows[place].difference.p == pytest.approx(largest)


def test_one_seed_has_wilsons_interval_over_examples():
    made = Outcomes(["a"], {"a": {Key("share", "", 1.0): {0: (30, 40)}}})
    wanted = stats.binomtest(30, 40).proportion_ci(0.95, method="wilson")
    assert made.mean("a", "share", "", 1.0)[:3] == pytest.approx((0.75, wanted.low, wanted.high))


def test_files_have_predictions_beside_outcomes_and_the_same_numbers(tmp_path):
    experiment = registry.find("fold")
    values = {
        arm: {
            Key("whole chain right", "all chains", float(x)): {
                seed: (right + seed, 20) for seed in range(3)
            }
            for x, right in zip((15, 30, 60), of_arm, strict=True)
        }
        for arm, of_arm in {"bipe_rope": (18, 17, 16), "rope": (18, 9, 1)}.items()
    }
    made = Outcomes(["bipe_rope", "rope", "nope"], values)
    written = files.write(experiment, "laptop", made, str(tmp_path), {"commit": "abc"})
    assert {p.name for p in tmp_path.iterdir()} == set(written)
    result = json.loads((tmp_path / "results.json").read_text())
    (prediction,) = result["predictions"]
    assert prediction["as_predicted"] is True and "rope 10.0%" in prediction["outcome"]
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    by = {(row["arm"], float(row["x"])): row for row in rows}
    assert float(by["rope", 60]["mean"]) == pytest.approx(0.1)
    assert float(by["rope", 60]["difference"]) == pytest.approx(-0.75)
    page = (tmp_path / "report.html").read_text()
    assert "over 10 points more chains right than RoPE" in page and "<svg" in page
    latex = (tmp_path / "table.tex").read_text()
    assert (
        latex.count(r"\toprule") == 1 and "bipe\\_rope & 95.0" in latex and "nope & -- &" in latex
    )


def test_cells_are_of_the_last_outer_set_and_all_inner_sets():
    def item(segments, last, inner):
        groups = {"outer": {"right": 1, "total": segments, "last": last},
                  "inner": {"right": inner, "total": 30}, "accept": {"last": False}}  # fmt: skip
        return {"labels": {"segments": segments}, "groups": groups}

    result = {
        "results": [
            {
                "source": "synthetic:bi-nfa(segments=8)",
                "items": [item(8, True, 30), item(8, False, 29)],
            },
            {"source": "synthetic:bi-nfa(segments=8, letters=12:24)", "items": [item(8, True, 3)]},
        ]
    }
    cells = bi_nfa.cells({"answers.json": result})
    usual = "segments of 4 to 12 letters"
    assert Cell("outer set after the last segment", usual, 8, True, 1) in cells
    assert Cell("outer set after the last segment", usual, 8, False, 1) in cells
    assert Cell("inner sets, all of a string", usual, 8, False, 1) in cells
    assert Cell("inner sets, all of a string", "segments of 12 to 24 letters", 8, False, 1) in cells
    # Of strings with as many letters in all, those of 8 segments are the usual ones.
    places = ((8, "4:12"), (4, "8:24"), (1, "32:96"), (4, "4:12"), (4, "12:24"))
    results = [
        {"source": f"synthetic:bi-nfa(segments={k}, letters={of})", "items": [item(k, True, 3)]}
        for k, of in places
    ]
    outer = [
        cell
        for cell in bi_nfa.cells({"answers.json": {"results": results}})
        if cell.measure == "outer set after the last segment"
    ]
    assert [cell.x for cell in outer if cell.condition.startswith("64 letters")] == [8, 4, 1]
    assert [cell.x for cell in outer if cell.condition == usual] == [8, 4]


def test_a_page_says_how_machines_forget_and_what_guessing_scores():
    facts = registry.find("bi-nfa-group").facts("laptop", [0, 3])
    assert [name for name, _ in facts] == ["Machine of seed 0", "Machine of seed 3"]
    assert all("after 65 segments" in text and "100% not within 64" in text for _, text in facts)
    shares = [int(re.search(r"right for (\d+)%", text)[1]) for _, text in facts]
    assert all(10 <= share <= 45 for share in shares)  # each of 4 states is as frequent
    assert registry.find("bi-nfa-width").facts("laptop", [0]) == ()


def test_wrong_names_and_flags_are_one_line(command, tmp_path):
    with pytest.raises(UserError, match="did you mean 'fold'"):
        registry.find("folds")
    done = command("experiments", "fold", "--samples=2")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert json.loads(done.stdout.splitlines()[0])["operators"] >= 1
    done = command("experiments", "fold")
    assert done.returncode == 1 and done.stderr.strip() == "error: --output=DIR is needed"
    assert point_name("bipe_rope, width 48", 2) == "bipe_rope-width-48-seed2"
    fold = registry.find("fold")
    points = stages(fold, "quick", 1, str(tmp_path))
    read = runner.read(fold, "quick", points, str(tmp_path))
    assert not any(read.values.values())
    kept = tmp_path / "results" / "bipe_rope-seed0.json"
    kept.parent.mkdir()
    for wrong, message in {
        "[]": "must hold a JSON object",
        '{"identity": ': "JSON",
        '{"identity": "0"}': "is of another config or size",
    }.items():
        kept.write_text(wrong)
        with pytest.raises(UserError, match=rf"bipe_rope-seed0\.json.*{message}"):
            runner.read(fold, "quick", points, str(tmp_path))


def test_values_are_kept_and_points_that_others_start_from_come_first(tmp_path, monkeypatch):
    """The trainings are counted: kept values are not made again, a base without its checkpoint is."""
    (of_rope,) = encodings("rope")
    longer = Evaluation("longer", "bipe_jax.evaluate", ("--extend=ntk:2",))
    arms = [
        of_rope,
        Arm("tuned", {"optimizer.learning_rate": 1e-4}, after="rope"),
        Arm("tuned twice", {"optimizer.learning_rate": 1e-5}, after="tuned"),
        Arm("scaled", after="rope", evaluations=(longer,), trained=False),
    ]
    experiment = dataclasses.replace(
        registry.find("fold"),
        arms=lambda size: arms,
        cells=lambda files: [
            Cell("share", "", 1, sum(file["right"] for file in files.values()), 10)
            for _ in range(2)
        ],
    )
    output = str(tmp_path)

    def points():
        return stages(experiment, "quick", 1, output)

    first, second, third = points()
    assert [p.arm.name for p in (*first, *second, *third)] == [
        "rope", "tuned", "scaled", "tuned twice"
    ]  # fmt: skip
    assert second[0].overrides["initial_checkpoint"] == first[0].workdir == second[1].workdir
    swept, evaluated = [], []

    class Sweep:
        """Trains at once, and ends at the second time that it is waited for."""

        def __init__(self, line):
            assert "launch.sweep" in line
            listed = json.loads(Path(output, "sweep.json").read_text())
            swept.append([point["name"] for point in listed])
            self.points = [p for stage in points() for p in stage if p.name in swept[-1]]
            for point in self.points:
                Path(point.workdir, "checkpoints", "30", "params").mkdir(parents=True)
                Path(point.workdir, "answers.json").write_text('{"right": 3}')
                beat = {"time": 0.0, "step": 30, "phase": "done", "since": 0.0, "seconds": {}}
                Path(point.workdir, "heartbeat.json").write_text(json.dumps(beat))
            self.waits, self.new = 0, {p.name for p in self.points} - self.kept()

        def kept(self):
            return {path.stem for path in Path(output, "results").glob("*.json")}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self, seconds):
            self.waits += 1
            assert self.new & self.kept() == (self.new if self.waits > 1 else set())
            if self.waits == 1:
                raise subprocess.TimeoutExpired("launch.sweep", seconds)
            return 0

    def execute(line, **_):
        evaluated.append(line[2:])
        directory = line[4].removeprefix("--output=")
        Path(directory, "evaluation.json").write_text('{"right": 2}')
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner.subprocess, "run", execute)
    monkeypatch.setattr(runner.subprocess, "Popen", Sweep)
    assert runner.run(experiment, "quick", points(), output, ()) == 0
    assert swept == [["rope-seed0"], ["tuned-seed0"], ["tuned-twice-seed0"]]
    assert evaluated == [
        ["bipe_jax.evaluate", f"--checkpoint={first[0].workdir}",
         f"--output={output}/evaluations/scaled-seed0/longer", "--extend=ntk:2"]
    ]  # fmt: skip
    read = runner.read(experiment, "quick", points(), output)
    assert {arm: read.mean(arm, "share", "", 1).mean for arm in read.arms} == {
        "rope": 0.3, "tuned": 0.3, "tuned twice": 0.3, "scaled": 0.2
    }  # fmt: skip
    assert json.loads((tmp_path / "results" / "rope-seed0.json").read_text())["cells"] == [
        ["share", "", 1.0, 6.0, 20.0]
    ]

    # Values alone are enough, here in another directory, but what starts from a checkpoint needs it.
    for name in ("points", "evaluations"):
        shutil.rmtree(tmp_path / name)
    moved = output = str(tmp_path / "moved")
    Path(moved).mkdir()
    (tmp_path / "results").rename(f"{moved}/results")
    assert runner.run(experiment, "quick", points(), output, ()) == 0 and len(swept) == 3
    Path(moved, "results", "tuned-twice-seed0.json").unlink()
    assert runner.run(experiment, "quick", points(), output, ()) == 0
    assert swept[3:] == [["rope-seed0"], ["tuned-seed0"], ["tuned-twice-seed0"]]
    assert len(evaluated) == 1


def test_losses_of_other_targets_are_not_compared(tmp_path):
    experiment, output = registry.find("extension"), str(tmp_path)
    points = stages(experiment, "quick", 1, output)
    one, other = points[0][0], points[1][0]

    def keep(point, digest, tokenizer="t"):
        evaluation = {
            "kind": "perplexity",
            "tokenizer": tokenizer,
            "targets": [{"set": "Plays", "targets": digest}],
            "results": [
                {"set": "Plays", "length": 32, "loss": 2.0, "tokens": 10, "perplexity": 7.4}
            ],
        }
        files = {"evaluation.json": evaluation}
        store.write(output, point, experiment.cells(files), files)

    keep(one, "a")
    keep(other, "a")
    read = runner.read(experiment, "quick", points, output)
    assert read.mean(one.arm.name, text.LOSS, "Plays", 32).mean == 2.0
    for digest, tokenizer in (("b", "t"), ("a", "another")):
        keep(other, digest, tokenizer)
        with pytest.raises(UserError, match=rf"{other.name}\.json and .*{one.name}\.json scored"):
            runner.read(experiment, "quick", points, output)


def test_facts_that_experiments_on_text_name_are_those_of_the_config():
    for size, length in text.LENGTHS.items():
        config = file.load(f"{ROOT}/{text.CONFIG}:{size}")
        assert config.sequence_length == length == config.evaluation.lengths[0]
        assert config.batch_size == extension._BATCHES[size]


def test_ranks_count_certain_differences_alone():
    key = Key("loss", "", 1.0)
    random = np.random.RandomState(1)
    noise = random.normal(size=(3, 8)) / 10
    shared = random.normal(size=8)
    values = {
        arm: {key: {s: (shared[s] + mean + noise[i, s], 1) for s in range(8)}}
        for i, (arm, mean) in enumerate({"a": 3.0, "b": 3.01, "c": 5.0}.items())
    }
    ps = {
        pair: stats.ttest_rel(*([v for v, _ in values[arm][key].values()] for arm in pair)).pvalue
        for pair in ("ab", "ac", "bc")
    }
    assert ps["ab"] > 0.05 > 3 * max(ps["ac"], ps["bc"])
    for lower, wanted in ((True, [(1, 2), (1, 2), (3, 3)]), (False, [(2, 3), (2, 3), (1, 1)])):
        made = Outcomes(list("abc"), values, {"loss": Measure("number", lower_is_better=lower)})
        assert [row.ranks for row in made.rows()] == wanted


@pytest.mark.parametrize(("family", "as_predicted"), [("total", True), ("group", False)])
def test_a_prediction_is_that_of_its_family(family, as_predicted):
    """Flat to 64 segments is what is predicted of machines that forget, and not of others."""
    measure, condition = "outer set after the last segment", "segments of 4 to 12 letters"
    values = {Key(measure, condition, float(x)): {0: (90, 100)} for x in (8, 64)}
    (flat,) = (p for p in registry.find(f"bi-nfa-{family}").predictions if "8 times" in p.text)
    made = Outcomes(["bipe_rope"], {"bipe_rope": values})
    assert flat.outcome(made)[1] is as_predicted
    assert flat.outcome(Outcomes(["bipe_rope"], {}))[1] is None


def test_of_many_arms_the_first_and_the_best_have_colours():
    names = [f"arm {i}" for i in range(12)]
    values = {
        name: {Key("loss", "", x): {0: (10 - i if x == 2 else i, 1)} for x in (1.0, 2.0)}
        for i, name in enumerate(names)
    }
    made = Outcomes(names, values, {"loss": Measure("number", lower_is_better=True)})
    styles = files._styles(made)
    coloured = [name for name in names if styles[name] != files.charts.OTHER]
    assert coloured == ["arm 0", *names[-len(coloured) + 1 :]] and len(coloured) > 5
    assert len({styles[name].name for name in coloured}) == len(coloured)


def test_intervals_of_shares_over_seeds_end_at_0_and_1():
    values = {Key(name, "", 1.0): {0: (1, 1), 1: (1, 10), 2: (1, 5)} for name in ("share", "loss")}
    made = Outcomes(["a"], {"a": values}, {"loss": Measure("number")})
    low, high = stats.t.interval(0.95, 2, np.mean([1, 0.1, 0.2]), stats.sem([1, 0.1, 0.2]))
    assert low < 0 and high > 1
    assert made.mean("a", "loss", "", 1.0)[1:3] == pytest.approx((low, high))
    assert made.mean("a", "share", "", 1.0)[1:3] == (0.0, 1.0)


def test_widths_are_compared_for_each_number_of_states():
    """The least width with 99 % of the outer sets right, of three encodings and two machines."""
    right = {
        ("bipe_rope", 3): (50, 99, 100), ("rope", 3): (50, 90, 99),
        ("bipe_rope", 4): (10, 20, 30), ("rope", 4): (10, 20, 30),
    }  # fmt: skip
    values = {
        f"{encoding}, {states} states, width {width}": {
            Key(bi_nfa.OUTER, bi_nfa.USUAL, 8.0): {0: (value, 100), 1: (value, 100)},
            Key(bi_nfa.OUTER, bi_nfa.USUAL, 16.0): {0: (100, 100)},
        }
        for (encoding, states), of in right.items()
        for width, value in zip((16, 32, 48), of, strict=True)
    }
    made = bi_nfa.by_width(Outcomes(list(values), values))
    assert made.arms == ["bipe_rope", "rope"]
    assert [(k.condition, k.x) for k in made.keys] == [
        (f"{states} states, 8 segments", width) for states in (3, 4) for width in (16, 32, 48)
    ]
    least = bi_nfa.least_widths(made)
    assert {(arm, condition[0]): width for (arm, condition), width in least.items()} == {
        ("bipe_rope", "3"): 32, ("rope", "3"): 48, ("bipe_rope", "4"): None, ("rope", "4"): None
    }  # fmt: skip
    (prediction,) = bi_nfa.WIDTHS.predictions
    assert prediction.outcome(made)[1] is True
