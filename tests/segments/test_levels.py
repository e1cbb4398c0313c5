"""Levels of segments, and rules by the text: against one token after the other, by hand."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny, tiny_plan

from bipe_jax import plan, positions, segments
from bipe_jax.errors import UserError

BOS = 0
PIECES = [
    "",
    "a",
    ".",
    "\n",
    " ",
    "b\n",
    "\n\n",
    "def",
    " c",
    "d",
    "ef",
    "# ",
    "a. \n \n b",
    "\t\n",
]
SOME = hypothesis.settings(deadline=None, max_examples=60)

# Rule -> (whether a segment begins with the token that completes a match, the pattern).
PATTERNS = {
    "paragraph": (False, r"\S[\s\S]*\n[ \t\r]*\n"),
    "chapter": (True, r"\n(CHAPTER|Chapter|PART|BOOK|#|\\chapter|\\section)"),
    "def": (True, r"\n(async def|def|class|@)"),
    "regex:a+b?": (False, "a+b?"),
    "regex:[^\n]{2}\n": (False, "[^\n]{2}\n"),
    "before:(?i:D)e": (True, "(?i:D)e"),
}
RULES = [
    ("sentence",),
    ("newline", "paragraph"),
    ("fixed:3", "newline"),
    ("newline", "def", "document"),
    ("sentence", "paragraph", "chapter", "document"),
    ("document",),
    ("def", "fixed:7"),
    *[(name,) for name in PATTERNS],
]


def plain_cuts(name, tokens, position, text):
    """(whether a segment begins with the last token, whether one ends with it), from the text since a cut.

    `text` is [the text since the last match], which is changed.
    """
    token = tokens[-1]
    if name.startswith("fixed:"):
        return False, (position + 1) % int(name[6:]) == 0
    if name == "document":
        return token == BOS, False
    if name == "newline":
        return False, "\n" in PIECES[token]
    if name == "sentence":
        end = PIECES[token].rstrip().endswith(".")
        return False, end or "\n" in PIECES[token]
    before, pattern = PATTERNS[name]
    cut = False
    for character in PIECES[token]:
        text[0] += character
        if re.fullmatch(rf"[\s\S]*({pattern})", text[0]):
            text[0], cut = "", True
    return (cut, False) if before else (False, cut)


def by_hand(tokens, names, ids=None):
    """The coordinates of a row, by name: lists."""
    labels = ["segment", *names[1:]]
    offsets = ["offset", *(f"{name}_offset" for name in names[1:])]
    rows = []
    for i in range(len(tokens)):
        if i == 0 or (ids is not None and ids[i] != ids[i - 1]):
            position, numbers, places = 0, [0] * len(names), [0] * len(names)
            within, texts, ended = [0] * len(names), [[""] for _ in names], [False] * len(names)
        else:
            position += 1
        cuts = [
            plain_cuts(name, tokens[: i + 1], position, text)
            for name, text in zip(names, texts, strict=True)
        ]
        begins = [ended[k] or cuts[k][0] for k in range(len(names))]
        begins = [any(begins[k:]) and position > 0 for k in range(len(names))]
        for k in range(len(names)):
            numbers[k] += begins[k]
            places[k] = 0 if begins[k] or position == 0 else places[k] + 1
            within[k] += begins[k]
            if k + 1 < len(names) and begins[k + 1]:
                within[k] = 0
        ended = [end for _, end in cuts]
        row = {"position": position} | dict(zip(labels, numbers, strict=True))
        row |= dict(zip(offsets, places, strict=True))
        row |= {f"{labels[k]}_in_{labels[k + 1]}": within[k] for k in range(len(names) - 1)}
        rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


def rule_of(names):
    return segments.resolve(names[0], PIECES, BOS, [(name, name) for name in names[1:]])


def check(actual, expected):
    assert set(actual) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)
        assert actual[name].dtype == np.int32


tokens_of = st.lists(st.integers(0, len(PIECES) - 1), min_size=24, max_size=24)


@pytest.mark.parametrize("names", RULES, ids=" in ".join)
@SOME
@hypothesis.given(st.data())
def test_levels_of_numpy_tokens_are_those_made_by_hand(names, data):
    tokens = [data.draw(tokens_of) for _ in range(2)]
    ids = [sorted(data.draw(st.lists(st.integers(0, 3), min_size=24, max_size=24))) for _ in "ab"]
    rule = rule_of(names)
    for document_ids in (None, ids):
        actual = segments.coordinates(
            np.array(tokens, np.int32), rule, document_ids and np.array(document_ids)
        )
        rows = [by_hand(tokens[b], names, document_ids and document_ids[b]) for b in range(2)]
        check(actual, {name: [row[name] for row in rows] for name in rows[0]})


on_jax = jax.jit(segments.coordinates, static_argnums=1)


@pytest.mark.parametrize("names", RULES, ids=" in ".join)
@SOME
@hypothesis.given(tokens_of, st.integers(1, 23))
def test_levels_of_jax_tokens_and_one_token_at_a_time_are_those_of_numpy(names, tokens, cut):
    rule = rule_of(names)
    tokens = np.array(tokens, np.int32)
    ids = (np.arange(24) >= cut).astype(np.int32)
    whole = segments.coordinates(tokens, rule)
    check(on_jax(jnp.asarray(tokens)[None], rule), {n: v[None] for n, v in whole.items()})
    check(
        on_jax(jnp.asarray(tokens), rule, jnp.asarray(ids)),
        segments.coordinates(tokens, rule, ids),
    )
    state, rows = segments.start((), rule), []
    for token in tokens:
        state = segments.enter(state, token, rule)
        rows.append({name: int(state[name]) for name in whole})
        state = segments.advance(state, token, rule)
    check(whole, {name: [row[name] for row in rows] for name in whole})
    # A row that begins within a document continues from what `advance` gave.
    first = segments.coordinates(tokens[:cut], rule, states=True)
    after = segments.advance({n: v[-1] for n, v in first.items()}, tokens[cut - 1], rule)
    second = segments.coordinates(tokens[cut:], rule, start=after)
    check(second, {name: values[cut:] for name, values in whole.items()})


def test_a_blank_line_after_a_text_of_real_pieces_begins_one_paragraph(tokenizer_file):
    from bipe_jax.data import tokenizer

    tokens = tokenizer.load(tokenizer_file)
    parts = ["One line.\nAnother one.\n\n", "\n\nA second paragraph. Long.\n \n", "The third\n"]
    ids = tokens.encode("".join(parts))
    rule = segments.resolve(
        "sentence", tokens.pieces(), tokens.bos_id, [("paragraph", "paragraph")]
    )
    paragraph = segments.coordinates(ids, rule)["paragraph"]
    assert [tokens.decode(ids[paragraph == i]) for i in range(paragraph.max() + 1)] == parts


def test_levels_are_coordinates_that_encodings_may_have():
    plan = tiny_plan(
        segments__levels=("paragraph", ("book", "regex:THE END")),
        position__absolute=(
            ("learned", "segment_in_paragraph"),
            ("sinusoidal", "paragraph_offset"),
        ),
        position__relative=(("rope", "book"), ("alibi", "paragraph")),
    )
    assert segments.coordinate_names(plan) == (
        "position", "segment", "offset", "segment_in_paragraph", "paragraph", "paragraph_offset",
        "paragraph_in_book", "book", "book_offset",
    )  # fmt: skip


def test_attend_takes_the_coordinates_of_levels():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 6, 2, 4)).astype(np.float32)
    paragraph = np.array([[0, 0, 1, 1, 2, 2]])
    entries = (("alibi", "paragraph"),)
    logits = positions.attend(entries, {"paragraph": jnp.asarray(paragraph)}, q, k, v)["logits"]
    distance = paragraph[0][:, None] - paragraph[0]
    for head, slope in enumerate((2**-4, 2**-8)):
        wanted = q[0, :, head] @ k[0, :, head].T / 2 - slope * distance
        seen = np.tril(np.ones((6, 6), bool))
        np.testing.assert_allclose(logits[0, head][seen], wanted[seen], atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"segments__levels": ("chapters",)}, "'chapters' is unknown"),
        ({"segments__levels": (("a b", "newline"),)}, "needs a name of its own"),
        ({"segments__levels": ("newline-and-spaced-period",)}, "needs a name of its own"),
        ({"segments__levels": (("segment", "newline"),)}, "needs a name of its own"),
        ({"segments__levels": ("paragraph", "paragraph")}, "needs a name of its own"),
        ({"segments__levels": (("a", "newline", 3),)}, r"must be a rule, or \(name, rule\)"),
        ({"segments__levels": (7,)}, r"must be a rule, or \(name, rule\)"),
        ({"segments__rule": "regex:("}, "no regular expression"),
        ({"segments__rule": "regex:^a"}, "anchors"),
        ({"segments__rule": "regex:a[ab]{9}"}, "needs 1,024 states, more than 256"),
        ({"segments__rule": "regex:a*"}, "matches the empty text"),
        ({"segments__rule": r"regex:(a)\1"}, "references"),
        ({"segments__rule": "regex:a(?=b)c"}, "matches no text"),
        ({"position__relative": (("alibi", "paragraph"),)}, "'paragraph' is unknown"),
        (
            {"segments__levels": ("paragraph",), "position__relative": (("t5", "segment_in_paragraph"),)},
            r"\('t5', 'segment_in_paragraph'\).*falls back",
        ),
        (
            {"segments__levels": ("paragraph",), "position__relative": (("fox", "paragraph_offset"),)},
            r"\('fox', 'paragraph_offset'\)",
        ),
        (
            {"segments__levels": ("paragraph",), "position__absolute": (("learned", "paragraph"),)},
            r"\('learned', 'paragraph'\).*no bound",
        ),
    ],
)  # fmt: skip
def test_levels_and_patterns_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_plan(**changes)


def test_levels_that_are_no_tuple_are_refused():
    config = tiny().to_dict()
    config["segments"]["levels"] = "paragraph"
    with pytest.raises(UserError, match=r"levels='paragraph' must be a tuple of rules, such as"):
        plan.make(config)


@pytest.mark.parametrize(
    "name, pieces, message",
    [
        ("document", ["a", "\n"], "neither BOS nor EOS"),
        ("regex:x", ["a", "\n"], "cannot match"),
    ],
)
def test_a_rule_that_a_tokenizer_cannot_serve_is_refused(name, pieces, message):
    with pytest.raises(UserError, match=message):
        segments.resolve(name, pieces)


@pytest.mark.parametrize("names", RULES, ids=" in ".join)
def test_a_rule_is_the_same_after_it_was_saved(names):
    import json

    rule = rule_of(names)
    again = segments.from_json(json.loads(json.dumps(segments.to_json(rule))))
    assert again == rule and hash(again) == hash(rule)
