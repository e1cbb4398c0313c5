"""Tasks with long context: what prompts hold and where, scores, files, errors, the command."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece as spm
from paths import ROOT
from tiny import changed, tiny_plan

from bipe_jax import segments
from bipe_jax.data import tokenizer as tokenizers
from bipe_jax.errors import UserError
from bipe_jax.evaluation import decode, loaded
from bipe_jax.report import results
from bipe_jax.tasks import evaluation, generators, haystack, samples
from bipe_jax.tasks.__main__ import main as tasks_main
from bipe_jax.tasks.evaluation import Settings
from bipe_jax.training.trainer import train

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LONG = 3000  # tokens that every task fits into with any of the tokenizers here


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return tokenizers.load(tokenizer_file)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A source whose lines are all different."""
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    text = "\n".join(f"This is line {i} of the first." for i in range(300))
    documents = [{"text": text}, {"text": "\n  indented\n\nA last line"}]
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return str(path)


def make(tokenizer, name, length=LONG, depth=0.5, seed=0, index=0, hay=None):
    hay = hay or haystack.noise()
    return samples.make(generators.task(name), tokenizer, hay, length, depth, seed, index)


def read(prompt: str) -> list[str]:
    """What a reader who knows English answers: by rules of its own, from the prompt alone."""
    *context, question = prompt.split("\n")
    if question.startswith("What is the pass key?"):
        (line,) = [line for line in context if line.startswith("The pass key is")]
        return [re.search(r"\d+", line)[0]]
    if found := re.search(r"value (\d+)\? These (\d+) variables", question):
        values, right = {}, []
        for line in context[context.index("") :]:
            if assigned := re.fullmatch(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", line):
                name, of, number = assigned.groups()
                values[name] = number or values[of]  # KeyError: a link comes before what it needs
                right += [name] if values[name] == found[1] else []
        assert len(right) == int(found[2])
        return right
    names = re.search(r"special numbers? of (.*?)\?", question)[1]
    answers = []
    for name in re.split(r", | and ", names):
        answers += re.findall(rf"special numbers? of {name} is (\d+)\.", "\n".join(context))
    return answers


class Reader:
    """In the place of decode.Generator: says what `answer` makes of each prompt's text."""

    tokenizer = None
    calls, starts = [], []

    def __init__(self, loaded_model, longest):
        self.longest, self.tokenizer = longest, loaded_model.tokenizer

    def answer(self, prompt):
        return " " + ", ".join(read(prompt)) + "."

    def __call__(self, prompts, max_new_tokens, *, stop=frozenset(), starts=()):
        assert stop == self.tokenizer.ends
        self.starts += zip(prompts, starts, strict=True)
        assert all(len(p) + max_new_tokens <= self.longest for p in prompts)
        self.calls.append((self.longest, max_new_tokens, len(prompts)))
        return [
            self.tokenizer.encode(self.answer(self.tokenizer.decode(p)))[:max_new_tokens]
            for p in prompts
        ]


@pytest.fixture
def loaded_model(tokenizer):
    """A model without parameters: enough for a generator that does not use them."""
    rule = segments.resolve("sentence", tokenizer.pieces())
    config = tiny_plan(rule.separators, evaluation__batch_tokens=2 * LONG)
    return loaded.LoadedModel(config, {}, None, tokenizer, 7)


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(decode, "Generator", Reader)
    monkeypatch.setattr(Reader, "calls", [])
    monkeypatch.setattr(Reader, "starts", [])
    return Reader


ALL = (*generators.TASKS, "niah-multikey:9", "niah-multiquery:2", "variable-tracking:1")


@pytest.mark.parametrize("source", [False, True])
def test_who_reads_the_prompt_knows_all_answers(loaded_model, reader, lines, source):
    settings = Settings(ALL, (1000, LONG), samples=3, haystack=lines if source else "")
    found = evaluation.measure(loaded_model, settings)
    assert len(found["results"]) == len(ALL) * 2 * 5
    assert {row["task"] for row in found["results"]} == set(ALL)
    for row in found["results"]:
        assert row["accuracy"] == 1 and row["error"] == 0 and row["samples"] == 3, row
        assert row["length"] - 90 < row["prompt_tokens"] < row["length"]
        assert row["segments"] > 10
    assert found["data"] == (lines if source else "noise")
    assert [example["task"] for example in found["examples"]] == list(ALL)
    for example in found["examples"]:
        assert sorted(read(example["prompt"])) == sorted(example["answers"])
        assert (example["length"], example["depth"], example["score"]) == (1000, 0, 1)
        assert all(answer in example["said"] for answer in example["answers"])


def test_wrong_and_partly_wrong_answers(loaded_model, reader, monkeypatch):
    def scores(answer):
        monkeypatch.setattr(reader, "answer", lambda _, prompt: answer(prompt))
        found = evaluation.measure(
            loaded_model, Settings(lengths=(LONG,), depths=(0.5,), samples=4)
        )
        return {row["task"]: row["accuracy"] for row in found["results"]}

    assert set(scores(lambda prompt: " 123, 4567890 and ABCDE").values()) == {0}
    one_digit_more = scores(lambda prompt: f" {read(prompt)[0]}0.")
    assert one_digit_more["passkey"] == 0  # where RULER's way would find it
    first = scores(lambda prompt: " " + read(prompt)[0].lower() + ".")
    assert first == {
        "passkey": 1,
        "niah-single": 1,
        "niah-multikey": 1,
        "niah-multivalue": 1 / 4,
        "niah-multiquery": 1 / 4,
        "variable-tracking": 1 / 5,
    }


def test_segmenters_read_the_prompts(loaded_model, reader):
    """The lines and sentences of a prompt; segments of the data there are none."""
    pysbd = pytest.importorskip("pysbd").Segmenter(language="en", clean=False)
    config = {"segments.rule": "pysbd", "segments.levels": (("function", "ast"),)}
    settings = Settings(("passkey",), (300,), (0.5,), 3)
    (row,) = evaluation.measure(changed(loaded_model, config), settings)["results"]
    assert row["accuracy"] == 1
    counts = []
    for tokens, starts in reader.starts:
        (_, *parts) = np.split(tokens, np.flatnonzero(starts & 1))  # BOS is before the first
        found = [loaded_model.tokenizer.decode(part) for part in parts]
        wanted = pysbd.segment("".join(found))
        assert [a.strip() for a in found] == [b.strip() for b in wanted]
        assert not (starts & 2).any()  # a prompt is not Python
        counts.append(1 + len(wanted))
    assert row["segments"] == np.mean(counts[:3]) > 10
    data = changed(loaded_model, {"segments.rule": "data"})
    with pytest.raises(UserError, match="'data:0' takes segments from the data, and prompts and"):
        evaluation.measure(data, settings)


def test_errors_are_binomial(loaded_model, reader, monkeypatch):
    turn = itertools.count()
    said = lambda _, prompt: " " + (read(prompt)[0] if next(turn) % 5 else "7654321")  # noqa: E731
    monkeypatch.setattr(reader, "answer", said)
    settings = Settings(("niah-single",), (1500,), (0.5,), 20)
    (row,) = evaluation.measure(loaded_model, settings)["results"]
    assert row["accuracy"] == 0.8
    assert row["error"] == pytest.approx((0.8 * 0.2 / 20) ** 0.5)


def test_scores():
    assert generators.first_number(["123"], " 123.") == 1
    assert generators.first_number(["123"], " the number 123, or 4") == 1
    for wrong in ("", " 12", " 1234", " 4 and 123", " one"):
        assert generators.first_number(["123"], wrong) == 0
    assert generators.share_found(["AB", "cd", "ef"], "ab, xCDx") == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def others(texts):
    """Tokenizers of other kinds: name -> Tokenizer."""

    def of(text, **options):
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, vocab_size=420,
            normalization_rule_name="identity", minloglevel=2, **options,
        )  # fmt: skip
        return tokenizers.Tokenizer(model.getvalue())

    letters = [re.sub(r"[^a-z \n]", "", text) for text in texts]
    return {
        # Llama's kind: a space in front, newlines as bytes, BPE.
        "bpe": of(texts, model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False),
        "no digits, capitals or stops": of(letters, byte_fallback=True, hard_vocab_limit=False,
                                           remove_extra_whitespaces=False),
        "no bytes": of(letters, hard_vocab_limit=False),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "bpe", "no digits, capitals or stops"])
@pytest.mark.parametrize("name", ALL)
def test_prompts_survive_tokenizers_and_fill_the_length(tokenizer, others, lines, kind, name):
    used = tokenizer if kind == "ours" else others[kind]
    hay = haystack.of_source(lines, LONG)
    for length, source in ((LONG, hay), (LONG, None), (LONG + 17, hay)):
        sample = make(used, name, length, 0.3, hay=source)
        assert sample.tokens.tolist() == used.encode(sample.prompt).tolist()
        assert sample.tokens.dtype == np.int32
        assert length - 3 <= len(sample.tokens) + sample.room <= length
        assert used.decode(sample.tokens) == sample.prompt
        spelt = used.encode(f" {', '.join(sample.answers)} and so on.")
        assert len(spelt) <= sample.room + 8
        # Every line of the prompt, and so every fact, is a segment of its own.
        rule = segments.resolve("newline", used.pieces())
        found = segments.coordinates(sample.tokens, rule)["segment"]
        starts = np.flatnonzero(np.diff(found)) + 1
        of_segments = [used.decode(part).strip() for part in np.split(sample.tokens, starts)]
        of_lines = [line.strip() for line in sample.prompt.split("\n")]
        assert list(filter(None, of_segments)) == list(filter(None, of_lines))


def haystack_before(prompt, fact, facts):
    """The share of the haystack's characters (not of the facts') that stand before a fact."""
    body = prompt.split("\n")[1:-1]

    def size(some):
        return sum(len(line) + 1 for line in some if line not in facts)

    return size(body[: body.index(fact)]) / size(body)


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if name[0] != "v"])
def test_the_first_fact_lies_at_the_depth(tokenizer, lines, name, source):
    hay = haystack.of_source(lines, LONG) if source else haystack.noise()
    others = []
    for depth, index in itertools.product((*DEPTHS, 0.1, 0.333), range(4)):
        sample = make(tokenizer, name, depth=depth, index=index, hay=hay)
        facts = re.findall(r"^.*special numbers? of .* is \d+\.$", sample.prompt, re.MULTILINE)
        if name == "passkey":
            facts = re.findall(r"^The pass key is .*", sample.prompt, re.MULTILINE)
            assert len(facts) == 1
        places = [haystack_before(sample.prompt, fact, facts) for fact in facts]
        asked = [
            place
            for place, fact in zip(places, facts, strict=True)
            if any(answer in fact for answer in sample.answers)
        ]
        assert len(asked) == len(sample.answers)
        assert min(abs(place - depth) for place in asked) < 0.01
        others += [place for place in places if abs(place - depth) > 0.01]
    wanted = {"passkey": 0, "niah-single": 0, "niah-multikey:9": 8, "niah-multiquery:2": 1}
    assert len(others) >= 28 * wanted.get(name, 3) * 0.9
    if others:  # anywhere
        assert min(others) < 0.15 and max(others) > 0.85
        assert 0.35 < np.mean(others) < 0.65


def test_a_chain_begins_at_the_depth_and_keeps_its_order(tokenizer):
    for depth, hops in itertools.product(DEPTHS, (1, 4, 12)):
        sample = make(tokenizer, f"variable-tracking:{hops}", depth=depth)
        body = sample.prompt[sample.prompt.index("\n\n") :].split("\n")[3:-1]
        links = [line for line in body if line.startswith("VAR")]
        assert len(links) == hops + 1
        assert [link.split()[1] for link in links] == list(sample.answers)
        sizes = [0 if line in links else len(line) + 1 for line in body]
        before = [sum(sizes[: body.index(link)]) / sum(sizes) for link in links]
        assert abs(before[0] - depth) < 0.01
        assert before == sorted(before)


def digest(tokenizer, hay):
    found = hashlib.sha256()
    for name, depth, index in itertools.product(ALL, (0.0, 0.7), range(2)):
        sample = make(tokenizer, name, 1200, depth, seed=5, index=index, hay=hay)
        found.update(sample.tokens.tobytes() + str((sample.room, sample.answers)).encode())
    return found.hexdigest()


def test_samples_are_the_same_in_every_process(tokenizer, tokenizer_file, lines):
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import tests.evaluation.test_tasks as t\n"
        "print(t.digest(t.tokenizers.load(sys.argv[3]), t.haystack.of_source(sys.argv[4], 1200)))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, ROOT / "tests", ROOT, tokenizer_file, lines],
        env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert other.stdout.strip() == digest(tokenizer, haystack.of_source(lines, 1200))


def test_samples_do_not_change_from_one_version_to_the_next(tokenizer):
    """Published numbers stand on these draws."""
    answers = [make(tokenizer, name, seed=1).answers[0] for name in generators.TASKS]
    assert answers == ["23778", "4754346", "3668907", "3135618", "4558200", "NBJAM"]


def test_samples_differ_by_what_they_are_of(tokenizer):
    kinds = {
        make(tokenizer, name, depth=depth, seed=seed, index=index).answers
        for name in ("niah-single", "niah-multivalue", "niah-multivalue:3")
        for depth in DEPTHS
        for seed in range(2)
        for index in range(3)
    }
    assert len(kinds) == 3 * 5 * 2 * 3
    same = {make(tokenizer, "niah-multikey", n).answers for n in (800, 1000, 2000)}
    assert len(same) == 1  # lengths are compared on the same facts


def test_nothing_depends_on_what_else_is_run(loaded_model, reader, monkeypatch):
    """Other tasks, lengths, depths, more samples and other batches: the same prompts and scores."""
    asked = []
    answer = Reader.answer

    def odd(self, prompt):
        asked.append(prompt)
        return answer(self, prompt) if len(prompt) % 3 else " 0"

    monkeypatch.setattr(reader, "answer", odd)

    def run(settings, batch_tokens):
        asked.clear()
        model = changed(loaded_model, {"evaluation.batch_tokens": batch_tokens})
        found = evaluation.measure(model, settings)["results"]
        return {(r["task"], r["length"], r["depth"]): r for r in found}, set(asked)

    few, prompts = run(Settings(("niah-multikey",), (1500,), (0.25,), 6), 1500)
    other = Settings(ALL, (LONG, 1500, 1200), (0.9, 0.25, 0.25), 6)
    for batch_tokens in (1, 7000, 10**6):
        many, of_many = run(other, batch_tokens)
        assert len(many) == len(ALL) * 3 * 2
        assert {key: many[key] for key in few} == few
        assert prompts < of_many
    assert prompts < run(Settings(("niah-multikey",), (1500,), (0.25,), 9), 4000)[1]
    (row,) = few.values()
    assert 0 < row["accuracy"] < 1


def test_each_length_is_run_in_batches_of_one_shape(loaded_model, reader):
    settings = Settings(lengths=(1000, 2000), samples=3)
    evaluation.measure(changed(loaded_model, {"evaluation.batch_tokens": 8500}), settings)
    shapes = {(longest, rows) for longest, _, rows in reader.calls}
    assert shapes == {(1000, 8), (2000, 4)}
    rooms = {room for _, room, _ in reader.calls}
    assert len(rooms) < 10
    prompts = 2 * 6 * 5 * 3
    assert prompts <= sum(rows for *_, rows in reader.calls) < prompts + 8 * 2 * len(rooms)


def test_lengths_of_their_own_accord(loaded_model, reader):
    """Multiples of the training length, those that all tasks fit into."""
    trained = changed(loaded_model, {"sequence_length": 128})
    found = evaluation.measure(trained, Settings(("passkey", "niah-single"), samples=1))
    assert {row["length"] for row in found["results"]} == {256, 512, 1024, 2048}
    trained = changed(loaded_model, {"sequence_length": 4})
    with pytest.raises(UserError, match="4 tokens are too few for passkey"):
        evaluation.measure(trained, Settings(("passkey",), samples=1))


def test_haystacks_of_sources(lines, tmp_path):
    hay = haystack.of_source(lines, 100)
    assert len(hay.units) == 304
    assert hay.units[1] == "This is line 1 of the first.\n"
    assert hay.units[-4:] == ["\n", "  indented\n", "\n", "A last line\n"]
    taken = hay.take(301, 31)  # the end, then the beginning, cut
    assert taken == ["  indented\n", "\n", "A last line\n", "This is"]
    assert sum(map(len, hay.take(5, 100_000))) == 100_000  # round and round
    assert hay.take(0, 0) == []
    blank = tmp_path / "blank.jsonl"
    blank.write_text(json.dumps({"text": " \n\n"}))
    with pytest.raises(UserError, match="has no text"):
        haystack.of_source(str(blank), 100)


def test_wrong_input_is_refused_in_a_line(loaded_model, reader, others, tmp_path):
    def refused(line, tokenizer=loaded_model.tokenizer, config=loaded_model.config, **settings):
        given = {"tasks": ("passkey",), "lengths": (500,), "samples": 2} | settings
        with pytest.raises(UserError, match=line):
            evaluation.measure(loaded.LoadedModel(config, {}, None, tokenizer), Settings(**given))
        assert not reader.calls

    refused("'passkye' is unknown .*: use some of passkey, niah-single", tasks=("passkye",))
    refused("--tasks is empty", tasks=())
    refused("passkey takes no number", tasks=("passkey:2",))
    for number in ("0", "65", "x", "-1", ""):
        refused("must be from 1 to 64, as in niah-multikey:4", tasks=(f"niah-multikey:{number}",))
    refused(r"--depths=0,1.5 must be numbers from 0 to 1", depths=(0.0, 1.5))
    refused("--depths=-0.5 must", depths=(-0.5,))
    refused("--depths=nan must", depths=(float("nan"),))
    refused("--depths= must", depths=())
    refused("--samples=0 must be at least 1", samples=0)
    refused("100 tokens are too few for passkey, whose", lengths=(500, 100))
    refused("lengths of at least 2 tokens", lengths=(0,))
    refused("no file matches 'none.jsonl'", haystack="none.jsonl")
    refused("has no tokenizer", tokenizer=None)
    refused("passkey: the tokenizer cannot spell", tokenizer=others["no bytes"])
    table = {"position.absolute": (("learned", "position", ("size", 400)),)}
    config = loaded_model.config.replace(table)
    refused("table of position ends at 400 tokens.*500", config=config, lengths=(500,))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_file, shards, held_out):
    from configs import smoke

    config = smoke.get_config()
    config.tokenizer.path = tokenizer_file
    config.data.train, config.data.evaluation = shards, held_out
    config.evaluation.lengths = (32,)
    workdir = str(tmp_path_factory.mktemp("run"))
    train(config, workdir, stop_at=2)
    return workdir


@pytest.mark.slow
def test_the_command_writes_a_table_json_and_a_picture(run, command, tmp_path, lines):
    settings = ("--lengths=320,256", "--depths=1,0", "--samples=3", f"--haystack={lines}")
    done = command(
        "tasks", f"--checkpoint={run}", "--tasks=passkey,niah-multikey:2", *settings,
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert (found["kind"], found["name"], found["step"], found["seed"]) == ("tasks", "out", 2, 0)
    assert (found["training_length"], found["segment_rule"]) == (32, "sentence")
    assert found["data"] == lines
    keys = [(row["task"], row["length"], row["depth"]) for row in found["results"]]
    assert keys == list(itertools.product(("passkey", "niah-multikey:2"), (256, 320), (0, 1)))
    assert all(row["accuracy"] == 0 for row in found["results"])  # it has learned nothing
    assert len(found["examples"]) == 2 and found["examples"][0]["said"]
    assert (tmp_path / "out" / "tasks.png").read_bytes()[:4] == b"\x89PNG"
    assert "niah-multikey:2" in (tmp_path / "out" / "report.html").read_text()
    for words in ("niah-multikey:2", "320", "0%  100%", "3 samples a cell", "rule sentence"):
        assert words in done.stdout
    (read_back,) = results.read([str(tmp_path / "out")])
    for row, wanted in zip(read_back.tasks.results, found["results"], strict=True):
        assert dataclasses.asdict(row).items() <= wanted.items()
    for name in ("step", "seed", "training_length", "segment_rule", "data"):
        assert getattr(read_back.tasks, name) == found[name]


def test_the_command_refuses_wrong_input_in_a_line(command, monkeypatch):
    done = command("tasks", "--checkpoint=none", "--tasks=needle")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --tasks: 'needle' is unknown")
    assert done.stderr.count("\n") == 1
    for flag, line in (
        ("--depths=half", "--depths=half must be numbers, such as 0,0.5,1"),
        ("--lengths=1k", "--lengths=1k must be whole numbers"),
    ):
        monkeypatch.setattr(sys, "argv", ["tasks", "--checkpoint=none", flag])
        with pytest.raises(UserError, match=line):
            tasks_main()
    with pytest.raises(UserError, match="none"):
        evaluation.evaluate("none")
