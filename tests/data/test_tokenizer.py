"""Tokenizers: what goes in comes out, bytes are counted, and the right one is chosen."""

import importlib.util
import io
import json
import os

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_plan

from bipe_jax.data import tokenizer, vocabulary
from bipe_jax.errors import UserError

TEXTS = [
    "",
    "To be, or not to be.\nThat is the question:\n\n\n\tWhether",
    "  two   spaces     and more        ",
    "\n",
    " ",
    "\t\tif x:\n\t\t\treturn 1\r\n",
    "na\u00efve caf\u00e9, e\u0301, \ufb01, \u2460, \u4e2d\u6587, \u0436",  # kept, not normalised
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \ufeff \u2028 \u00a0 \u3000 \x00 \x7f",
    "<s> </s> <unk> <0x0A> <pad>",
    "3.14159 1234567890",
]
# SentencePiece writes a space as U+2581, so that this character itself comes back as a space.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def trained(tokenizer_file):
    return tokenizer.load(tokenizer_file)


@pytest.fixture(scope="module")
def real():
    """The tokenizer of Mistral 7B, of the same kind as Llama's, from the package mistral-common."""
    package = importlib.util.find_spec("mistral_common").submodule_search_locations[0]
    return tokenizer.load(os.path.join(package, "data", "tokenizer.model.v1"))


@pytest.fixture(scope="module")
def real_sizes(real):
    return real.byte_lengths()


def assert_kept(tokens, sizes, text, added_bytes):
    ids = tokens.encode(text)
    assert ids.dtype == np.int32
    assert ids[0] == tokens.bos_id
    assert tokens.bos_id not in ids[1:]
    assert tokens.decode(ids) == text
    assert sizes[ids].sum() == len(text.encode()) + added_bytes


@pytest.mark.parametrize("text", TEXTS)
def test_a_trained_tokenizer_keeps_text_and_counts_its_bytes(trained, text):
    assert_kept(trained, trained.byte_lengths(), text, 0)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_a_trained_tokenizer_keeps_any_text_and_counts_its_bytes(trained, text):
    assert_kept(trained, trained.byte_lengths(), text, 0)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_the_real_tokenizer_keeps_any_text_and_counts_its_bytes(real, real_sizes, text):
    assert_kept(real, real_sizes, text, 1 if text else 0)  # it puts a space before every text


def test_pieces_of_the_real_tokenizer(real):
    pieces = real.pieces()
    assert real.vocab_size == len(pieces) == len(real.byte_lengths()) == 32000
    assert real.bos_id == 1
    assert pieces[:3] == ["", "", ""]  # <unk>, <s>, </s>
    assert pieces[3 + ord("\n")] == "\n"
    assert pieces[3 + 0x7F] == "\x7f"
    assert pieces[3 + 0x80] == ""  # a byte that is no character by itself
    assert (real.byte_lengths()[3 : 3 + 256] == 1).all()
    ids = real.encode("The caf\u00e9 is 3 days old.\n")
    assert "".join(pieces[i] for i in ids) == " The caf\u00e9 is 3 days old.\n"
    assert "" not in [pieces[i] for i in ids[1:]]


def test_a_newline_is_a_piece_of_its_own(trained):
    pieces = trained.pieces()
    assert {piece for piece in pieces if "\n" in piece} == {"\n"}
    ids = trained.encode("one\n\n  two\n")
    assert [pieces[i] for i in ids].count("\n") == 3


def test_bytes_take_the_place_of_characters_that_were_not_seen(trained):
    pieces = trained.pieces()
    assert "\U0001f600" not in pieces
    ids = trained.encode("\U0001f600")
    assert [trained.byte_lengths()[i] for i in ids] == [0, 1, 1, 1, 1]


def test_training_twice_gives_the_same_bytes(texts, trained):
    assert tokenizer.train(iter(texts), trained.vocab_size, 200_000).model == trained.model


def test_only_so_many_bytes_are_trained_on(texts):
    text = "\n".join(texts)
    limited = tokenizer.train([text[:20_000] + "\u0436" * 20_000], 400, 20_000)
    assert "\u0436" not in "".join(limited.pieces())


@pytest.mark.parametrize("kept", [[], [""], ["a b c\n"] * 9])
def test_too_little_text_is_refused(kept):
    with pytest.raises(UserError, match=r"tokenizer with model\.vocab_size=500"):
        tokenizer.train(kept, 500, 1000)


def test_too_small_a_vocabulary_is_refused(texts):
    with pytest.raises(UserError, match=r"tokenizer with model\.vocab_size=100"):
        tokenizer.train(texts, 100, 100_000)


def test_files_that_are_no_tokenizer_are_named(tmp_path):
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"\x00 not a model")
    empty = tmp_path / "empty.model"
    empty.write_bytes(b"")
    for path, message in (
        (tmp_path / "none.model", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (junk, "is not a SentencePiece model"),
        (empty, "is not a SentencePiece model"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            tokenizer.load(str(path))
        assert f"tokenizer.path={str(path)!r}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def other(texts):
    """Another tokenizer of the same size."""
    return tokenizer.train(texts[:12], 512, 100_000)


def run_config(shards, **overrides):
    overrides = {"model__vocab_size": 512, "tokenizer__train_bytes": 50_000} | overrides
    return tiny_plan(data__train=shards, **overrides)


def test_choose_trains_once_and_keeps_the_file(shards, tmp_path):
    config = run_config(shards)
    first = vocabulary.choose(config, str(tmp_path), None)
    assert first.vocab_size == 512
    assert os.listdir(tmp_path) == ["tokenizer.model"]
    assert (tmp_path / "tokenizer.model").read_bytes() == first.model


def test_choose_takes_the_file_that_was_kept(shards, tmp_path, other):
    (tmp_path / "tokenizer.model").write_bytes(other.model)
    assert vocabulary.choose(run_config(shards), str(tmp_path), None).model == other.model


def test_choose_takes_the_checkpoints_before_the_file(shards, tmp_path, trained, other):
    (tmp_path / "tokenizer.model").write_bytes(other.model)
    assert vocabulary.choose(run_config(shards), str(tmp_path), trained).model == trained.model


def test_choose_takes_the_configs_if_it_is_the_checkpoints(
    shards, tmp_path, trained, tokenizer_file, other
):
    config = run_config(shards, tokenizer__path=tokenizer_file)
    (tmp_path / "tokenizer.model").write_bytes(other.model)
    assert vocabulary.choose(config, str(tmp_path), None).model == trained.model
    assert vocabulary.choose(config, str(tmp_path), trained).model == trained.model
    with pytest.raises(UserError, match="another one than the checkpoint") as caught:
        vocabulary.choose(config, str(tmp_path), other)
    assert tokenizer_file in str(caught.value)


def test_choose_refuses_another_size(shards, tmp_path, trained, tokenizer_file):
    message = r"config\.model\.vocab_size=600, but the tokenizer .* has 512 pieces"
    by_path = run_config(shards, model__vocab_size=600, tokenizer__path=tokenizer_file)
    by_checkpoint = run_config(shards, model__vocab_size=600)
    with pytest.raises(UserError, match=message):
        vocabulary.choose(by_path, str(tmp_path), None)
    with pytest.raises(UserError, match=message):
        vocabulary.choose(by_checkpoint, str(tmp_path), trained)
    (tmp_path / "tokenizer.model").write_bytes(trained.model)
    with pytest.raises(UserError, match=message):
        vocabulary.choose(by_checkpoint, str(tmp_path), None)


def test_choose_trains_on_all_documents_of_the_named_sets(texts, tmp_path):
    """One document is far longer than what is trained on; short ones still have their share."""
    long, short = " ".join(texts), texts[0][:2000]
    documents = [("A", long), ("A", "\u0436" * 50 + short), ("B", "\u042f" * 5000)]
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for name, text in documents:
            file.write(json.dumps({"text": text, "meta": {"pile_set_name": name}}) + "\n")
    config = run_config(
        str(path), data__sets=("A",), model__vocab_size=400, tokenizer__train_bytes=20_000
    )
    characters = "".join(vocabulary.choose(config, str(tmp_path), None).pieces())
    assert "\u0436" in characters
    assert "\u042f" not in characters


def trained_with(lines, **options) -> tokenizer.Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, minloglevel=2, **options
    )
    return tokenizer.Tokenizer(model.getvalue())


def test_documents_are_separated_by_what_the_tokenizer_has(texts, shards):
    lines = [line for text in texts for line in text.splitlines() if line]
    for options, separator, remark in (
        ({}, "<s>", None),
        ({"bos_id": -1}, "</s>", "has no BOS: each document begins with EOS"),
        (
            {"bos_id": -1, "eos_id": -1},
            None,
            "has neither BOS nor EOS: nothing separates documents",
        ),
    ):
        tokens = trained_with(lines, **options)
        ids = tokens.encode("the")
        remarks = vocabulary.remarks(run_config(shards), tokens)
        if separator:
            processor = sentencepiece.SentencePieceProcessor(model_proto=tokens.model)
            assert ids[0] == tokens.bos_id == processor.piece_to_id(separator)
        else:
            assert tokens.bos_id == -1 and tokens.decode(ids) == "the"
        assert [line for line in remarks if "BOS" in line] == (
            [f"The tokenizer {remark}"] if remark else []
        )
        # SentencePiece's default normaliser squeezes spaces and drops newlines.
        assert "replaces" in remarks[-1] and "%" in remarks[-1]


def test_nothing_is_said_of_a_tokenizer_that_keeps_text(trained, shards):
    assert vocabulary.remarks(run_config(shards), trained) == []


def test_train_bytes_are_bytes_of_short_documents_too(tmp_path):
    path = tmp_path / "short.jsonl"
    with open(path, "w") as file:
        for i in range(30_000):
            file.write(json.dumps({"text": f"short document {i}"}) + "\n")
    for size in (100_000, 300_000, 10_000_000):
        config = run_config(str(path), tokenizer__train_bytes=size)
        sample = list(vocabulary._sample_texts(config, size))
        total = sum(map(len, sample))
        assert total >= min(size, 568_890) and len(sample) >= 2000
    assert len(sample) == 30_000


def test_other_scores_of_the_same_pieces_are_another_tokenizer(shards, tmp_path, trained):
    """The file may be replaced between a stop and the resumption."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(trained.model)
    for piece in model.pieces[300:]:
        piece.score -= 3
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    other = tokenizer.load(f"{tmp_path}/other.model")
    assert other.pieces() == trained.pieces()
    config = run_config(shards, tokenizer__path=f"{tmp_path}/other.model")
    with pytest.raises(UserError, match=r"other\.model' is another one than the checkpoint's"):
        vocabulary.choose(config, str(tmp_path), trained)
