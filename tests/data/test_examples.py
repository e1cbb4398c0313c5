"""Examples: which tokens are learned, how they are packed, and that a stream of them resumes exactly."""

import json

import numpy as np
import pytest

from bipe_jax import plan, segments, synthetic
from bipe_jax.config.spec import parse_source
from bipe_jax.data import marked, packing, sources, symbols, tokenizer
from bipe_jax.data.batches import Batches
from bipe_jax.errors import UserError
from bipe_jax.plan import make

PROMPTS = [
    ("the king of", " france"),
    ("who is there", "\nnay answer me"),
    ("long live", " the king and the queen"),
    ("a", " b"),
]


@pytest.fixture
def examples(tmp_path):
    lines = [
        {"prompt": p, "completion": c, "labels": {"words": len(c.split())}} for p, c in PROMPTS
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines * 8))
    return f"examples:{tmp_path}/examples.jsonl"


def with_examples(config, source, **changes):
    config.data.train = config.data.evaluation = source
    config.data.packing = "row"
    for name, value in changes.items():
        config[name] = value
    return config


def test_prompt_and_completion_are_tokenised_apart_and_eos_is_learned(examples, tokenizer_file):
    tokens = tokenizer.load(tokenizer_file)
    documents = list(sources.documents(parse_source(examples)))
    for document, (prompt, completion) in zip(documents, PROMPTS, strict=False):
        row, _ = marked.encode_whole(tokens, document, ())
        before, after = tokens.encode(prompt), tokens.encode_parts([completion], [False])[0]
        assert row["tokens"].tolist() == [*before, *after, tokens.eos_id]
        assert row["learned"].tolist() == [0] * len(before) + [1] * (len(after) + 1)
        assert document["answer"] == completion
        assert document["labels"] == {"words": len(completion.split())}


def test_weights_are_those_of_learned_targets(config, examples):
    config = make(with_examples(config, examples, sequence_length=24, batch_size=4))
    tokens = tokenizer.load(config.tokenizer.path)
    rule = segments.rule_of(config, tokens.pieces(), tokens.bos_id)
    batches = Batches(config.with_rule(rule), tokens)
    batch = next(batches)
    batches.close()
    whole = {c: tokens.encode_parts([c], [False])[0].tolist() for _, c in PROMPTS}
    seen = set()
    for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
        learned = targets[weights > 0].tolist()
        assert learned[-1] == tokens.eos_id
        seen |= {c for c, ids in whole.items() if ids == learned[:-1]}
    assert len(seen) > 1


@pytest.mark.parametrize("kind", ["row", "document"])
def test_no_example_is_cut_and_resuming_is_exact(config, examples, kind):
    config = with_examples(config, examples, sequence_length=24, batch_size=2)
    config.data.packing, config.data.separate_documents = kind, kind == "document"
    config.data.shuffle_blocks, config.data.workers = 3, 0
    config = make(config)
    tokens = tokenizer.load(config.tokenizer.path)
    config = config.with_rule(segments.rule_of(config, tokens.pieces(), tokens.bos_id))
    batches = Batches(config, tokens)
    seen, states = [], []
    for _ in range(20):
        seen.append(next(batches))
        states.append(batches.get_state())
    batches.close()
    known = {tuple(marked.encode_whole(tokens, d, ())[0]["tokens"].tolist())
             for d in sources.documents(config.training.sources[0])}  # fmt: skip
    for batch in seen:
        ids = batch.get("document_ids", np.ones_like(batch["tokens"]))
        for row in range(2):
            whole = np.append(batch["tokens"][row], batch["targets"][row, -1])
            own_ids = np.append(ids[row], ids[row, -1])
            for number in np.unique(own_ids[own_ids > 0]):
                text = whole[own_ids == number]
                text = text[: len(text) - (text[::-1] != 0).argmax()] if kind == "row" else text
                assert any(text.tolist() == list(one[: len(text)]) for one in known)
    for at in (3, 11):
        again = Batches(config, tokens)
        again.set_state(json.loads(json.dumps(states[at])))
        for batch in seen[at + 1 :]:
            for name, array in next(again).items():
                np.testing.assert_array_equal(array, batch[name], err_msg=name)
        again.close()


def test_a_row_holds_one_document_and_examples_are_not_cut():
    ids = np.repeat([1, 2, 3], [3, 5, 1]).astype(np.int32)
    rows = {"tokens": np.arange(1, 10, dtype=np.int32), "document_ids": ids}
    packed = packing.row(rows, 5)
    assert packed["tokens"].tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]]
    assert (packed["document_ids"] == (packed["tokens"] > 0)).all()
    cut = packing.row(rows, 4)
    assert cut["tokens"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 7], [8, 0, 0, 0], [9, 0, 0, 0]]
    with pytest.raises(UserError, match="5 tokens, more than sequence_length"):
        packing.row(rows | {"learned": np.ones_like(ids)}, 4)
    with pytest.raises(UserError, match="5 tokens"):
        packing.document(rows | {"learned": np.ones_like(ids)}, 4)


def test_text_and_examples_are_not_taken_for_each_other(config, examples, shards):
    for source, named in (
        (f"examples:{shards}", "holds text"),
        (examples[9:], "name it 'examples:"),
    ):
        with pytest.raises(UserError, match=named):
            next(sources.documents(parse_source(source)))
    with pytest.raises(UserError, match="must stay whole"):
        config = with_examples(config, examples)
        config.data.packing = "concat"
        plan.make(config)


def test_text_and_examples_are_mixed_with_all_of_the_text_learned(config, examples, shards):
    config.data.train = f"{examples}@0.5; {shards}@0.5"
    config.data.packing, config.data.separate_documents = "document", True
    config = make(config)
    tokens = tokenizer.load(config.tokenizer.path)
    config = config.with_rule(segments.rule_of(config, tokens.pieces(), tokens.bos_id))
    batches = Batches(config, tokens)
    shares = [(row > 0).mean() for _ in range(2) for row in next(batches)["weights"]]
    batches.close()
    assert min(shares) < 0.7 and max(shares) > 0.95


def test_sets_are_bits_of_the_tokens_that_they_label(config):
    config.data.train = "synthetic:bi-nfa(states=3, count=60)"
    config.data.evaluation = "synthetic:bi-nfa(states=3, split=test, count=4)"
    config.data.packing, config.segments.rule = "row", "data"
    config.sequence_length, config.model.vocab_size, config.tokenizer.path = 128, 17, ""
    config = make(config)
    task = synthetic.parse("bi-nfa(states=3)")
    tokens = tokenizer.load("symbols:" + " ".join(task.words))
    config = config.with_rule(segments.rule_of(config, tokens.pieces(), tokens.bos_id))
    batches = Batches(config, tokens)
    batch = next(batches)
    batches.close()
    examples = {task.example(i)["text"]: task.example(i) for i in range(60)}
    ids = tokens.ids()
    for row in range(len(batch["tokens"])):
        words = tokens.decode(batch["tokens"][row][batch["tokens"][row] > 0])
        example = examples[words]
        for i, (own, among) in enumerate(example["sets"], 1):
            assert batch["targets"][row, i] == sum(1 << ids[word] for word in own)
            assert batch["among"][row, i] == sum(1 << ids[word] for word in among)
        last = len(example["sets"]) + 1
        assert batch["weights"][row].tolist() == [0] + [1] * (last - 1) + [0] * (128 - last)
        starts = [words[:at].count(" ") + 1 for at in example["segments"][0]]
        begins = np.flatnonzero(np.diff(batch["segment"][row, :last], prepend=0)).tolist()
        assert begins == starts


def test_words_are_a_tokenizer_that_refuses_others(tokenizer_file):
    tokens = tokenizer.load("symbols:a b # 10")
    assert tokens.encode("a 10 # b").tolist() == [tokens.bos_id, 3, 6, 5, 4]
    assert tokens.decode([3, 6, 5]) == "a 10 #" and tokens.vocab_size == 7
    assert tokenizer.Tokenizer(tokens.model).is_of_words
    unigram = tokenizer.load(tokenizer_file)
    assert not unigram.is_of_words
    assert not any(symbols.is_model(b) for b in (b"", b"text", b"\xff" * 99))
    with pytest.raises(UserError, match="no word 'c'"):
        tokens.encode("a c")
    for wrong in ("symbols:", "symbols:a b a", "symbols:<s>"):
        with pytest.raises(UserError, match=r"tokenizer\.path"):
            tokenizer.load(wrong)


def test_the_model_of_words_is_what_protobuf_writes():
    try:
        from sentencepiece import sentencepiece_model_pb2 as messages
    except Exception as error:  # the protobuf that is installed is older than its classes
        pytest.skip(str(error))
    words = ["a", "b", "#", *(f"k{i}" for i in range(300))]
    proto = messages.ModelProto()
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3), *(("\u2581" + w, 1) for w in words)):
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    spec.model_type, spec.vocab_size = spec.WORD, len(proto.pieces)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.escape_whitespaces = True
    normalizer.remove_extra_whitespaces = True
    assert symbols.model("symbols:" + " ".join(words)) == proto.SerializeToString()
