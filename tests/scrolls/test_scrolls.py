"""SCROLLS: its files, the authors' cuts by exact numbers of tokens, metrics, and outputs of a model."""

import collections
import itertools
import json
import re
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from bipe_jax import api, plan, segments
from bipe_jax.config import spec
from bipe_jax.data import held_out, identity, marked, passages, scrolls, sources, tokenizer
from bipe_jax.data.batches import Batches
from bipe_jax.data.scrolls import DataSet
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded
from bipe_jax.scrolls import evaluation, making, metrics, predicting
from bipe_jax.scrolls.evaluation import Settings
from bipe_jax.scrolls.predicting import Example

QUALITY = (
    "What (really) happened?\n\n (A) It rained\n (B) It snowed\n   for a week\n (C) Nothing\n"
    " (D) (B)oth\n\n\nA story. (A) is here.\n\nIts end."
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    """A directory of the data sets that this project makes."""
    directory = str(tmp_path_factory.mktemp("scrolls"))
    for split, source, seed in (("train", "train", 0), ("validation", "validation", 1)):
        text = passages.read(f"quickstart:{source}", "line", 56)
        making.write(directory, split, text, (4, 8), 60, seed)
    return directory


def records(directory, name, split="validation") -> list[scrolls.Record]:
    return list(scrolls.records(DataSet(f"{directory}/{name}", name, split)))


# Metrics.


def test_metrics_are_those_that_scrolls_documents():
    """The example of the metric's own documentation, of which ROUGE is in percent to 4 digits."""
    predictions = ["exact match example", "hello there", "general kenobi"]
    references = [["exact match example"], ["hello", "hi there"], ["commander kenobi"]]

    def score(metric):
        pairs = zip(predictions, references, strict=True)
        return metrics.summary([metrics.scores(metric, *pair) for pair in pairs])

    assert score("exact_match")["score"] == pytest.approx(33.3333, abs=1e-4)
    assert score("f1")["score"] == pytest.approx(72.2222, abs=1e-4)
    pytest.importorskip("rouge_score")
    rouge = score("rouge")
    wanted = {"rouge1": 72.2222, "rouge2": 33.3333, "rougeL": 72.2222, "score": 55.8136}
    assert rouge == pytest.approx(wanted, abs=1e-4)


def random_texts(count=200):
    random = np.random.RandomState(0)
    words = [
        "The",
        "a",
        "an",
        "king",
        "King,",
        "queen",
        "(of)",
        "France!",
        "and",
        "theatre",
        "x-y",
        "kings",
    ]
    return [" ".join(random.choice(words, random.randint(9))) for _ in range(count)]


def plain_words(text):
    kept = "".join(c for c in text.lower() if c.isalnum() or c.isspace())
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def test_f1_and_exact_match_are_those_of_a_plain_count():
    texts = random_texts()
    for one, other in itertools.pairwise(texts):
        own, left = plain_words(one), plain_words(other)
        assert metrics.exact_match(one, other) == (own == left)
        size, common = len(own) + len(left), 0
        for word in own:
            if word in left:
                left.remove(word)
                common += 1
        wanted = 2 * common / size if common else 0.0
        assert metrics.f1(one, other) == pytest.approx(wanted)


def plain_rouge(one: str, other: str) -> dict[str, float]:
    own, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (one, other))

    def f_measure(common, first, second):
        return 2 * common / (first + second) if common else 0.0

    scores = {}
    for n in (1, 2):
        grams = [
            collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            for words in (own, wanted)
        ]
        common = sum(min(count, grams[1][gram]) for gram, count in grams[0].items())
        scores[f"rouge{n}"] = f_measure(common, *(sum(of.values()) for of in grams))
    longest = np.zeros((len(own) + 1, len(wanted) + 1), int)
    for i, word in enumerate(own):
        for j, other_word in enumerate(wanted):
            longest[i + 1, j + 1] = (
                longest[i, j] + 1
                if word == other_word
                else max(longest[i, j + 1], longest[i + 1, j])
            )
    return scores | {"rougeL": f_measure(longest[-1, -1], len(own), len(wanted))}


def test_rouge_is_that_of_plain_loops():
    pytest.importorskip("rouge_score")
    texts = random_texts()
    for one, other in itertools.pairwise(texts):
        assert metrics.rouge(one, other) == pytest.approx(plain_rouge(one, other))
    both = metrics.scores("rouge", "a b", ["a b c d", "x y"])
    assert both == metrics.rouge("a b", "a b c d")


def test_rouge_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    metrics._rouge_scorer.cache_clear()
    with pytest.raises(UserError, match=r"bipe-jax\[eval\]"):
        metrics.check("rouge")
    metrics.check("f1")


# Models that cheat.


def cheated(directory, name, output, choice="") -> dict:
    """The scores of a model that writes and chooses what functions of a record say."""
    every = records(directory, name)
    data = DataSet(f"{directory}/{name}", name, "validation")
    examples, written, chosen = [], [], []
    for record in every:
        options = tuple((option, {}) for option in scrolls.options(data, record.input))
        examples.append(Example({}, options, [record.output]))
        written.append(output(record))
        chosen.append(choice(record) if choice else "")
    return evaluation.result_of(data, examples, written, chosen)


def test_models_that_cheat_are_scored_as_they_should_be(made):
    def right(record):
        return record.output

    def first_option(record):
        return scrolls.listed_options(record.input)[0]

    every = records(made, "neighbours")
    of_first = 100 * np.mean([first_option(r) == r.output for r in every])
    assert 10 < of_first < 45
    result = cheated(made, "neighbours", first_option, right)
    assert (result["score"], result["choice"], result["option"]) == (
        pytest.approx(of_first), 100, 100,
    )  # fmt: skip
    result = cheated(made, "neighbours", lambda r: r.input[:20], first_option)
    assert (result["score"], result["choice"]) == (0, pytest.approx(of_first))
    majority = 100 * np.mean([r.output == "Entailment" for r in records(made, "orders")])
    assert 15 < majority < 55
    result = cheated(made, "orders", lambda r: "entailment.", lambda r: "Entailment")
    assert (result["score"], result["choice"], result["option"]) == (
        pytest.approx(majority), pytest.approx(majority), 100,
    )  # fmt: skip
    for name in ("lines", "neighbours", "orders"):
        assert cheated(made, name, right)["score"] == 100
        assert cheated(made, name, lambda r: "")["score"] == 0
    # All of the text has the answer's words, and hundreds of others.
    assert 0 < cheated(made, "lines", lambda r: r.input)["score"] < 30
    pytest.importorskip("rouge_score")
    assert cheated(made, "outlines", right)["score"] == pytest.approx(100)
    assert cheated(made, "outlines", lambda r: "")["score"] == 0
    assert 0 < cheated(made, "outlines", lambda r: r.input[:30])["score"] < 80


# Files.


def test_several_lines_of_an_id_are_references_and_outputs_may_be_unknown(tmp_path, run):
    lines = [
        {"id": "1", "pid": "1_0", "input": "who\n\nthe king", "output": "the king"},
        {"id": "2", "pid": "2_0", "input": "who\n\nthe queen", "output": "her"},
        {"id": "1", "pid": "1_1", "input": "who\n\nthe king", "output": "a man"},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    hidden = "".join(json.dumps(line | {"output": None}) + "\n" for line in lines[:2])
    with zipfile.ZipFile(tmp_path / "qasper.zip", "w") as archive:
        archive.writestr("qasper/validation.jsonl", content)
        archive.writestr("qasper/test.jsonl", hidden)
    model = loaded.load(run)
    data = DataSet(f"{tmp_path}/qasper", "qasper", "validation", 32)
    examples = predicting.read(model, data, (), 0)
    assert [example.references for example in examples.values()] == [["the king", "a man"], ["her"]]
    result = evaluation.result_of(data, list(examples.values()), ["man", "His!"], ["", ""])
    assert result["score"] == 50 and result["choice"] is None
    assert list(predicting.read(model, data, (), 1)) == ["1"]
    (only,) = predicting.read(model, data, (), 1).values()
    assert only.references == ["the king", "a man"]
    result = evaluation.measure(model, Settings(str(tmp_path), ("qasper",), "test", 32))
    assert result["results"][0]["score"] is None and result["mean"] is None
    source = spec.parse_source(f"scrolls:{tmp_path}/qasper(split=validation)")
    documents = list(sources.documents(source))
    assert [document["answer"] for document in documents] == ["the king", "her", "a man"]
    opened = sources.open_source(source)
    after = [cursor for _, cursor in opened.read(0)]
    assert [d["answer"] for d, _ in opened.read(0, after[0])] == ["her", "a man"]
    with pytest.raises(UserError, match=r"qasper\.zip cannot be read: 'it has no train"):
        next(sources.documents(spec.parse_source(f"scrolls:{tmp_path}/qasper")))


def test_options_are_those_that_the_input_lists(made):
    assert scrolls.listed_options(QUALITY) == (
        "It rained", "It snowed for a week", "Nothing", "(B)oth",
    )  # fmt: skip
    assert scrolls.listed_options("What?\n\nA story (B) without options.") == ()
    data = DataSet("x/contract_nli", "contract_nli")
    assert scrolls.options(data, QUALITY) == ("Entailment", "Contradiction", "Not mentioned")
    assert scrolls.options(DataSet("x/qasper", "qasper"), QUALITY) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scrolls:x/qaspr", "did you mean 'qasper'"),
        ("scrolls:x/qasper(split=dev)", "split=train, validation or test"),
        ("scrolls:x/qasper(tokens=8)", "tokens=N of at least 32"),
        ("scrolls:x/qasper", r"x/qasper/train\.jsonl cannot be read"),
    ],
)
def test_sources_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        next(sources.documents(spec.parse_source(text)))


def test_lines_that_are_malformed_are_named(tmp_path):
    (tmp_path / "qasper").mkdir()
    path = tmp_path / "qasper" / "train.jsonl"
    for line in ("[]", '{"id": 1}', '{"id": "1", "input": "x", "output": 3}', '{"id"'):
        path.write_text(f"\n{line}\n")
        with pytest.raises(UserError, match="is no line with id, input and output"):
            records(tmp_path, "qasper", "train")


def test_what_is_made_is_that_of_a_plain_search(made):
    def beginning(line):
        return " ".join(line.split()[:3])

    labels = collections.Counter()
    for record in records(made, "outlines"):
        lines = record.input.split("\n")
        assert record.output.split("\n") == [beginning(line) for line in lines[::4]]
    for record in records(made, "lines"):
        question, _, text = record.input.partition("\n\n")
        k = int(re.fullmatch(r"What does line (\d+) say\?", question)[1])
        assert record.output == beginning(text.split("\n")[k - 1])
    for record in records(made, "neighbours"):
        question, _, rest = record.input.partition("\n\n")
        lines = rest.partition("\n\n\n")[2].split("\n")
        quoted = re.fullmatch('What is before "(.*)"\\?', question)[1]
        (at,) = [i for i, line in enumerate(lines) if line.strip() == quoted]
        options = scrolls.listed_options(record.input)
        assert record.output == beginning(lines[at - 1]) and options.count(record.output) == 1
        assert len(set(options)) == 4
        assert all(option in map(beginning, lines) for option in options)
    for record in records(made, "orders"):
        question, _, text = record.input.partition("\n\n")
        first, second = re.fullmatch('"(.*)" is before "(.*)"\\.', question).groups()
        lines = [line.strip() for line in text.split("\n")]
        label = "Not mentioned"
        if first in lines and second in lines:
            is_so = lines.index(first) < lines.index(second)
            label = "Entailment" if is_so else "Contradiction"
        assert record.output == label
        labels[label] += 1
    assert min(labels.values()) > 8 and len(labels) == 3


# Cuts.


def test_limits_are_the_authors():
    assert DataSet("x/gov_report", "gov_report").limits[::2] == (7184 + 7, 1000)
    assert DataSet("x/qasper", "qasper").limits[::2] == (7991, 200)
    for name in scrolls.TASKS:
        for tokens in (32, 100, 512, 8192):
            limits = DataSet("x", name, tokens=tokens).limits
            assert limits.prompt + limits.output + 1 == tokens and limits.prompt > 0


def test_a_tokenizer_like_llamas_keeps_what_the_authors_keep(texts):
    package = pytest.importorskip("mistral_common")
    path = Path(package.__file__).parent / "data" / "tokenizer.model.v1"
    tokens = tokenizer.load(str(path))
    text = "\n".join(texts)[:60_000]
    for name, first, last in (("gov_report", 7184, 7), ("qasper", 7988, 3)):
        task = scrolls.TASKS[name]
        document = scrolls.to_example(DataSet(f"x/{name}", name), text, "x")
        (row, _), whole = (
            marked.encode_whole(tokens, document, ()),
            tokens.encode(f"{task.before}{text}{task.after}").tolist(),
        )
        assert len(whole) > 8192
        wanted = whole[:first] + whole[-last:]
        assert row["tokens"][: first + last].tolist() == wanted
        assert tokens.decode(wanted[-last:]).strip() == task.after.strip()


@pytest.mark.parametrize("name", ["gov_report", "quality"])
@pytest.mark.parametrize("size", [3, 20, 2000])
def test_examples_are_cut_by_exact_numbers_of_tokens(name, size, tokenizer_file, texts):
    tokens = tokenizer.load(tokenizer_file)
    data = DataSet(f"x/{name}", name, tokens=64)
    most, _, output = data.limits
    text, summary = texts[0][:size], texts[1][:size]
    document = scrolls.to_example(data, text, summary)
    row, sizes = marked.encode_whole(tokens, document, ())
    prompt = tokens.encode(f"{data.task.before}{text}{data.task.after}").tolist()
    if len(prompt) > most:
        last = len(tokens.encode_parts([data.task.after], [False])[0])
        assert tokens.decode(prompt[-last:]) == data.task.after
        prompt = prompt[: most - last] + prompt[-last:]
    completion = tokens.encode_parts([summary], [False])[0].tolist()[:output]
    assert row["tokens"].tolist() == [*prompt, *completion, tokens.eos_id]
    assert row["learned"].tolist() == [0] * len(prompt) + [1] * (len(completion) + 1)
    assert len(row["tokens"]) <= 64 and len(sizes) == len(row["tokens"])
    if size == 2000:
        assert len(row["tokens"]) == 64


def test_segments_of_what_is_kept_stay_where_they_begin(tokenizer_file):
    tokens = tokenizer.load(tokenizer_file)
    text = "".join(f"def f{i}():\n  return {i}\n\n\n" for i in range(40))
    data = DataSet("x/qasper", "qasper", tokens=64)
    begins = [match.start() for match in re.finditer("def", text)]
    document = scrolls.to_example(data, text, "x") | {"segments": [begins]}
    (prompt, _) = marked.parts_of(document, ("data:0",))
    cut, whole = (marked.encode(tokens, [part])[0] for part in (prompt, prompt._replace(kept=None)))
    last = len(tokens.encode_parts([data.task.after], [False])[0])
    first = data.limits.prompt - last
    assert cut["starts"][:first].tolist() == whole["starts"][:first].tolist()
    assert cut["starts"][first:].tolist() == whole["starts"][-last:].tolist()
    assert cut["starts"].sum() > 2


def test_a_training_reads_them_and_resumes_exactly(made, config):
    names = ("outlines", "lines", "neighbours", "orders")
    config.data.train = "; ".join(f"scrolls:{made}/{name}(tokens=160)@1" for name in names)
    config.data.evaluation = f"scrolls:{made}/lines(split=validation, tokens=160)"
    config.data.packing, config.sequence_length, config.batch_size = "row", 160, 4
    config.data.shuffle_blocks = 8
    config = plan.make(config)
    tokens = tokenizer.load(config.tokenizer.path)
    config = config.with_rule(segments.rule_of(config, tokens.pieces(), tokens.bos_id))
    batches = Batches(config, tokens)
    seen, states = [], []
    for _ in range(12):
        seen.append(next(batches))
        states.append(batches.get_state())
    batches.close()
    of = {name: DataSet(f"{made}/{name}", name, tokens=160) for name in names}
    outputs = {
        tuple(tokens.encode_parts([record.output], [False])[0].tolist()[: of[name].limits.output])
        for name in names
        for record in records(made, name, "train")
    }
    for batch in seen:
        for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
            learned = targets[weights > 0].tolist()
            assert learned[-1] == tokens.eos_id and tuple(learned[:-1]) in outputs
    again = Batches(config, tokens)
    again.set_state(json.loads(json.dumps(states[3])))
    for batch in seen[4:]:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name])
    again.close()
    config = config.with_shards(tuple(map(identity.of_source, config.training.sources)))
    held_out.check(config)
    repeated = config.replace({"data.evaluation": f"scrolls:{made}/lines(split=train, tokens=160)"})
    with pytest.raises(UserError, match="held out"):
        held_out.check(repeated)


# A model.


@pytest.mark.parametrize("name", ["lines", "neighbours"])
def test_outputs_and_options_are_those_of_whole_passes(name, made, run, tmp_path):
    """Of the logits of whole texts, without a cache: the most probable token one by one, and sums."""
    model = loaded.load(run)
    most = 6
    data = DataSet(f"{made}/{name}", name, "validation", 48 * most)
    examples = list(predicting.read(model, data, (), most).values())
    config, params = api.load(run)
    logits = jax.jit(lambda tokens: api.apply(config, params, tokens))

    def of(tokens):
        padded = np.pad(tokens, (0, 48 * most + 16 - len(tokens)), mode="edge")
        return np.asarray(jax.nn.log_softmax(logits(padded[None])[0], axis=-1))

    written = predicting.outputs(model, examples, 4)
    of_options = predicting.log_probabilities(model, examples)
    for example, own, of_own in zip(examples, written, of_options, strict=True):
        tokens = example.prompt["tokens"]
        said = []
        for _ in range(4):
            said.append(
                int(of(np.append(tokens, said).astype(int))[len(tokens) + len(said) - 1].argmax())
            )
            if said[-1] in model.tokenizer.ends:
                said.pop()
                break
        assert own == model.tokenizer.decode(said).strip()
        sums = {}
        for option, row in example.options:
            whole = row["tokens"]
            assert whole[: len(tokens)].tolist() == tokens.tolist()
            assert whole[-1] == model.tokenizer.eos_id
            log_probs = of(whole)
            learned = range(len(tokens), len(whole))
            sums[option] = sum(log_probs[i - 1, whole[i]] for i in learned)
        assert of_own == pytest.approx(sums, abs=1e-3)


def test_the_command_writes_scores_and_predictions(made, run, tmp_path, command):
    line = [
        "scrolls", f"--checkpoint={run}", f"--data={made}", "--tasks=orders,lines", "--most=5",
        "--tokens=128",
    ]  # fmt: skip
    done = command(*line, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "scrolls.json").read_text())
    assert [row["task"] for row in result["results"]] == ["orders", "lines"]
    lines = (tmp_path / "predictions-orders.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    wanted = [record.id for record in records(made, "orders")[:5]]
    assert [line["id"] for line in kept] == wanted
    right = [max(line["options"], key=line["options"].get) in line["references"] for line in kept]
    assert result["results"][0]["choice"] == pytest.approx(20 * sum(right))
    assert result["mean"] == pytest.approx(np.mean([row["score"] for row in result["results"]]))
    assert done.stdout.splitlines()[-2].startswith("mean")


def test_data_sets_that_are_not_there_are_named(made, tmp_path):
    for settings, message in (
        (Settings(made, ("line",)), "did you mean 'lines'"),
        (
            Settings(made, ("lines", "qasper")),
            r"neither .*/qasper/validation\.jsonl nor .*/qasper\.zip",
        ),
        (Settings(made, split="test"), "has no data set of SCROLLS: it must hold TASK/test"),
        (Settings(str(tmp_path)), "has no data set of SCROLLS"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.data_sets(settings, 64)
    with pytest.raises(UserError, match="--tokens=8 must be at least 32"):
        evaluation.data_sets(Settings(made), 8)
