import importlib.util
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from tiny import tiny_plan

from bipe_jax import segments
from bipe_jax.data import tokenizer
from bipe_jax.errors import UserError
from bipe_jax.segments import Rule

SLOW_TO_DRAW = hypothesis.settings(deadline=None, max_examples=40)  # a new shape compiles first
NAMES = ("position", "segment", "offset")


def by_hand(tokens, rule, document_ids=None):
    """The definition, one token after the other: a list of (position, segment, offset)."""
    result = []
    position = segment = offset = 0
    for i, token in enumerate(tokens):
        if document_ids is not None and i > 0 and document_ids[i] != document_ids[i - 1]:
            position = segment = offset = 0
        result.append((position, segment, offset))
        position += 1
        offset += 1
        if (position % rule.length == 0) if rule.length else (token in rule.separators):
            segment += 1
            offset = 0
    return result


def check(actual, tokens, rule, document_ids=None):
    """Compares the coordinates of (B, L) tokens with those made by hand."""
    rows = range(len(tokens))
    expected = [
        by_hand(tokens[b], rule, None if document_ids is None else document_ids[b]) for b in rows
    ]
    assert set(actual) == set(NAMES)
    for name, wanted in zip(NAMES, np.moveaxis(np.array(expected), -1, 0), strict=True):
        assert actual[name].dtype == np.int32
        np.testing.assert_array_equal(actual[name], wanted, err_msg=name)


def arrays(shape, largest):
    """NumPy integers from 0 to `largest`."""
    count = int(np.prod(shape))
    values = st.lists(st.integers(0, largest), min_size=count, max_size=count)
    return values.map(lambda v: np.array(v, np.int32).reshape(shape))


rules = st.one_of(
    st.sets(st.integers(0, 6), max_size=4).map(lambda ids: Rule(separators=tuple(ids))),
    st.integers(1, 9).map(lambda length: Rule(length=length)),
)


@SLOW_TO_DRAW
@hypothesis.given(st.data(), rules, st.integers(1, 30), st.booleans())
def test_coordinates_of_numpy_tokens_are_those_made_by_hand(data, rule, length, with_documents):
    tokens = data.draw(arrays((2, length), largest=9))
    # Any change of id starts a document, also one back to an earlier id.
    document_ids = data.draw(arrays((2, length), largest=2)) if with_documents else None
    actual = segments.coordinates(tokens, rule, document_ids)
    assert all(isinstance(x, np.ndarray) for x in actual.values())
    check(actual, tokens, rule, document_ids)


# Few rules and one shape, so that little is compiled.
FEW_RULES = (Rule(separators=(3, 0)), Rule(), Rule(length=1), Rule(length=5))
on_jax = jax.jit(segments.coordinates, static_argnums=1)
advance = jax.jit(segments.advance, static_argnums=2)


@pytest.mark.parametrize("rule", FEW_RULES)
@SLOW_TO_DRAW
@hypothesis.given(st.data(), st.booleans())
def test_coordinates_of_jax_tokens_are_those_made_by_hand(rule, data, with_documents):
    tokens = data.draw(arrays((2, 17), largest=5))
    document_ids = data.draw(arrays((2, 17), largest=1)) if with_documents else None
    ids = None if document_ids is None else jnp.asarray(document_ids)
    check(on_jax(jnp.asarray(tokens), rule, ids), tokens, rule, document_ids)


def test_coordinates_without_jit_are_jax_arrays():
    actual = segments.coordinates(jnp.array([[7, 1, 7]]), Rule(separators=(1,)))
    assert all(isinstance(x, jax.Array) for x in actual.values())
    assert actual["segment"].tolist() == [[0, 0, 1]]


def test_coordinates_take_any_number_of_leading_dimensions():
    tokens = np.random.default_rng(0).integers(0, 6, (2, 3, 20))
    rule = Rule(separators=(1, 4))
    together = segments.coordinates(tokens, rule)
    one = segments.coordinates(tokens[1, 2], rule)
    check({name: x[None] for name, x in one.items()}, tokens[1, 2][None], rule)
    check({name: x.reshape(6, 20) for name, x in together.items()}, tokens.reshape(6, 20), rule)


@pytest.mark.parametrize("rule", FEW_RULES)
@SLOW_TO_DRAW
@hypothesis.given(arrays((3, 12), largest=5))
def test_advance_step_by_step_gives_the_coordinates_made_by_hand(rule, tokens):
    state = segments.start((3,))
    states = [state]
    for token in tokens.T[:-1]:
        state = advance(state, token, rule)
        states.append(state)
    check({name: np.stack([s[name] for s in states], axis=1) for name in NAMES}, tokens, rule)


@pytest.fixture(scope="module")
def real_model():
    """Path of a SentencePiece model of 32000 pieces (of a Llama-like tokenizer with bytes)."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("mistral_common, which carries a real SentencePiece model, is not installed")
    return pathlib.Path(spec.submodule_search_locations[0], "data", "tokenizer.model.v1")


@pytest.fixture(scope="module")
def real_texts(real_model):
    """What each id adds when it is decoded after the letter x."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(real_model))
    x = processor.piece_to_id("x")
    texts = [processor.decode([x, i]) for i in range(processor.vocab_size())]
    assert all(text.startswith("x") for text in texts)
    return [text[1:] for text in texts]


def is_sentence_end(text):
    end = text.rstrip().rstrip("\"'”’»)]")
    return "\n" in text or end.endswith((".", "!", "?", "…", "。", "！", "？"))


@pytest.mark.parametrize(
    "name, is_separator, examples",
    [
        ("sentence", is_sentence_end, ["\n", ".", " .", "!", "?", '."', ".)", " ...", "。"]),
        ("newline", lambda text: "\n" in text, ["\n"]),
        (
            "newline-and-spaced-period",
            lambda text: "\n" in text or text == " .",
            ["\n", " ."],
        ),
    ],
)
def test_a_rule_picks_the_pieces_of_a_real_tokenizer(
    name, is_separator, examples, real_model, real_texts
):
    rule = segments.resolve(name, tokenizer.load(str(real_model)).pieces())
    chosen = {i for i, text in enumerate(real_texts) if is_separator(text)}
    assert set(rule.separators) == chosen
    assert {real_texts[i] for i in rule.separators} >= set(examples)
    assert rule.length == 0


def test_the_sentence_rule_cuts_a_real_text_into_its_sentences_and_lines(real_model):
    tok = tokenizer.load(str(real_model))
    sentences = ["Hello there.", 'He asked: "Why?"', "No end\n", "Wait... what!", "The rest"]
    ids = tok.encode(" ".join(sentences))
    segment = segments.coordinates(ids, segments.resolve("sentence", tok.pieces()))["segment"]
    found = [tok.decode(ids[segment == s]) for s in range(segment[-1] + 1)]
    assert [text.strip() for text in found] == [
        "Hello there.", 'He asked: "Why?"', "No end", "Wait...", "what!", "The rest",
    ]  # fmt: skip


def test_fixed_needs_no_separator_and_no_tokenizer():
    assert segments.resolve("fixed:16", []) == Rule(length=16)


@pytest.mark.parametrize(
    "name", ["Paragraph", "", "Sentence", "fixed", "fixed:", "fixed:0", "fixed:-3", "fixed:3.5"]
)
def test_an_unknown_rule_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"segments.rule={name!r} is unknown"):
        segments.resolve(name, ["\n", "."])


@pytest.mark.parametrize("name", ["sentence", "newline", "newline-and-spaced-period"])
def test_a_tokenizer_without_separators_is_refused(name):
    with pytest.raises(UserError, match=f"segments.rule='{name}' finds no separator"):
        segments.resolve(name, ["", "a", "b.c", " ", "1"])


def test_a_resolved_config_holds_its_rule():
    by_id = tiny_plan(segments__rule="newline", separators=(4, 9))
    assert by_id.segment_rule == Rule(separators=(4, 9))
    fixed = tiny_plan(segments__rule="fixed:12", separators=())
    assert fixed.segment_rule == Rule(length=12)
