"""Comparisons of evaluations: refused where targets differ, paired, over seeds, and as tables."""

import copy
import csv
import io
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

import tests.report.test_report as made
from bipe_jax.errors import UserError
from bipe_jax.report import comparing, page, results, tables
from bipe_jax.report.comparing import BITS, PERPLEXITY, Group, alone


def evaluation(tmp_path, shift=0.0, noise=0.0, seed=0, **changes) -> results.Evaluation:
    """The losses of test_report's, shifted, with noise by document; and other changes."""
    content = copy.deepcopy(made.evaluation()) | changes
    generator = np.random.default_rng(seed)
    for row in content["results"]:
        losses = np.array(row["document_losses"]) + 64 * shift
        losses += 64 * noise * generator.normal(size=len(losses))
        row["document_losses"] = losses.tolist()
        row["loss"] = losses.sum() / (64 * len(losses))
        row["perplexity"] = math.exp(row["loss"])
        row["bits_per_byte"] = losses.sum() / (256 * len(losses)) / math.log(2)
    directory = tmp_path / str(len(list(tmp_path.iterdir())))
    return results.read_file(made.save(directory, evaluation=content), results.Evaluation)


def targets(**changes) -> list[dict]:
    return [of_set | changes for of_set in made.evaluation()["targets"]]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"targets": targets(targets="x")}, r"1,280 and 1,280 tokens"),
        ({"targets": targets(collection="x")}, "other documents"),
        ({"context": 2048}, "context 1024 and 2048"),
        ({"protocol": "sliding:8"}, "protocol same-tokens and sliding:8"),
        ({"tokenizer": "x", "context": 2048}, "context 1024 and 2048"),
        ({"tokenizer": "x", "targets": targets(collection="x")}, "other documents"),
    ],
)
def test_what_scored_other_targets_is_not_set_side_by_side(tmp_path, changes, why):
    groups = alone([("a", evaluation(tmp_path)), ("b", evaluation(tmp_path, **changes))])
    with pytest.raises(UserError, match=rf"a and b scored other targets of 'Code' \({why}\): "):
        comparing.measure(groups)
    assert comparing.measure(groups[:1]) is PERPLEXITY
    directories = [str(tmp_path / name) for name in "01"]
    with pytest.raises(UserError, match="scored other targets"):
        page.build(directories)


def test_evaluations_without_targets_are_named(tmp_path):
    groups = alone([("a", evaluation(tmp_path)), ("b", evaluation(tmp_path, targets=[]))])
    with pytest.raises(UserError, match=r"b: evaluation\.json does not say .* evaluate it again"):
        comparing.measure(groups)


def test_other_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    """Over the documents of both, of which each tokenizer's targets are other tokens."""
    other = targets(targets="x", tokens=[50] * 20, bytes=[250] * 20)
    for of_set in other:
        of_set["documents"] = [f"d{i}" for i in range(1, 21)]
    one, two = evaluation(tmp_path), evaluation(tmp_path, tokenizer="x", targets=other)
    groups = alone([("a", one), ("b", two)])
    assert comparing.measure(groups) is BITS
    found = comparing.difference(groups[1], groups[0], "Plays", 64, BITS)
    ours = np.array(one.row("Plays", 64).document_losses)[1:]  # documents 1 … 19
    theirs = np.array(two.row("Plays", 64).document_losses)[:19]
    wanted = theirs.sum() / (19 * 250) - ours.sum() / (19 * 256)
    assert found.mean == pytest.approx(wanted / math.log(2))
    text = page.build([str(tmp_path / name) for name in "01"])
    assert "different tokenizers" in text and "Plays: bits/byte" in text


def test_differences_are_paired_by_document(tmp_path):
    one, two = evaluation(tmp_path), evaluation(tmp_path, shift=0.02, noise=0.01)
    groups = alone([("a", one), ("b", two)])
    found = comparing.difference(groups[1], groups[0], "Code", 128, PERPLEXITY)
    per_document = [
        (theirs - ours) / 64
        for ours, theirs in zip(
            one.row("Code", 128).document_losses, two.row("Code", 128).document_losses, strict=True
        )
    ]
    error = np.std(per_document, ddof=1) / math.sqrt(20)
    assert found.mean == pytest.approx(np.mean(per_document))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert error < one.row("Code", 128).perplexity_error / one.row("Code", 128).perplexity / 5


def test_only_what_none_beats_is_bold(tmp_path):
    """a is best; b is worse by less than its interval; c is worse for certain."""
    groups = alone([
        ("a", evaluation(tmp_path)),
        ("b", evaluation(tmp_path, shift=0.001, noise=0.02, seed=3)),
        ("c", evaluation(tmp_path, shift=0.05, noise=0.02)),
    ])  # fmt: skip
    values = {g.name: g.value("Plays", 64, PERPLEXITY).value for g in groups}
    assert values["c"] > max(values["a"], values["b"])
    assert comparing.unbeaten(groups, "Plays", 64, PERPLEXITY) == {"a", "b"}
    assert comparing.unbeaten(groups, "Plays", 999, PERPLEXITY) == set()
    text = page.build([str(tmp_path / name) for name in "012"], names=["a", "b", "c"], baseline="a")
    parsed = made.Page(text)
    assert "Differences to a" in parsed.words
    rows = [row for table in parsed.tables for row in table]
    mean, interval, p = next(r[3:] for r in rows if r[:3] == ["c", "Plays", "64"] and "…" in r[4])
    found = comparing.against(groups, "a", PERPLEXITY)
    wanted = next(c for c in found if (c.name, c.set, c.length) == ("c", "Plays", 64))
    assert mean == f"{wanted.difference.mean:+.4f}" and p == f"{wanted.p:.4f}"
    assert interval == f"{wanted.difference.low:+.4f} … {wanted.difference.high:+.4f}"
    assert len(found) == 2 * 2 * 3 and all(c.p >= c.difference.p for c in found)
    with pytest.raises(
        UserError, match="--baseline=x is none of what is compared: use one of a, b, c"
    ):
        comparing.against(groups, "x", PERPLEXITY)


def seeds(tmp_path, shift: float, count: int = 3) -> dict[str, results.Evaluation]:
    """Runs of several seeds, which all encodings have in common a good or a bad draw of."""
    of_seed = (0.1, -0.08, 0.02, 0.0)
    return {
        f"seed {i}": evaluation(tmp_path, shift=shift * (1 + i / 5) + of_seed[i])
        for i in range(count)
    }


def test_seeds_are_averaged_and_their_differences_paired(tmp_path):
    groups = [Group("rope", seeds(tmp_path, 0.03)), Group("bipe", seeds(tmp_path, 0.0))]
    rows = [run.row("Plays", 64) for run in groups[0].runs.values()]
    losses = [math.log(row.perplexity) for row in rows]
    value = groups[0].value("Plays", 64, PERPLEXITY)
    half = stats.t.ppf(0.975, 2) * np.std(losses, ddof=1) / math.sqrt(3)
    assert value.value == pytest.approx(math.exp(np.mean(losses)))
    assert value.error == pytest.approx(value.value * half)
    assert value.each == tuple(row.perplexity for row in rows)
    found = comparing.difference(*groups, "Plays", 64, PERPLEXITY)
    differences = [0.03, 0.036, 0.042]
    test = stats.ttest_1samp(differences, 0)
    assert found.mean == pytest.approx(0.036) and found.p == pytest.approx(test.pvalue)
    assert found.is_certain and half > 0.1  # though the seeds differ by more
    assert comparing.unbeaten(groups, "Plays", 64, PERPLEXITY) == {"bipe"}


def test_a_group_is_compared_where_all_of_it_was_evaluated(tmp_path):
    runs = seeds(tmp_path, 0.0, 2)
    shorter = copy.deepcopy(made.evaluation())
    shorter["results"] = [row for row in shorter["results"] if row["length"] != 1024]
    runs["seed 9"] = results.read_file(
        made.save(tmp_path / "shorter", evaluation=shorter), results.Evaluation
    )
    group = Group("x", runs)
    assert group.lengths("Plays") == [64, 128]
    assert group.value("Plays", 1024, PERPLEXITY) is None


def test_tables_as_csv_and_latex(tmp_path):
    groups = alone([
        ("50 %_a", evaluation(tmp_path)), ("b", evaluation(tmp_path, shift=0.05, noise=0.01)),
    ])  # fmt: skip
    lines = list(csv.DictReader(io.StringIO(tables.of_format(groups, ".csv", "50 %_a"))))
    assert len(lines) == 2 * 2 * 3
    for line in lines:
        group = next(g for g in groups if g.name == line["run"])
        row = group.first.row(line["set"], int(line["length"]))
        assert float(line["perplexity"]) == row.perplexity
        assert float(line["error"]) == row.perplexity_error
        assert line["unbeaten"] == ("1" if line["run"] == "50 %_a" else "0")
        assert bool(line["difference"]) == (line["run"] == "b")
    text = tables.of_format(groups, ".tex", "50 %_a")
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    assert r"50 \%\_a & \textbf{" in body and body.count(r"\textbf{") == 6
    assert body.count(r"\rlap{*}") == 6  # b is worse for certain
    for row in body.splitlines()[1:-1]:
        assert row.count(" & ") == 6 and row.endswith(r" \\")
    assert re.search(r"\\multicolumn\{3\}\{c\}\{Plays\} & \\multicolumn\{3\}\{c\}\{Code\}", text)
    assert r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}" in text


def test_lists_of_documents_must_match(tmp_path):
    content = made.evaluation()
    content["results"][0]["document_losses"].pop()
    with pytest.raises(UserError, match=r"results\[0\]\.document_losses must have one of each doc"):
        results.read_file(made.save(tmp_path / "a", evaluation=content), results.Evaluation)
    content = made.evaluation()
    content["targets"][1]["bytes"].pop()
    with pytest.raises(
        UserError, match=r"targets\[1\] must have tokens and bytes of each document"
    ):
        results.read_file(made.save(tmp_path / "b", evaluation=content), results.Evaluation)


def test_the_commands(tmp_path, command):
    """report --baseline --output=.tex, and plot --names --width --ratio."""
    paths = []
    for i, shift in enumerate((0.0, 0.1)):
        evaluation(tmp_path, shift=shift)
        paths.append(str(tmp_path / str(i)))
    out = tmp_path / "table.tex"
    done = command("report", *paths, "--names=A|B", "--baseline=A", f"--output={out}")
    assert done.returncode == 0, done.stderr
    assert r"\toprule" in out.read_text() and r"A & \textbf{" in out.read_text()
    picture = tmp_path / "picture.svg"
    done = command("plot", *paths, "--names=A|B", "--width=6.75", "--ratio", f"--output={picture}")
    assert done.returncode == 0, done.stderr
    text = picture.read_text()
    width = re.search(r'width="([\d.]+)pt"', text)
    assert float(width[1]) == pytest.approx(6.75 * 72, abs=0.1)
    assert "length / training length" in text and "targets Plays=tPlays" in text
    failed = command("plot", *paths, "--names=A", f"--output={picture}")
    assert failed.returncode == 1 and "1 names for 2 runs" in failed.stderr
    content = json.loads((tmp_path / "1" / "evaluation.json").read_text()) | {"context": 7}
    (tmp_path / "1" / "evaluation.json").write_text(json.dumps(content))
    failed = command("plot", *paths, f"--output={tmp_path}/x.png")
    assert failed.returncode == 1 and "scored other targets" in failed.stderr
    assert not (tmp_path / "x.png").exists()
