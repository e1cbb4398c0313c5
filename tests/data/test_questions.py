"""Questions about real text: answers are those of a plain search, a line's number is its segment's."""

import gzip
import json
import re

import numpy as np
import pytest

from bipe_jax import segments
from bipe_jax.config.spec import parse_source
from bipe_jax.data import lines, marked, passages, questions, sources, tokenizer
from bipe_jax.data.questions import Settings
from bipe_jax.errors import UserError

EVERY = [Settings(ask, (4, 12), (1, 99)) for ask in questions.ASKED]


@pytest.fixture(scope="module", params=["line", "sentence"])
def made(request) -> list[dict]:
    sets = {"line": "", "sentence": "#Plays"}[request.param]
    source = passages.read(f"quickstart:validation{sets}", request.param, 80)
    return list(questions.examples(source, EVERY, 60, seed=1))


def searched(prompt: str) -> tuple[str, int]:
    """The answer and the index of its line, by nothing but the prompt."""
    *own, asked = prompt.split("\n")
    words = [" ".join(line.split()[:3]) for line in own]
    asked = asked.removesuffix(" Answer:")
    if number := re.fullmatch(r"What does line (\d+) say\?", asked):
        at = int(number[1]) - 1
    elif number := re.fullmatch(r"What does line (\d+) from the end say\?", asked):
        at = len(own) - int(number[1])
    elif quoted := re.fullmatch(r'What is before "(.*)"\?', asked):
        (after,) = [i for i, line in enumerate(own) if quoted[1] in line]
        at = after - 1
    elif quoted := re.fullmatch(r'What goes on from "(.*)"\?', asked):
        (at,) = [i for i, start in enumerate(words) if start == quoted[1]]
        return " ".join(own[at].split()[3:6]), at
    else:
        assert asked == "What is the pass key?"
        ((at, number),) = [
            (i, match[1])
            for i, line in enumerate(own)
            if (match := re.fullmatch(r"The pass key is (\d{5})\.", line))
        ]
        return number, at
    assert words.count(words[at]) == 1  # no other line has the answer
    return words[at], at


def test_answers_are_those_of_a_plain_search(made):
    assert len(made) == 60 * len(EVERY)
    for one in made:
        answer, at = searched(one["prompt"])
        count = one["prompt"].count("\n")
        k = at + 1 if one["labels"]["ask"] == "line" else count - at
        assert one["completion"] == f" {answer}" and one["answer"] == answer
        assert one["labels"] == {"ask": one["labels"]["ask"], "lines": count, "k": k}
        assert 4 <= count <= 12
        own = one["prompt"].split("\n")[:-1]
        assert sum(map(len, own)) <= 80 * count + len("The pass key is 12345.")
    for ask in questions.ASKED:
        ks = {one["labels"]["k"] for one in made if one["labels"]["ask"] == ask}
        assert max(ks) > 8 and min(ks) == (2 if ask == "before" else 1)


def test_passages_are_text_of_the_source_and_of_no_other_split(made):
    def squeezed(split):
        texts = sources.documents(parse_source(f"quickstart:{split}"))
        return " ".join(" ".join(document["text"].split()) for document in texts)

    own, other = squeezed("validation"), squeezed("train")
    foreign = 0
    for one in made:
        if one["labels"]["ask"] != "passkey":
            passage = " ".join(" ".join(one["prompt"].split("\n")[:-1]).split())
            assert passage in own
            foreign += passage in other
    assert foreign < 0.02 * len(made)  # licences and the like


def test_the_segment_is_the_address(made, tokenizer_file):
    tokens = tokenizer.load(tokenizer_file)
    by_newline = segments.resolve("newline", tokens.pieces())
    by_data = segments.resolve("data", tokens.pieces())
    for one in made[:100]:
        document = lines.parse(json.dumps(one).encode())
        row, _ = marked.encode_whole(tokens, document, ["data:0"])
        marks = marked.for_rule(row["starts"], ["data:0"], by_data)
        own = segments.coordinates(row["tokens"], by_data, starts=marks)["segment"]
        assert (own == segments.coordinates(row["tokens"], by_newline)["segment"]).all()
        _, at = searched(one["prompt"])
        of_line = tokens.decode(row["tokens"][own == at])
        assert of_line.rstrip("\n") == one["prompt"].split("\n")[at]
        assert own.max() == one["labels"]["lines"]  # of the question


def test_sentences_end_where_they_should():
    text = (
        'He came.  "Why?" she said.\nAnd so\non (they say!) it was 3.5 m\n\n# A heading\n\nThe end'
    )
    assert passages.units_of(text, "sentence") == [
        "He came.", '"Why?"', "she said.", "And so on (they say!)", "it was 3.5 m", "# A heading",
        "The end",
    ]  # fmt: skip
    assert passages.units_of("a \n\n\tb\x0c\n", "line") == ["a", "\tb"]


def test_questions_without_an_exact_answer_are_not_asked():
    random = np.random.RandomState(0)
    own = ["one two three four five six", "one two three", "a b c d e f", "x y", "d e f g h i"]
    assert questions.question("line", 1, own, random) is None  # line 2 begins so too
    assert questions.question("line", 4, own, random) is None  # too short
    assert questions.question("line", 3, own, random).answer == "a b c"
    assert questions.question("before", 3, own, random) is None  # what is quoted is too short
    assert questions.question("key", 3, own, random).answer == "d e f"
    assert questions.question("key", 1, own, random) is None  # "d e f" is in another line too


def test_the_command_writes_the_same_file_and_refuses_in_one_line(command, tmp_path):
    line = ["data.questions", "--input=quickstart:validation", "--count=5", "--ask=back,key"]
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        done = command(*line, f"--output={tmp_path / name}", "--lines=8", "--k=6:20")
        assert done.returncode == 0 and "Wrote 10 questions" in done.stdout, done.stderr
    content = (tmp_path / "a.jsonl.gz").read_bytes()
    assert content == (tmp_path / "b.jsonl.gz").read_bytes()
    labels = [json.loads(one)["labels"] for one in gzip.decompress(content).splitlines()]
    assert {label["lines"] for label in labels} == {8}
    assert {label["k"] for label in labels} <= {6, 7, 8}
    done = command(*line, "--output=x.csv")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings("lines", (4, 8), (1, 4)), "did you mean 'line'"),
        (Settings("line", (8, 4), (1, 4)), "--lines=8:4"),
        (Settings("line", (4, 8), (5, 9)), "begins at 4 at most"),
        (Settings("before", (4, 8), (1, 1)), "'before' needs 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        questions.check(settings)


def test_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "a\\nb\\nc"}\n')
    source = passages.read(f"{tmp_path}/short.jsonl", "line", 80)
    with pytest.raises(UserError, match=r"\d+ lines in a row"):
        next(questions.examples(source, EVERY, 1, 0))
