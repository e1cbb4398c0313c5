"""Reports: every number is on the page, the page is one well-formed file, and wrong input is named."""

import base64
import copy
import csv
import dataclasses
import html.parser
import io
import json
import math
import re
import xml.etree.ElementTree

import pytest
from drawn import box

from bipe_jax.errors import UserError
from bipe_jax.report import page as report
from bipe_jax.report import results

LENGTHS = (64, 128, 1024)
HEAD = {
    "step": 12345,
    "training_length": 64,
    "position": {
        "absolute": [["learned", "offset"]],
        "relative": [["alibi", "segment", ["slope_scale", 96.0]]],
    },
    "segment_rule": "sentence",
    "data": "books/*.jsonl",
}


DOCUMENTS = 20


def evaluation(seed=0, sets=("Plays", "Code")):
    """Of 20 documents with 64 targets each, whose losses differ alike in all evaluations."""
    rows, breakdowns, unseen = [], [], []
    for s, name in enumerate(sets):
        for n in LENGTHS:
            base = 10 + seed + 7 * s + math.log2(n)
            rows.append({
                "set": name, "length": n, "perplexity": base * 3.217, "perplexity_error": base / 9,
                "loss": math.log(base), "loss_error": 0.01, "bits_per_byte": base / 11.3,
                "tokens": 64 * DOCUMENTS, "documents": DOCUMENTS, "documents_of_set": 27 + s,
                "segment_tokens_mean": base / 1.7, "segment_tokens_p99": 44.0 + n,
                "segments_per_block": n / 9.1, "segment_max": n // 8,
                "document_losses": [
                    64 * (math.log(base * 3.217) + i / 50 - 0.19) for i in range(DOCUMENTS)
                ],
            })  # fmt: skip
            for by in ("position", "offset", "segment"):
                bins = [
                    {"from": a, "to": 2 * a, "loss": 4 + a / (90 + seed), "tokens": 50 * a + 1}
                    for a in (0, 1, 3, 7, 15)
                ]
                breakdowns.append({"set": name, "length": n, "by": by, "bins": bins})
                unseen.append({
                    "set": name, "length": n, "coordinate": by, "trained_max": 63,
                    "max": n - 1, "share": 1 - 64 / n,
                })  # fmt: skip
    return {
        "kind": "perplexity", "name": "x", **HEAD, "protocol": "same-tokens", "context": 1024,
        "tokenizer": "0123456789abcdef",
        "targets": [
            {"set": s, "targets": f"t{s}", "collection": f"c{s}", "tokens": [64] * DOCUMENTS,
             "documents": [f"d{i}" for i in range(DOCUMENTS)], "bytes": [256] * DOCUMENTS}
            for s in sets
        ],
        "bos_rule": "at a document's start", "results": rows, "breakdowns": breakdowns,
        "unseen": unseen,
    }  # fmt: skip


def tasks(seed=0):
    rows = [
        {
            "task": task,
            "length": n,
            "depth": depth,
            "accuracy": (k * 7 + seed) % 51 / 50,
            "samples": 50,
        }
        for k, (task, n, depth) in enumerate(
            (task, n, depth)
            for task, depths in (("passkey", (0.0, 0.5, 1.0)), ("tracking", (None,)))
            for n in LENGTHS
            for depth in depths
        )
    ]
    return {"kind": "tasks", "name": "x", **HEAD, "seed": 17, "results": rows}


def attention(seed=0):
    rows, heads, uniform = [], [], []
    for n in (64, 1024):
        bins = [(0, 0), (1, 1), (2, 3), (4, 7)]
        for layer in range(2):
            for head in range(3):
                for by in ("segment", "position"):
                    weights = [1 + layer, 2 + head, 3 + seed, 4 + n // 64]
                    rows.append({"length": n, "by": by, "layer": layer, "head": head, "bins": [
                        {"from": a, "to": b, "weight": w / sum(weights)}
                        for (a, b), w in zip(bins, weights, strict=True)
                    ]})  # fmt: skip
                heads.append({
                    "length": n, "layer": layer, "head": head, "entropy": 1.25 + head,
                    "first": 0.125 * layer,
                })  # fmt: skip
        for by in ("segment", "position"):
            uniform.append({"length": n, "by": by, "bins": [
                {"from": a, "to": b, "weight": 0.25} for a, b in bins
            ]})  # fmt: skip
    return {
        "kind": "attention", "name": "x", **HEAD, "documents": 3, "results": rows, "heads": heads,
        "uniform": uniform,
    }  # fmt: skip


def save(path, **files) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name, held in files.items():
        (path / f"{name}.json").write_text(json.dumps(held))
    return str(path)


@pytest.fixture
def three(tmp_path):
    return [
        save(
            tmp_path / name,
            evaluation=evaluation(seed),
            tasks=tasks(seed),
            attention=attention(seed),
        )
        for seed, name in enumerate(("rope", "alibi", "bipe"))
    ]


class Page(html.parser.HTMLParser):
    """Tags must be closed in order. Keeps the cells of tables, texts of SVG, and all pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.tables, self.titles = [], [], [], [], []
        self.labels, self.anchors, self.ids = [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        assert text.count("<svg") == len(pictures) > 0
        self.pictures = [xml.etree.ElementTree.fromstring(picture) for picture in pictures]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        assert not {"src", "style", "xlink:href", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        if "href" in attributes:
            self.anchors.append(attributes["href"])
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "svg":
            assert attributes.get("aria-label") or attributes["aria-hidden"] == "true"
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] == "title" and "svg" in self.open:
            self.titles.append(data)
        elif self.open and self.open[-1] == "text":
            self.labels.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def row(self, *begins):
        """The one row of any table whose first cells are these."""
        found = [r for t in self.tables for r in t if tuple(r[: len(begins)]) == begins]
        assert len(found) == 1, (begins, found)
        return found[0][len(begins) :]


def numbers(row):
    return [
        f"{row['perplexity']:,.2f} ± {row['perplexity_error']:,.2f}",
        f"{row['loss']:.4f}",
        f"{row['bits_per_byte']:.4f}",
        f"{row['tokens']:,}",
        f"{row['documents']}",
        f"{row['documents_of_set']}",
        f"{row['segment_tokens_mean']:.1f}",
        f"{row['segment_tokens_p99']:,.0f}",
        f"{row['segments_per_block']:.1f}",
        f"{row['segment_max']}",
    ]


def test_one_run(three):
    page = Page(report.build(three[:1]))
    words = " ".join(page.words)
    assert "Evaluation of rope" in words
    for fact in ("12,345", "64 tokens", "learned of offset + alibi of segment (slope_scale 96.0)",
                 "sentence", "books/*.jsonl", "same-tokens", "at a document's start", "17"):  # fmt: skip
        assert fact in page.words
    for row in (held := evaluation())["results"]:
        assert page.row(row["set"], f"{row['length']:,}") == numbers(row)
        assert f"rope, {row['length']:,} tokens: {numbers(row)[0]}" in page.titles
    for part in held["breakdowns"]:
        for b in part["bins"]:
            span = f"{b['from']}" if b["from"] == b["to"] else f"{b['from']}–{b['to']}"
            assert (
                f"rope, {part['length']:,} tokens, {part['by']} {span}: {b['loss']:.4f} nats, "
                f"{b['tokens']:,} tokens"
            ) in page.titles
    for name in ("Plays", "Code"):
        for by in ("position", "offset", "segment"):
            assert page.row(name, by) == ["63", "0.0% to 63", "50.0% to 127", "93.8% to 1,023"]
    assert page.labels.count("trained to 64") == 2 and "trained to 63" not in page.labels
    for row in tasks()["results"]:
        depth = "all" if row["depth"] is None else f"{row['depth']:.0%}"
        title = f"rope, {row['length']:,} tokens, depth {depth}: {row['accuracy']:.1%} of 50"
        assert title in page.titles
        assert f"{100 * row['accuracy']:g}" in page.labels
    for row in attention()["results"]:
        assert (
            f"layer {row['layer']}, head {row['head']}\n0: {row['bins'][0]['weight']:.1%}\n"
            f"1: {row['bins'][1]['weight']:.1%}\n2–3: {row['bins'][2]['weight']:.1%}\n"
            f"4–7: {row['bins'][3]['weight']:.1%}"
        ).replace("\n", "↵\n") in page.titles
    assert {"1.2", "2.2", "3.2", "0.0", "12.5"} <= set(page.labels)
    mean = sum(r["bins"][3]["weight"] for r in attention()["results"] if r["length"] == 1024) / 12
    assert f"1,024 tokens, distance 4–7: {mean:.2%}" in page.titles


def test_three_runs(three):
    page = Page(report.build(three))
    assert "Comparison of rope, alibi, bipe" in page.words
    for seed, name in enumerate(("rope", "alibi", "bipe")):
        for row in (held := evaluation(seed))["results"]:
            assert page.row(name, row["set"], f"{row['length']:,}") == numbers(row)
        for s in ("Plays", "Code"):
            of_set = [numbers(row)[0] for row in held["results"] if row["set"] == s]
            assert [name, *of_set] in [row for table in page.tables for row in table]
            assert page.row(name, s, "segment")[0] == "63"
            assert (
                f"{name}, 64 tokens, offset 7–14: {4 + 7 / (90 + seed):.4f} nats, 351 tokens"
                in (page.titles)
            )
        some = [r for r in tasks(seed)["results"] if (r["task"], r["length"]) == ("passkey", 128)]
        mean = sum(row["accuracy"] for row in some) / 3
        assert f"{name}, 128 tokens: {mean:.1%}" in page.titles
        assert page.words.count(name) >= 5
    text = report.build(three)
    best = re.findall(r'<span class="best">(.*?)</span>', text)
    assert best == [numbers(row)[0] for row in evaluation(0)["results"]]  # the lowest
    assert "cannot be compared" not in text


@pytest.mark.parametrize("count", [1, 3])
def test_the_page_is_one_file_for_light_and_dark(three, count):
    text = report.build(three[:count])
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(page.tags)
    # What can be downloaded is in the page.
    loaded = re.sub(r'<a download="[^"]+" href="data:[a-z+/]+;base64,[^"]+">', "", text)
    assert not re.search(r"(?i)[a-z]+://|url\(|@import|javascript:|data:", loaded)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    anchors = [anchor for anchor in page.anchors if not anchor.startswith("data:")]
    assert anchors == [f"#{name}" for name in page.ids] and len(page.ids) == 5
    # Whatever colour is used is defined, for both.
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
    assert set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark))
    defined = set(re.findall(r"(--\w+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= defined
    style = text[text.index("box-sizing") : text.index("</style>")]
    assert not re.search(r"#[0-9a-f]{3}|rgb", style)
    # Nothing is drawn outside of its picture.
    for picture in page.pictures:
        left, top, width, height = map(float, picture.get("viewBox").split())
        for node in picture.iter():
            for low, size, names in ((left, width, ("x", "x1", "x2", "cx")),
                                     (top, height, ("y", "y1", "y2", "cy"))):  # fmt: skip
                for name in names:
                    if node.get(name):
                        assert low <= float(node.get(name)) <= low + size
            if node.tag == "path" and node.get("opacity") != "0" != node.get("fill-opacity"):
                across, down, right, bottom = box(node)
                assert left - 1 <= across <= right <= left + width + 1
                assert top - 1 <= down <= bottom <= top + height + 1
    assert "nan" not in text.replace("bilinear", "") and "inf " not in text


def test_each_panel_can_be_downloaded(three):
    """As a picture that is a file by itself, and as the numbers that it shows."""
    text = report.build(three[:1])
    files = {
        name: base64.b64decode(data).decode()
        for name, data in re.findall(r'<a download="([^"]+)" href="data:[^,]+,([^"]+)">', text)
    }
    assert len(files) == 2 * len(re.findall(r"<figure", text))
    for name in (name for name in files if name.endswith(".svg")):
        root = xml.etree.ElementTree.fromstring(files[name])
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in files[name]
        assert name.replace(".svg", ".csv") in files
    rows = list(csv.DictReader(io.StringIO(files["Plays-perplexity.csv"])))
    wanted = [row for row in evaluation()["results"] if row["set"] == "Plays"]
    for row, of_set in zip(rows, wanted, strict=True):
        assert float(row["length (tokens)"]) == of_set["length"]
        assert float(row["perplexity"]) == of_set["perplexity"]
        assert float(row["error"]) == of_set["perplexity_error"]
    rows = list(csv.reader(io.StringIO(files["rope-passkey-accuracy-by-depth-and-length.csv"])))
    assert rows[0][2:] == ["value", "cell"]
    assert any(row[3].startswith("rope, 128 tokens, depth") for row in rows[1:])


def test_text_of_others_is_escaped(tmp_path):
    bad = '<script>alert("1")</script>&\x1b{{ 6 * 7 }}$x_1$'
    held = evaluation(sets=(bad,))
    for part in held["breakdowns"][:1]:
        part["by"] = bad
    held |= {key: bad for key in ("segment_rule", "data", "protocol", "bos_rule")}
    held["position"] = {"absolute": [[bad, bad]], "relative": [[]]}
    held["unseen"][0]["coordinate"] = bad
    asked, seen = tasks(), attention()
    asked["seed"] = seen["data"] = asked["results"][0]["task"] = bad
    for row in seen["results"][:1]:
        row["by"] = bad
    runs = [
        save(tmp_path / f"<b>{i}&'", evaluation=held, tasks=asked, attention=seen) for i in (0, 1)
    ]
    for directories in (runs[:1], runs):
        text = report.build(directories)
        page = Page(text)
        assert "script" not in page.tags and "\x1b" not in text
        shown = bad.replace("\x1b", "\\x1b")
        assert sum(shown in word for word in page.words) > 10
        assert any("<b>0&'" in word for word in page.words)


def test_numbers_that_are_none(tmp_path):
    held = evaluation()
    held["results"][0]["perplexity_error"] = math.nan
    held["results"][1] |= {"perplexity": math.inf, "perplexity_error": math.nan, "loss": math.inf}
    held["results"][2] |= {"perplexity_error": None, "bits_per_byte": "much"}
    held["breakdowns"][0]["bins"][0] |= {"loss": None, "tokens": 0}
    held["breakdowns"][0]["bins"][1] |= {"loss": math.nan}
    path = save(tmp_path / "a", evaluation=held)
    page = Page(text := report.build([path]))
    assert page.row("Plays", "64")[0] == f"{held['results'][0]['perplexity']:.2f} ± –"
    assert page.row("Plays", "128")[:2] == ["∞ ± –", "∞"]
    assert page.row("Plays", "1,024")[0].endswith("± –") and page.row("Plays", "1,024")[2] == "–"
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text)
    for row in held["results"]:
        row |= {"perplexity": math.inf, "perplexity_error": math.nan}
    for part in held["breakdowns"]:
        part["bins"] = []
    assert "∞ ± –" in report.build([save(tmp_path / "b", evaluation=held)])


@pytest.mark.parametrize("file", ["evaluation", "tasks", "attention"])
def test_each_file_is_enough(tmp_path, file):
    made = {"evaluation": evaluation, "tasks": tasks, "attention": attention}[file]()
    for key in ("breakdowns", "unseen", "heads", "uniform", "position", "bos_rule", "seed"):
        made.pop(key, None)
    made["results"] = made["results"][:1]
    alone = save(tmp_path / "alone", **{file: made})
    other = save(tmp_path / "other", evaluation=evaluation())
    Page(report.build([alone]))
    Page(report.build([other, alone]))


def test_what_evaluate_writes_today_is_read(tmp_path):
    held = evaluation()
    for key in ("kind", "breakdowns", "unseen", "bos_rule"):
        del held[key]
    Page(report.build([save(tmp_path / "a", evaluation=held)]))


def test_runs_of_other_training_lengths_are_told_apart(tmp_path):
    one, other = evaluation(), evaluation() | {"training_length": 128}
    paths = [
        save(tmp_path / "x" / "run", evaluation=one),
        save(tmp_path / "y/run", evaluation=other),
    ]
    page = Page(report.build(paths))
    assert page.tables[0] == [
        ["run", "Training length"],
        [f" {paths[0]}", "64 tokens"],
        [f" {paths[1]}", "128 tokens"],
    ]
    assert {"trained to 64", "trained to 128"} <= set(page.labels)


def test_wrong_input_is_refused_by_name(tmp_path, three):
    good = evaluation()

    def broken(change):
        held = copy.deepcopy(good)
        change(held)
        return held

    bad_weights = attention()
    bad_weights["results"][1]["bins"][0]["weight"] = 1.5
    cases = {
        "none of evaluation.json, tasks.json, attention.json: evaluate": {},
        "evaluation.json: results is empty": {"evaluation": good | {"results": []}},
        "tasks.json must be of the kind 'tasks', and is 'perplexity'": {"tasks": good},
        "attention.json must be of the kind 'attention', and is something else": {"attention": [1]},
        "evaluation.json: results is missing": {"evaluation": {"training_length": 1}},
        "evaluation.json: results must be a list": {"evaluation": good | {"results": 3}},
        r"evaluation.json: results\[1\] must be an object": {
            "evaluation": broken(lambda h: h["results"].insert(1, 5))
        },
        r"evaluation.json: results\[2\].perplexity must be a number, and is 'x'": {
            "evaluation": broken(lambda h: h["results"][2].update(perplexity="x"))
        },
        r"evaluation.json: breakdowns\[0\].bins\[1\].to is missing": {
            "evaluation": broken(lambda h: h["breakdowns"][0]["bins"][1].pop("to"))
        },
        "evaluation.json: training_length must be a whole number above 0, and is True": {
            "evaluation": good | {"training_length": True}
        },
        "evaluation.json: position.relative must be a list": {
            "evaluation": good | {"position": {"absolute": [], "relative": 4}}
        },
        r"attention.json: results\[1\].bins\[0\].weight must be a share .*, and is 1.5": {
            "attention": attention() | {"results": bad_weights["results"]}
        },
        r"tasks.json: results\[0\].accuracy must be a share .*, and is nan": {
            "tasks": tasks() | {"results": [tasks()["results"][0] | {"accuracy": math.nan}]}
        },
        r"evaluation.json: results\[0\].length must be a whole number above 0, and is 0": {
            "evaluation": broken(lambda h: h["results"][0].update(length=0))
        },
    }
    for number, (wanted, files) in enumerate(cases.items()):
        path = save(tmp_path / f"case{number}", **files)
        with pytest.raises(UserError, match=wanted) as info:
            report.build([three[0], path])
        assert "\n" not in str(info.value) and path in str(info.value)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tasks.json").write_text('{"kind": "tasks", ')
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "tasks.json").write_bytes(b"\xff\xfe\x00")
    for name in ("torn", "binary"):
        with pytest.raises(UserError, match=rf"{name}/tasks.json is not JSON: "):
            report.build([str(tmp_path / name)])
    with pytest.raises(UserError, match="none: no such directory"):
        report.build([str(tmp_path / "none")])
    with pytest.raises(UserError, match="rope is given twice"):
        report.build([three[0], three[0] + "/"])
    with pytest.raises(UserError, match="cannot be written: No such file"):
        report.write(three, str(tmp_path / "none" / "report.html"))


@pytest.mark.slow
def test_the_command(three, command, tmp_path):
    done = command("report", *three, f"--output={tmp_path}/page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text() == report.build(three)
    failed = command("report", str(tmp_path))
    assert failed.returncode == 1 and failed.stderr.startswith(f"error: {tmp_path} has none of ")
    assert len(failed.stderr.splitlines()) == 1


def test_results_are_typed_and_cannot_be_changed(three):
    run = results.read(three)[1]
    for row, wanted in zip(run.evaluation.results, evaluation(1)["results"], strict=True):
        assert all(
            getattr(row, name) == (tuple(value) if isinstance(value, list) else value)
            for name, value in wanted.items()
            if name != "loss_error"
        )
    part = run.evaluation.breakdowns[4]
    assert (part.set, part.by, part.bins[1].low, part.bins[1].high) == ("Plays", "offset", 1, 2)
    assert str(part.bins[0]) == "0" and str(part.bins[2]) == "3–6"
    assert run.attention.results[0].bins[0].weight == 1 / 12
    assert run.tasks.results[-1].depth is None
    for part in (run, run.evaluation, run.evaluation.results[0], run.tasks, run.attention.heads[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.name = "x"
    assert isinstance(run.evaluation.unseen, tuple)
