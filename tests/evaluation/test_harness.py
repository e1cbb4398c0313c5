"""The lm-evaluation-harness on a real model and tasks on local files."""

import dataclasses
import functools
import json
import math
import os
import sys

import jax
import numpy as np
import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tiny import changed, tiny_plan

import bipe_jax
from bipe_jax import harness, model, segments
from bipe_jax.data import marked
from bipe_jax.errors import UserError
from bipe_jax.evaluation import decode, harness_model, loaded
from bipe_jax.evaluation.perplexity import default_lengths
from tests.model.test_model import draw

EXAMPLES = [
    {"question": "To be, or not", "choices": [" to be", " at all", "hing"], "answer": 0},
    {"question": "import", "choices": [" numpy as np", " os\n", ""], "answer": 1},
    {"question": "Wherefore art thou ", "choices": ["Romeo", "Juliet?", "Ørsted ☂"], "answer": 2},
    {"question": "x" * 400, "choices": [" y", " x", " xx"], "answer": 0},
]
CHOICE = (
    "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
    "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    "  - metric: acc_norm\n"
)
PASSAGES = ["A short one.\n", "Long. " * 60, "Ünïcode ☂ and\nlines\n"]


@pytest.fixture(scope="module")
def loaded_model(run):
    return loaded.load(run)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")

    def write(name, rows, text):
        (directory / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
        files = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory}/{name}.json\n"
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{files}test_split: test\n{text}")

    write(
        "local_choice",
        EXAMPLES,
        CHOICE,
    )
    write(
        "local_rolling",
        [{"page": text} for text in PASSAGES],
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n"
        "  - metric: bits_per_byte\n",
    )
    write(
        "local_writing",
        [{"question": "To be", "answer": "nothing like it"}],
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        "generation_kwargs:\n  until: ['\\n\\n']\n  max_gen_toks: 8\nmetric_list:\n"
        "  - metric: exact_match\n",
    )
    write("local_unsafe", EXAMPLES, CHOICE + "unsafe_code: true\n")
    write("local_broken", [{"question": "Why"}], CHOICE)
    (directory / "far_away.yaml").write_text(
        "task: far_away\ndataset_path: nobody/has_this\ntest_split: test\n" + CHOICE
    )
    return str(directory)


class Plain:
    """Each token by itself, from all logits, in float64."""

    def __init__(self, loaded_model, max_length):
        self.encode = loaded_model.tokenizer.encode
        self.tokenizer, self.max_length = loaded_model.tokenizer, max_length
        self.names = segments.segmenters_of(loaded_model.config)
        self._apply = jax.jit(functools.partial(bipe_jax.apply, loaded_model.config))
        self._params = loaded_model.params

    def starts(self, text):
        """Where segmenters let segments begin; None without them."""
        row, _ = marked.encode_whole(self.tokenizer, {"text": text}, self.names)
        return row.get("starts")

    def logits(self, tokens, starts=None):
        padded = np.zeros((2, 1, self.max_length), np.int32)
        padded[0, 0, : len(tokens)] = tokens
        if starts is not None:
            padded[1, 0, : len(starts)] = starts
        rows = padded if starts is not None else padded[:1]
        return np.asarray(self._apply(self._params, *rows), np.float64)[0]

    def score(self, tokens, first, starts=None):
        """(log-probability of tokens[first:] behind those before, whether all are the likeliest)."""
        cut = max(len(tokens) - self.max_length - 1, 0)
        tokens, first = tokens[cut:], first - cut
        logits = self.logits(tokens[:-1], None if starts is None else starts[cut:-1])
        total, greedy = 0.0, True
        for i in range(first, len(tokens)):
            row = logits[i - 1]
            total += row[tokens[i]] - np.log(np.exp(row).sum())
            greedy &= int(row.argmax()) == tokens[i]
        return total, bool(greedy)

    def pair(self, context, continuation):
        stripped = context.rstrip()
        whole = self.encode(context + continuation)
        return self.score(whole, len(self.encode(stripped)))

    def rolling(self, text):
        """Each token once, with as many before it as there are, the first behind BOS."""
        tokens = self.encode(text)
        starts = self.starts(text) if self.names else None
        total, done = 0.0, 1
        while done < len(tokens):
            end = min(done + self.max_length, len(tokens))
            start = max(end - self.max_length - 1, 0)
            own = None if starts is None else starts[start:end]
            total += self.score(tokens[start:end], done - start, own)[0]
            done = end
        return total


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def test_tasks_on_local_files_give_what_a_plain_loop_gives(loaded_model, tasks):
    model, plain = harness_model.Harness(loaded_model, 96), Plain(loaded_model, 96)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = ["local_choice", "local_rolling", "local_writing"]
    results = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=10
    )
    choices = [[plain.pair(e["question"], choice)[0] for choice in e["choices"]] for e in EXAMPLES]
    for sample, wanted in zip(results["samples"]["local_choice"], choices, strict=True):
        found = [response[0][0] for response in sample["resps"]]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    right = [int(np.argmax(c)) == e["answer"] for c, e in zip(choices, EXAMPLES, strict=True)]
    assert results["results"]["local_choice"]["acc,none"] == np.mean(right)

    total = sum(map(plain.rolling, PASSAGES))
    size = sum(len(text.encode()) for text in PASSAGES)
    found = results["results"]["local_rolling"]
    assert found["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)

    answer = results["samples"]["local_writing"][0]["resps"][0][0]
    tokens = list(plain.encode("To be"))
    for _ in range(8):
        tokens.append(int(plain.logits(tokens)[len(tokens) - 1].argmax()))
    text = loaded_model.tokenizer.decode(tokens)[len("To be") :]
    assert answer == text.split("\n\n")[0]


def test_requests_are_answered_each_by_itself(loaded_model):
    """Empty contexts, what is longer than the window, unicode; in any batch and any order."""
    pairs = [
        ("", "Alone"),
        ("Context ", "with a space"),
        ("long " * 300, "and its end"),
        ("short", " middle" * 10),
        ("☂", "☂☂ é\n"),
        ("a", ""),
    ]
    model, plain = harness_model.Harness(loaded_model, 64), Plain(loaded_model, 64)
    found = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        if not context:
            wanted = plain.score(plain.encode(continuation), 1)
        else:
            wanted = plain.pair(context, continuation)
        assert total == pytest.approx(wanted[0], rel=1e-5, abs=1e-5)
        assert greedy == wanted[1]
    again = model.loglikelihood(requests("loglikelihood", pairs[::-1]), disable_tqdm=True)[::-1]
    for (one, greedy), (other, also) in zip(found, again, strict=True):
        assert one == pytest.approx(other, abs=1e-5) and greedy == also
    narrow = changed(loaded_model, {"evaluation.batch_tokens": 64})
    alone = harness_model.Harness(narrow, 64).loglikelihood(
        requests("loglikelihood", pairs), disable_tqdm=True
    )
    for (one, _), (other, _) in zip(found, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)

    # What the model itself would write is greedy.
    start = plain.encode("To be or")
    more = decode.Generator(loaded_model, 64)([start], 6)[0]
    whole = loaded_model.tokenizer.decode([*start, *more])
    if plain.encode(whole).tolist() == [*start, *more]:  # else it reads back otherwise
        (answer,) = model.loglikelihood(
            requests("loglikelihood", [("To be or", whole[len("To be or") :])]), disable_tqdm=True
        )
        assert answer[1]


CODE = "import os\n\n\ndef f(x):\n    return x\n\n\ny = f(2)\n"


def test_segmenters_read_the_text_of_each_request(run, loaded_model):
    config = loaded_model.config.replace({
        "segments.rule": "ast",
        "position.absolute": (("learned", "offset"),),
        "position.relative": (("rope", "segment"),),
    })  # fmt: skip
    tokenizer = loaded_model.tokenizer
    coded = loaded.on_all_devices(config, draw(config), tokenizer)
    model, plain = harness_model.Harness(coded, 48), Plain(coded, 48)
    assert plain.starts(CODE).sum() == 2 and not plain.starts(CODE[:20]).any()
    # Only with the continuation is the second text Python; the last is cut at its beginning.
    pairs = [
        (CODE, "z = 3\n"),
        ("def f(", "x): return x\ny = 1\nz = y + 3\n"),
        ("", CODE),
        (3 * CODE, "z = 1\n"),
    ]
    found = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        whole, starts = plain.encode(context + continuation), plain.starts(context + continuation)
        first = len(plain.encode(context.rstrip())) if context else 1
        wanted = plain.score(whole, first, starts)
        assert total == pytest.approx(wanted[0], rel=1e-5, abs=1e-5) and greedy == wanted[1]
        assert total != pytest.approx(plain.score(whole, first, 0 * starts)[0], rel=1e-3)
    (rolling,) = model.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(5 * CODE,)]), disable_tqdm=True
    )
    assert rolling == pytest.approx(plain.rolling(5 * CODE), rel=1e-5)
    asked = {"until": [], "max_gen_toks": 8}
    answers = model.generate_until(
        requests("generate_until", [(CODE, asked), (3 * CODE, asked)]), disable_tqdm=True
    )
    for text, answer in zip((CODE, 3 * CODE), answers, strict=True):
        tokens, starts = plain.encode(text)[8 - 48 :].tolist(), plain.starts(text)[8 - 48 :]
        for _ in range(8):
            row = plain.logits(tokens, np.pad(starts, (0, len(tokens) - len(starts))))
            tokens.append(int(row[len(tokens) - 1].argmax()))
        assert answer == tokenizer.decode(tokens)[len(tokenizer.decode(tokens[:-8])) :]
    data = changed(loaded_model, {"segments.rule": "data:1"})
    with pytest.raises(UserError, match="'data:1' takes segments from the data"):
        harness_model.Harness(data, 48)


def test_generation_ends_at_the_first_stop_string(loaded_model, monkeypatch):
    model = harness_model.Harness(loaded_model, 128)
    contexts = ["To be", "import numpy", "x" * 500, "A"]

    def generate(**given):
        return model.generate_until(
            requests("generate_until", [(c, {"max_gen_toks": 20, **given}) for c in contexts]),
            disable_tqdm=True,
        )

    whole = generate(until=[])
    tokens = np.array(loaded_model.tokenizer.encode(contexts[2]))[20 - 128 :]
    answer = decode.Generator(loaded_model, 128)([tokens], 20, stop=loaded_model.tokenizer.ends)[0]
    text = loaded_model.tokenizer.decode([*tokens, *answer])
    assert whole[2] == text[len(loaded_model.tokenizer.decode(tokens)) :]
    stops = [whole[0][3:5], whole[1][4:7]]  # which lie across tokens
    for text, cut in zip(whole, generate(until=stops), strict=True):
        places = [p for stop in stops if (p := text.find(stop)) >= 0]
        assert cut == (text[: min(places)] if places else text)
    with monkeypatch.context() as patch:  # one token may complete several
        patch.setattr(type(loaded_model.tokenizer), "decode", lambda _, ids: "<>" * len(ids))
        assert generate(until=[">", "<"])[0] == "" and generate(until=[">"])[0] == "<"
    drawn = generate(until=[], do_sample=True, temperature=1.0)
    assert drawn != whole and drawn == generate(until=[], do_sample=True, temperature=1.0)


def test_what_merges_with_its_context_is_scored(loaded_model):
    """A continuation that leaves no token of its own would else be certain, and be chosen."""
    model, plain = harness_model.Harness(loaded_model, 64), Plain(loaded_model, 64)
    piece = next(p for p in loaded_model.tokenizer.pieces() if len(p) > 3 and p.isalpha())
    pairs = [
        (piece[:i], piece[i:])
        for i in range(1, len(piece))
        if len(plain.encode(piece)) == len(plain.encode(piece[:i]))
    ]
    assert pairs, piece
    found = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    wanted = plain.score(plain.encode(piece), len(plain.encode(piece)) - 1)
    for total, greedy in found:
        assert total == pytest.approx(wanted[0], rel=1e-5) and greedy == wanted[1]


def test_what_is_asked_several_times_is_answered_anew(loaded_model):
    """Tasks draw several answers to one context; in batches of one row, too."""
    model = harness_model.Harness(changed(loaded_model, {"evaluation.batch_tokens": 64}), 64)
    # Without a temperature, from the model's own probabilities.
    asked = requests("generate_until", [("To be", {"max_gen_toks": 8, "do_sample": True})] * 4)
    answers = model.generate_until(asked, disable_tqdm=True)
    assert len(set(answers)) == 4
    assert answers == model.generate_until(asked, disable_tqdm=True)


def test_a_learned_table_of_position_is_filled_and_no_further():
    """Its 48 rows are no size of a cache; every row is used."""
    config = tiny_plan(
        position__absolute=(("learned", "position"),),
        position__relative=(),
        sequence_length=48,
        model__vocab_size=259,
    )
    loaded_model = loaded.on_all_devices(
        config, model.init(config, jax.random.key(0)), Characters()
    )
    assert default_lengths(config, harness.MULTIPLES) == (48,)
    (answer,) = harness_model.Harness(loaded_model, 48).generate_until(
        requests("generate_until", [("x" * 100, {"until": [], "max_gen_toks": 20})]),
        disable_tqdm=True,
    )
    assert len(answer) == 20
    with pytest.raises(UserError, match="table of position ends at 48 tokens"):
        harness_model.Harness(loaded_model, 49)


class Characters:
    """A tokenizer of characters that has an end (0), but no beginning."""

    vocab_size, bos_id, ends = 259, -1, frozenset({0})

    def encode(self, text):
        return np.array([ord(c) + 1 for c in text], np.int32)

    def decode(self, ids):
        return "".join(chr(i - 1) for i in ids if i)


def test_texts_begin_with_the_end_where_there_is_no_beginning():
    config = tiny_plan(model__vocab_size=259)
    loaded_model = loaded.on_all_devices(
        config, model.init(config, jax.random.key(0)), Characters()
    )
    harnessed, plain = harness_model.Harness(loaded_model, 32), Plain(loaded_model, 32)
    pairs = [("", "ab"), ("  ", "ab"), ("a", "b")]
    tokens = [[0, 98, 99], [0, 33, 33, 98, 99], [98, 99]]
    found = harnessed.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (total, _), text in zip(found, tokens, strict=True):
        assert total == pytest.approx(plain.score(np.array(text), 1)[0], rel=1e-5)
    (rolling,) = harnessed.loglikelihood_rolling(
        requests("loglikelihood_rolling", [("ab",)]), disable_tqdm=True
    )
    assert rolling == pytest.approx(found[0][0], rel=1e-5)
    asked = requests("generate_until", [("", {"until": [], "max_gen_toks": 4})])
    (answer,) = harnessed.generate_until(asked, disable_tqdm=True)
    more = decode.Generator(loaded_model, 32)([np.array([0])], 4, stop=frozenset({0}))[0]
    assert answer == loaded_model.tokenizer.decode(more)


def test_wrong_requests_are_refused_by_name(loaded_model):
    with pytest.raises(UserError, match="--max_length=8 is less than a continuation of"):
        harness_model.Harness(loaded_model, 8).loglikelihood(
            requests("loglikelihood", [("a", "many words " * 10)]), disable_tqdm=True
        )
    for given, line in (
        ({}, "--max_length=8 has no room for max_gen_toks=256"),
        ({"max_gen_toks": 0}, "has no room for max_gen_toks=0"),
        ({"max_gen_toks": 2, "do_sample": True, "top_p": 0}, "top_p=0.0 must be above 0"),
    ):
        with pytest.raises(UserError, match=line):
            harness_model.Harness(loaded_model, 8).generate_until(
                requests("generate_until", [("a", {"until": [], **given})]), disable_tqdm=True
            )


def test_a_diverged_model_is_refused(loaded_model):
    """The harness takes the first choice where all are NaN, which may be the right one."""
    params = jax.tree.map(lambda x: x * np.nan, loaded_model.params)
    diverged = harness_model.Harness(dataclasses.replace(loaded_model, params=params), 64)
    with pytest.raises(UserError, match="the model has diverged"):
        diverged.loglikelihood(requests("loglikelihood", [("a", " word")]), disable_tqdm=True)


def test_wrong_arguments_are_refused_by_name(run, tasks, tmp_path, monkeypatch):
    manager = TaskManager(include_path=tasks, include_defaults=False)  # the harness's take seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager)
    none = str(tmp_path)
    for path, names, given, line in (
        (run, ["local_choice", "nothing"], {}, "--tasks: nothing is unknown to lm_eval"),
        (run, [], {}, "--tasks is empty"),
        (run, ["local_choice"], {"include_path": "none"}, "--include_path=none: no such directory"),
        (run, ["local_choice"], {"limit": 0}, "--limit=0 must be above 0"),
        (run, ["local_choice"], {"num_fewshot": -1}, "--num_fewshot=-1 must be at least 0"),
        (run, ["local_choice"], {"max_length": 1}, "at least 2 tokens"),
        (run, ["far_away"], {}, "--tasks: far_away cannot be loaded: .*nobody/has_this"),
        (run, ["far_*", "local_choice"], {}, "--tasks: far_away cannot be loaded"),
        (run, ["local_unsafe"], {}, "--tasks: local_unsafe runs code that the model writes"),
        (run, ["local_broken"], {}, "--tasks: local_broken cannot be loaded"),
        (none, ["local_choice"], {}, "no complete checkpoint"),
    ):
        with pytest.raises(UserError, match=line) as found:
            harness.run(path, names, output=none, **given)
        assert "\n" not in str(found.value)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        harness.run(run, ["local_choice"])


def test_what_is_written_is_json():
    found = harness.plain({"a": [np.float64("nan"), np.int64(3), 0.5, float("inf")], "b": None})
    assert found == {"a": [None, 3, 0.5, None], "b": None}
    assert harness.plain({"c": max, "d": (True, "x")})["d"] == [True, "x"]


def test_the_command(run, tasks, command, tmp_path):
    done = command(
        "harness", f"--checkpoint={run}", f"--include_path={tasks}", f"--output={tmp_path}",
        "--tasks=local_[cr]*", "--num_fewshot=1", "--limit=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout and "bits_per_byte" in done.stdout
    assert "cut at 128 tokens" in done.stderr
    result = json.loads((tmp_path / "harness.json").read_text())
    assert result["results"]["local_choice"]["acc,none"] in (0, 0.5, 1)
    assert result["n-shot"]["local_choice"] == 1
    assert result["max_length"] == 128 and result["lm_eval"] == lm_eval.__version__
    assert result["position"]["relative"] == [["rope", "segment"]]
