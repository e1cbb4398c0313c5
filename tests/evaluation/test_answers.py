"""Answers to examples: models that cheat are scored as they should be, and scoring agrees with decoding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipe_jax import model, plan, segments, synthetic
from bipe_jax.config.spec import parse_source
from bipe_jax.data import marked, sources, tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import answer_tables, answers, decode, ending, example_scoring, loaded
from bipe_jax.output import Output
from configs import smoke


def loaded_for(task: str, rule: str, count: int = 12) -> loaded.LoadedModel:
    """A model of random parameters for a synthetic task."""
    words = synthetic.parse(task).words
    options = f"{task[:-1]}, " if task.endswith(")") else f"{task}("
    c = smoke.get_config()
    c.data.train = f"synthetic:{task}"
    c.data.evaluation = f"synthetic:{options}split=test, count={count})"
    c.data.packing, c.segments.rule, c.tokenizer.path = "row", rule, ""
    c.sequence_length, c.model.vocab_size, c.loss_chunk = 128, 3 + len(words), 16
    tokens = tokenizer.load("symbols:" + " ".join(words))
    config = plan.make(c)
    config = config.with_rule(segments.rule_of(config, tokens.pieces(), tokens.bos_id))
    params = jax.tree.map(lambda x: 3 * x, model.init(config, jax.random.key(1)))
    return loaded.on_all_devices(config, params, tokens, step=7)


def pretending(monkeypatch, logits):
    """Makes the scorers see the logits (B, L, V) that a function of the model's inputs returns."""

    def hidden(config, params, batch):
        x = logits(batch)
        return x, Output(jnp.eye(x.shape[-1]))

    monkeypatch.setattr(example_scoring.model, "hidden", hidden)


@pytest.fixture(autouse=True)
def few_examples_of_the_training(monkeypatch):
    monkeypatch.setattr(answers, "_TRAINED_EXAMPLES", 100)


@pytest.fixture(scope="module")
def arithmetic():
    return loaded_for("arithmetic(operators=1:4)", "regex:=")


def test_scores_are_those_of_greedy_decoding(arithmetic, tmp_path):
    """What the model writes itself is right, and one token of it that is changed is the first wrong one."""
    tokens, room = arithmetic.tokenizer, 12
    random = np.random.RandomState(0)
    words = [word for word in tokens.ids() if word != "="]
    prompts = [" ".join([*random.choice(words, 1 + i % 5), "="]) for i in range(64)]
    generator = decode.Generator(arithmetic, 128)
    encoded = [tokens.encode(prompt) for prompt in prompts]
    written = generator(encoded, room, stop=frozenset({tokens.eos_id}))
    assert any(0 < len(own) < room for own in written), "no answer ends"
    lines, wanted = [], []
    for i, (prompt, own) in enumerate(zip(prompts, written, strict=True)):
        if not len(own) or min(own) <= tokens.bos_id:  # nothing, or no words
            continue
        said = tokens.decode(own).split()
        ends = len(own) < room
        lines.append((prompt, said))
        wanted.append((ends, None if ends else len(said)))
        at = i % len(said)
        changed = [*said[:at], next(word for word in words if word != said[at]), *said[at + 1 :]]
        lines.append((prompt, changed))
        wanted.append((False, at))
    records = [{"prompt": prompt, "completion": " ".join(said)} for prompt, said in lines]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (of_source,) = answers.measure(arithmetic, f"examples:{path}")["results"]
    assert [(i["whole"], i["first_wrong"]) for i in of_source["items"]] == wanted
    assert {at for _, at in wanted} >= {None, 0, 1, 2}
    # The answer is all of a completion here; only one that ends, and is as it was written, has it.
    assert [i["answer"] for i in of_source["items"]] == [whole for whole, _ in wanted]


def test_a_model_that_copies_or_guesses_is_not_right_and_one_that_knows_is(arithmetic, monkeypatch):
    V = arithmetic.config.model.vocab_size
    monkeypatch.setattr(answers, "_decoded_answers", lambda _, encoded: [False] * len(encoded))

    def whole(logits):
        pretending(monkeypatch, logits)
        (of_source,) = answers.measure(arithmetic)["results"]
        return [item["whole"] for item in of_source["items"]], of_source["items"]

    following = lambda b: jnp.roll(b["tokens"], -1, 1)  # noqa: E731
    # The inputs end with EOS, and the padding repeats it: all that follows is known.
    knows, items = whole(lambda b: jax.nn.one_hot(following(b), V))
    assert all(knows) and {item["first_wrong"] for item in items} == {None}
    # It never ends: EOS, the last token that is learned, is its first wrong one.
    eos = arithmetic.tokenizer.eos_id
    goes_on, items = whole(
        lambda b: jax.nn.one_hot(jnp.where(following(b) == eos, 5, following(b)), V)
    )
    assert not any(goes_on)
    assert [item["first_wrong"] for item in items] == [item["learned"] - 1 for item in items]
    copies, items = whole(lambda b: jax.nn.one_hot(b["tokens"], V))
    assert not any(copies)
    guesses, items = whole(lambda b: jnp.zeros((*b["tokens"].shape, V)).at[..., 9].set(1))
    assert not any(guesses)


def test_sets_are_right_by_group_and_coordinate(monkeypatch):
    loaded_model = loaded_for("bi-nfa(states=3, segments=2:5)", "data")
    ids, V = loaded_model.tokenizer.ids(), loaded_model.config.model.vocab_size
    documents = list(sources.documents(parse_source(loaded_model.config.data.evaluation)))
    truth = {}
    for document in documents:
        row, _ = marked.encode_whole(loaded_model.tokenizer, document, ("data:0",))
        truth[tuple(row["tokens"].tolist())] = row["sets"]

    def measured(change):
        def logits(batch):
            tokens = np.asarray(batch["tokens"])
            sets = np.zeros_like(tokens)
            for i, own in enumerate(tokens):
                text = next(t for t in truth if tuple(own[: len(t)].tolist()) == t)
                sets[i, : len(text)] = truth[text]
            bits = (change(sets, np.asarray(batch["segment"]))[..., None] >> np.arange(V)) & 1
            return np.where(bits, 1.0, -1.0).astype(np.float32)

        def hidden(config, params, batch):
            shape = (*batch["tokens"].shape, V)
            kinds = jax.ShapeDtypeStruct(shape, jnp.float32)
            return jax.pure_callback(logits, kinds, dict(batch)), Output(jnp.eye(V))

        monkeypatch.setattr(example_scoring.model, "hidden", hidden)
        (of_source,) = answers.measure(loaded_model)["results"]
        return of_source

    knows = measured(lambda sets, _: sets)
    counts = [item["groups"] for item in knows["items"]]
    assert all(g[n]["right"] == g[n]["total"] and g[n]["last"] for g in counts for n in g)
    for document, groups in zip(documents, counts, strict=True):
        words = document["text"].split()
        assert groups["outer"]["total"] == words.count("#")
        assert groups["inner"]["total"] == len(words) - words.count("#")
        assert groups["accept"]["total"] == 1

    # It forgets the outer set from segment 2 on: only that is wrong, and only there.
    q = sum(1 << ids[f"q{i}"] for i in range(3))
    forgets = measured(lambda sets, segment: np.where(segment >= 2, sets & ~q, sets))
    by = forgets["by"]["outer"]["segment"]
    assert all((right == total) == (value < 2) for value, right, total in by)
    assert all(right == total for _, right, total in forgets["by"]["inner"]["segment"])
    for document, item in zip(documents, forgets["items"], strict=True):
        assert item["groups"]["outer"]["right"] == 2
        assert item["groups"]["outer"]["last"] == (document["labels"]["segments"] == 2)

    # The majority's answer, no state at all, is never right for an inner set.
    empty = measured(lambda sets, _: 0 * sets)
    assert all(item["groups"]["inner"]["right"] == 0 for item in empty["items"])


def test_unseen_coordinates_are_labelled(arithmetic):
    longer = "synthetic:arithmetic(operators=30, split=test, count=3)"
    (of_source,) = answers.measure(arithmetic, longer)["results"]
    trained = answers.measure(arithmetic)["trained"]
    assert trained["segment"] == 4
    for item in of_source["items"]:
        assert item["labels"]["unseen_segment"] and item["labels"]["operators"] == 30
        assert item["labels"]["unseen_offset"] == (item["labels"]["longest"] > trained["offset"])
        assert item["labels"]["unseen_offset"]


def test_tables_are_by_label(arithmetic):
    text = answer_tables.tables(answers.measure(arithmetic))
    assert "operators 4" in text and "%" in text


def test_wrong_sources_are_refused_by_name(arithmetic):
    with pytest.raises(UserError, match="count=1000"):
        answers.measure(arithmetic, "synthetic:arithmetic(split=test)")
    with pytest.raises(UserError, match="it is text"):
        answers.measure(arithmetic, "quickstart:validation")
    with pytest.raises(UserError, match="no word"):
        answers.measure(arithmetic, "synthetic:recall(split=test, count=2)")


@pytest.mark.slow
def test_a_training_ends_with_its_answers(tmp_path, command):
    workdir = str(tmp_path / "run")
    changes = {
        "data.train": "synthetic:fold(operators=1:2)",
        "data.evaluation": "synthetic:fold(operators=2, split=test, count=4);"
        "synthetic:fold(operators=3, split=test, count=3)",
        "data.packing": "row",
        "segments.rule": "regex:;",
        "model.vocab_size": 20,
        "sequence_length": 16,
        "loss_chunk": 8,
        "steps": 6,
    }
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    done = command("train", "--config=smoke", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    assert "synthetic:fold(operators=3" in done.stdout
    done = command("evaluate", f"--checkpoint={workdir}", "--lengths=8")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --lengths is for text")
    written = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert [len(one["items"]) for one in written["results"]] == [4, 3]
    assert written["step"] == 6 and written["kind"] == "answers"
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # 4 rows of 8 learn 1 or 3 tokens of a fold: none of EOS, which follows none of them.
    assert 8 <= json.loads(metrics[-1])["targets"] <= 24


def test_a_config_is_checked_before_the_training():
    c = smoke.get_config()
    c.data.train, c.data.packing = "synthetic:arithmetic", "row"
    c.data.evaluation = "synthetic:arithmetic(split=test)"
    with pytest.raises(UserError, match="count=1000"):
        ending.of(plan.make(c))
