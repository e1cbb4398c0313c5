"""Inspection: what is counted against plain loops, and what is shown against the text itself."""

import collections
import html.parser
import itertools
import json
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from bipe_jax import segments
from bipe_jax.config import fields
from bipe_jax.config.spec import parse_source
from bipe_jax.data import (
    inspect,
    packing,
    page,
    prepare,
    prepared,
    sample,
    survey,
    tokenizer,
)
from bipe_jax.errors import UserError

RULES = "sentence,newline,fixed:16"


@pytest.fixture(scope="module")
def model(tokenizer_file):
    return tokenizer.load(tokenizer_file)


@pytest.fixture(scope="module")
def rules(model):
    return inspect.rules_of(RULES, model.pieces())


def write(path, documents) -> str:
    """One shard of (set, text) pairs."""
    lines = (json.dumps({"text": t, "meta": {"pile_set_name": s}}) for s, t in documents)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def cut(tokens, rule) -> list[list[int]]:
    """Segments, token by token."""
    found = [[]]
    for token in tokens:
        full = len(found[-1]) == rule.length if rule.length else found[-1][-1:] and (
            found[-1][-1] in rule.separators
        )  # fmt: skip
        if full:
            found.append([])
        found[-1].append(int(token))
    return found


def counted(histogram) -> dict:
    return {n: c for n in range(histogram.max + 1) if (c := histogram.between(n, n))}


def test_histogram():
    generator = np.random.default_rng(0)
    histogram, values = survey.Histogram(), []
    for size in (3, 1, 200, 0, 51):
        some = generator.geometric(0.02, size)
        histogram.add(some)
        values += some.tolist()
    assert (histogram.total, histogram.max) == (len(values), max(values))
    assert histogram.mean == pytest.approx(statistics.mean(values))
    assert histogram.quantile(0.5) == statistics.median(values)
    assert histogram.quantile(0.99) == sorted(values)[252]  # 253 of 255 are 99 %
    assert (histogram.quantile(0), histogram.quantile(1)) == (min(values), max(values))
    assert histogram.between(10, 40) == sum(10 <= v <= 40 for v in values)
    assert counted(histogram) == collections.Counter(values)


@pytest.mark.parametrize("window", [1, 5000, 1 << 20])
@pytest.mark.parametrize("kind", fields.PACKINGS)
def test_statistics_of_text(tmp_path, monkeypatch, texts, model, rules, kind, window):
    monkeypatch.setattr(survey, "_WINDOW", window)
    documents = [("ab"[i % 3 == 0], text) for i, text in enumerate(texts)]
    source = write(tmp_path / "a.jsonl", documents)
    found = survey.of_text(parse_source(source), model, rules, kind=kind)
    assert (found.note, found.faults, found.whole) == ("", {}, True)
    assert list(found.sets) == ["a", "b"]  # the larger one first
    for name, got in found.sets.items():
        mine = [text for s, text in documents if s == name]
        encoded = [model.encode(text).tolist() for text in mine]
        assert got.documents == len(mine)
        assert got.text_bytes == sum(len(text.encode()) for text in mine)
        assert got.tokens == sum(map(len, encoded))
        assert counted(got.lengths) == collections.Counter(map(len, encoded))
        for rule_name, rule in rules.items():
            cuts = collections.Counter(len(s) for tokens in encoded for s in cut(tokens, rule))
            assert counted(got.segments[rule_name]) == cuts
            if kind == "concat":
                run = list(itertools.chain.from_iterable(encoded))
                blocks = [run[i : i + 1024] for i in range(0, len(run) - 1023, 1024)]
                numbers = collections.Counter(len(cut(block, rule)) for block in blocks)
                assert counted(got.per_block[rule_name]) == numbers
            elif window == 1 << 20:
                rows = {
                    "tokens": np.concatenate(encoded),
                    "document_ids": np.repeat(np.arange(len(mine)) + 1, [*map(len, encoded)]),
                }
                packed = getattr(packing, kind)(rows, 1024)
                pairs = zip(packed["tokens"], packed["document_ids"], strict=True)
                numbers = collections.Counter(len(cut(row[ids > 0], rule)) for row, ids in pairs)
                assert counted(got.per_block[rule_name]) == numbers


def test_long_documents_are_tokenised_in_parts_and_counted_whole(
    tmp_path, monkeypatch, model, rules
):
    text = "".join(f"Line {i} of one document. Yes!\n" for i in range(200))
    monkeypatch.setattr(tokenizer, "_PART", 500)
    source = write(tmp_path / "a.jsonl", [("a", text)])
    got = survey.of_text(parse_source(source), model, rules).sets["a"]
    assert got.documents == 1 and got.rows["tokens"].tolist().count(model.bos_id) == 1
    assert got.segments["newline"].total == text.count("\n")
    assert got.lengths.max == got.tokens > 200 * 5


def test_a_sample_is_of_all_shards_and_says_so(monkeypatch, shards, model, rules, texts):
    every = survey.of_text(parse_source(shards), model, rules)
    assert sum(s.documents for s in every.sets.values()) == len(texts)
    assert survey.of_text(parse_source(shards), model, rules, limit=len(texts)).note == ""
    few = survey.of_text(parse_source(shards), model, rules, limit=6)
    assert few.note == "a sample: the first 6 documents of up to 8 shards in turn"
    first = [model.encode(text) for text in texts[:6]]  # three of each of the two shards
    assert sum(s.tokens for s in few.sets.values()) == sum(map(len, first))
    monkeypatch.setattr(survey, "_SHARDS_AT_ONCE", 1)
    again = survey.of_text(parse_source(shards), model, rules)
    assert {n: s.tokens for n, s in again.sets.items()} == {
        n: s.tokens for n, s in every.sets.items()
    }
    only = survey.of_text(parse_source(shards), model, rules, sets=("b",))
    assert only.sets["b"].tokens == every.sets["b"].tokens and list(only.sets) == ["b"]


def test_what_is_bad_is_counted(tmp_path, model, rules):
    (tmp_path / "a.jsonl").write_text('{"text": "Good. Yes."}\nbad\n{"text": 3}\n')
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstd")
    (tmp_path / "c.jsonl").write_text("")
    found = survey.of_text(parse_source(f"{tmp_path}/*"), model, rules)
    assert found.faults == {
        "bad_lines": 2,
        "bad_lines/not_json": 1,
        "bad_lines/no_text": 1,
        "corrupt_frames": 1,
        "empty_shards": 1,
    }
    assert page.remarks(found)[-1] == (
        "Could not be used: bad lines: 2 (not JSON: 1, without text: 1), corrupt frames: 1, empty shards: 1."
    )
    (tmp_path / "a.jsonl").write_text("bad\n")
    with pytest.raises(UserError, match=r"holds no document \(bad_lines: 1, .*\)$"):
        survey.of_text(parse_source(f"{tmp_path}/*"), model, rules)


@pytest.mark.parametrize("kind", fields.PACKINGS)
def test_prepared_data(tmp_path, shards, tokenizer_file, model, rules, kind):
    prepare.prepare(shards, str(tmp_path / "p"), tokenizer_file, 60, packing=kind, workers=1)
    text = survey.of_text(parse_source(shards), model, rules)
    found = survey.of_prepared(parse_source(f"prepared:{tmp_path}/p"), rules)
    assert (found.note, found.block, found.whole) == ("", 60, False)
    assert list(found.sets) == list(text.sets)
    few = survey.of_prepared(parse_source(f"prepared:{tmp_path}/p#a"), rules, limit=7)
    assert list(few.sets) == ["a"] and few.note.startswith("a sample: 7 of ")
    assert few.sets["a"].per_block["newline"].total == 7
    for name, got in found.sets.items():
        same = text.sets[name]
        for field in ("documents", "text_bytes", "tokens"):
            assert getattr(got, field) == getattr(same, field)
        dataset = prepared.open_prepared(parse_source(f"prepared:{tmp_path}/p#{name}"))
        rows = dataset.read(np.arange(dataset.blocks))
        lengths, per_block = {r: [] for r in rules}, {r: [] for r in rules}
        parts = []
        for tokens, ids in zip(rows["tokens"][:, :60], rows["document_ids"][:, :60], strict=True):
            for number in range(1, ids.max() + 1):
                parts.append(int((ids == number).sum()))
            for rule_name, rule in rules.items():
                for number in range(1, ids.max() + 1):
                    lengths[rule_name] += map(len, cut(tokens[ids == number], rule))
                per_block[rule_name].append(len(cut(tokens[ids > 0], rule)))
        assert counted(got.lengths) == collections.Counter(parts)
        for rule_name in rules:
            assert counted(got.segments[rule_name]) == collections.Counter(lengths[rule_name])
            assert counted(got.per_block[rule_name]) == collections.Counter(per_block[rule_name])


HARD = (
    'A <script>alert("1")</script> & one. Two\x1b[31m red?\n\nThree \u202ebackwards.\t日本 \U0001f9f6!\n'
    "</div><!-- " + "so it goes on " * 20 + "\n"
)


@pytest.fixture(scope="module")
def hard(tmp_path_factory, model, rules):
    """(survey, tokens of the first set) of text that acts on pages and terminals."""
    path = tmp_path_factory.mktemp("hard") / "a.jsonl"
    source = write(path, [("<b>&", HARD), ("<b>&", HARD[::-1]), ("a\x1b[0m", "Hi. Ho.")])
    return survey.of_text(parse_source(source), model, rules)


def spelt(text: str) -> str:
    return text.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


@pytest.mark.parametrize("rule_name", RULES.split(","))
def test_text_on_the_terminal(hard, model, rules, rule_name):
    rule = rules[rule_name]
    block = sample.samples(hard.sets["<b>&"], rule, model, length=1000, count=1)[0]
    assert block.document_ids.max() == 2
    plain = sample.text_of(block, colour=False)
    assert not set(plain) & {"\x1b", "\u202e"}
    coloured = sample.text_of(block, colour=True)
    assert {"\033[36m", "\033[35m", "\033[2m"} <= set(re.findall(r"\033\[\d+m", coloured))
    # Without colours, the same but for the brackets of separators.
    stripped = re.sub(r"\033\[[0-9;]*m", "", coloured).replace("⟨BOS⟩", "BOS")
    assert stripped == plain.replace("⟨", "").replace("⟩", "")
    # Without marks, the text.
    border = re.compile(r"\n─+ document 2 of the block ─+\n")
    assert len(border.findall(plain)) == 1
    bare = border.sub("", plain).replace("⟨BOS⟩", "").replace("↵", "")
    bare = re.sub("⟦[0-9]+⟧|[₀-₉]|[⟨⟩]", "", bare)
    assert bare == spelt(HARD + HARD[::-1])
    # Between the marks, the segments.
    run = np.concatenate([model.encode(HARD), model.encode(HARD[::-1])])
    cuts = cut(run, rule)
    assert re.findall("⟦([0-9]+)⟧", plain) == [str(i) for i in range(len(cuts))]
    shown = re.split("⟦[0-9]+⟧", border.sub("", plain))[1:]
    for tokens, got in zip(cuts, shown, strict=True):
        offsets = re.findall("[₀-₉]+", got)
        wanted = range(16, len(tokens), 16)
        assert [int(o.translate(str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789"))) for o in offsets] == [
            *wanted
        ]
        if not rule.length:  # which cuts between the bytes of a character
            got = re.sub("[₀-₉]|[⟨⟩]|↵", "", got.replace("⟨BOS⟩", ""))
            assert got == spelt(model.decode(tokens))
    if not rule.length:
        ends = sum(int(token) in rule.separators for token in run)
        brackets = border.sub("", plain).replace("⟨BOS⟩", "")
        assert brackets.count("⟨") == ends
        # A bracket closes where the next segment, or nothing, begins.
        assert len(re.findall(r"⟩\n*(?=⟦|$)", brackets)) == ends


def test_samples_are_spread_and_hold_a_border(tmp_path, model, rules):
    texts = ["one two three. " * 300, "four five\n" * 300, "six! " * 300]
    source = write(tmp_path / "a.jsonl", [("a", text) for text in texts])
    got = survey.of_text(parse_source(source), model, rules).sets["a"]
    for count in (1, 2, 4):
        found = sample.samples(got, rules["newline"], model, length=64, count=count)
        assert len(found) == count
        assert sum(len(set(block.document_ids.tolist())) > 1 for block in found) >= 1
        assert all(len(block.texts) == 64 for block in found)
        starts = ["".join(block.texts) for block in found]
        assert len(set(starts)) == count
    short = sample.samples(got, rules["newline"], model, length=64, count=1, kind="document")[0]
    assert not any(text == "" for text in short.texts)


class Page(html.parser.HTMLParser):
    """Tags must be closed in order; keeps spans with titles, titles of bars, and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.spans, self.bars, self.words = [], set(), [], [], []
        self.blocks = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        assert not {"src", "style"} & set(attributes)
        assert "href" not in attributes or (tag == "a" and "download" in attributes)
        assert not any(name.startswith("on") for name in attributes)
        if tag != "meta":
            self.open.append(tag)
        if attributes.get("class") == "block":
            self.spans.append([])
        if tag == "span":
            self.spans[-1].append([attributes["title"], attributes["class"], ""])

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span":
            self.spans[-1][-1][2] += data
        elif self.open[-2:] == ["g", "title"]:
            self.bars.append(data)
        elif "style" not in self.open:
            self.words.append(data)


def rendered(found, model, rules, length=40, **facts) -> tuple[str, Page]:
    blocks = {
        (name, rule): sample.samples(found.sets[name], rules[rule], model, length=length, count=2)
        for name in found.sets
        for rule in rules
    }
    text = page.render(found, {"Data": "d", **facts}, blocks, model.pieces())
    return text, Page(text)


def test_the_page_is_one_file_and_escapes_what_it_shows(hard, model, rules):
    text, parsed = rendered(
        hard, model, rules, 1000, **{"Data": "<i>data</i>", "Tokenizer": "a&b\x1b"}
    )
    assert not parsed.tags & {"script", "link", "img", "iframe", "i", "object", "use", "image"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert not set(text) & {"\x1b", "\u202e"}
    words = " ".join(parsed.words)
    assert "Segments of <i>data</i>" in words and "a&b\\x1b" in words and "<b>&" in words
    shown = "".join(part for block in parsed.spans for _, _, part in block)
    assert '<script>alert("1")</script>' in shown and "日本" in shown and "\U0001f9f6" in shown


def test_the_page_has_the_coordinates_of_every_token(hard, model, rules):
    _, parsed = rendered(hard, model, rules, 1000)
    runs = [np.concatenate([model.encode(HARD), model.encode(HARD[::-1])]), model.encode("Hi. Ho.")]
    blocks = iter(parsed.spans)
    for run, rule in itertools.product(runs, rules.values()):
        wanted, at = [], 0
        for number, tokens in enumerate(cut(run, rule)):
            for offset, token in enumerate(tokens):
                ends = token in rule.separators or offset == rule.length - 1 > 0
                title = f"position {at} · segment {number} · offset {offset}"
                wanted.append([title, "eo"[number % 2] + " s" * ends])
                at += 1
        block = next(blocks)
        assert [span[:2] for span in block] == wanted
        text = "".join(span[2] for span in block).replace("⟨BOS⟩", "").replace("↵", "")
        assert text in (spelt(HARD + HARD[::-1]), "Hi. Ho.")
    assert next(blocks, None) is None


@pytest.mark.parametrize("source", ["shards", "hard"])
def test_bars_hold_everything_that_was_counted(request, source, model, rules):
    found = request.getfixturevalue(source)
    found = survey.of_text(parse_source(found), model, rules) if source == "shards" else found
    _, parsed = rendered(found, model, rules)
    counts = collections.defaultdict(list)
    pattern = re.compile(r"([\d,]+)(?:–([\d,]+))? (tokens|segments): ([\d,]+) (\w+) \(([\d.]+)%\)")
    for bar in parsed.bars:
        low, high, _, count, of, share = pattern.fullmatch(bar).groups()
        low, high, count = (int((n or low).replace(",", "")) for n in (low, high, count))
        counts[of].append((low, high, count, float(share)))
    totals = {
        "segments": [s.segments[r].total for r in rules for s in found.sets.values()],
        "documents": [s.documents for s in found.sets.values()],
    }
    for of, wanted in totals.items():
        rows = [[]]
        for bar in counts[of]:
            if rows[-1] and bar[0] <= rows[-1][-1][0]:
                rows.append([])
            rows[-1].append(bar)
        assert [sum(bar[2] for bar in row) for row in rows] == wanted
        for row in rows:
            assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(row))
            assert sum(bar[3] for bar in row) == pytest.approx(100, abs=0.1)
    assert bool(counts["blocks"]) == (source == "shards")


def test_rules_that_are_the_same_are_drawn_once(shards, model):
    both = inspect.rules_of("newline,newline-and-spaced-period", model.pieces())
    assert both["newline"] == both["newline-and-spaced-period"]
    found = survey.of_text(parse_source(shards), model, both)
    _, parsed = rendered(found, model, both)
    assert "newline, also newline-and-spaced-period" in parsed.words
    assert len(parsed.spans) == 2 * len(found.sets)
    assert page.remarks(found)[0].endswith("newline and newline-and-spaced-period are the same.")


def test_default_rules_that_a_tokenizer_cannot_keep_are_left_out(capsys):
    assert list(inspect.rules_of("", ["", "a", "."])) == ["sentence"]
    assert capsys.readouterr().err.count("Left out: segments.rule='newline") == 2
    with pytest.raises(UserError, match="'newline' finds no separator"):
        inspect.rules_of("newline", ["", "a", "."])
    with pytest.raises(UserError, match="use --rule=fixed:N"):
        inspect.rules_of("", ["", "a", "b"])


def test_wrong_arguments(tmp_path, monkeypatch, shards, tokenizer_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    for wanted, data, given in (
        ("no file matches", f"{tmp_path}/none*", {}),
        ("holds no document", f"{tmp_path}/empty.jsonl", {}),
        ("no document of the sets zz", shards, {"sets": ("zz",)}),
        ("segments.rule='words' is unknown", shards, {"rule": "sentence,words"}),
        ("--tokenizer=FILE.model is needed", shards, {"tokenizer": ""}),
        ("none.model' cannot be read", shards, {"tokenizer": "none.model"}),
        ("--length=0", shards, {"length": 0}),
        ("--blocks=-1", shards, {"blocks": -1}),
        ("--documents=-1", shards, {"documents": -1}),
        ("--packing='best'", shards, {"packing": "best"}),
        ("there is no such directory", shards, {"output": "none/page.html"}),
        ("cannot be written: Is a directory", shards, {"output": f"{tmp_path}"}),
        ("leave --tokenizer, --packing out", "prepared:x", {}),
        ("x is no prepared directory", "prepared:x", {"tokenizer": ""}),
    ):
        with pytest.raises(UserError, match=re.escape(wanted)) as info:
            inspect.inspect(data, **{"tokenizer": tokenizer_file, "blocks": 0, **given})
        assert "\n" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_the_command(tmp_path, command, shards, tokenizer_file, texts, model):
    arguments = [shards, f"--tokenizer={tokenizer_file}", f"--output={tmp_path}/page.html"]
    result = command("data.inspect", *arguments, "--blocks=1", "--length=32", "--rule=newline")
    assert result.returncode == 0, result.stderr
    assert "\033" not in result.stdout and "⟦0⟧" in result.stdout
    for name, part in (("a", texts[0::4] + texts[1::4]), ("b", texts[2::4] + texts[3::4])):
        tokens = sum(len(model.encode(text)) for text in part)
        size = sum(len(text.encode()) for text in part)
        row = rf"\n{name} +{len(part)} +{size:,} +{tokens:,} +{tokens / size:.3f} +[\d.]+%\n"
        assert re.search(row, result.stdout)
        assert f"{name}, block 1 of 1, rule newline: 32 tokens, " in result.stdout
    assert "Nothing that was read was bad." in result.stdout
    text = (tmp_path / "page.html").read_text()
    assert Page(text).bars and tokenizer_file in text
    failed = command("data.inspect", f"{tmp_path}/none*", f"--tokenizer={tokenizer_file}")
    assert failed.returncode == 1 and failed.stderr.startswith("error: data: no file matches")
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colour_is_for_terminals_that_want_it(
    monkeypatch, capsys, shards, tokenizer_file, no_color
):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    inspect.inspect(shards, tokenizer_file, "sentence", blocks=1, length=16, documents=4)
    assert ("\033[" in capsys.readouterr().out) == (not no_color)


def test_segments_are_those_of_training(model, rules):
    """The coordinates shown are what `segments` gives for the block."""
    tokens = model.encode(HARD)[:50]
    rows = {"tokens": tokens, "document_ids": np.ones(50, np.int32)}
    statistics_of_set = survey.Statistics(rules)
    statistics_of_set.rows = rows
    for rule in rules.values():
        block = sample.samples(statistics_of_set, rule, model, length=50, count=1)[0]
        wanted = segments.coordinates(tokens, rule)
        for name in ("segment", "offset"):
            np.testing.assert_array_equal(getattr(block, name), wanted[name])


@pytest.mark.slow
def test_memory_of_a_document_of_200_mb(tmp_path, tokenizer_file):
    """50 KB of .zst: below the engine's bound, in a process of its own."""
    line = json.dumps({"text": "word " * 40_000_000}).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line))
    del line
    program = (
        "import resource, sys\nfrom bipe_jax.data.inspect import inspect\n"
        "inspect(sys.argv[1], sys.argv[2], output=sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    arguments = [f"{tmp_path}/a.jsonl.zst", tokenizer_file, f"{tmp_path}/page.html"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1_600_000  # KB, of which 600,000 are of the imports
