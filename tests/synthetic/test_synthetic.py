"""Synthetic tasks: their labels against other programs that solve the tasks."""

import ast
import itertools

import numpy as np
import pytest

from bipe_jax import synthetic
from bipe_jax.errors import UserError
from bipe_jax.synthetic import machines

FAMILIES = machines.FAMILIES


def flat_run(machine: dict, tokens: list[str]):
    """The sets of states of the flat machine on (outer, inner) pairs, after each token."""
    inner = {int(p): row for p, row in machine["inner"].items()}
    outer = {int(q): {int(p): to for p, to in row.items()} for q, row in machine["outer"].items()}
    states = {(machine["outer_start"], machine["inner_start"])}
    for token in tokens:
        if token == "#":
            states = {(to, machine["inner_start"]) for q, p in states for to in outer[q][p]}
        else:
            states = {(q, to) for q, p in states for to in inner[p][token]}
        yield states


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_those_of_the_flat_machine(family):
    task = synthetic.parse(f"bi-nfa(family={family}, states=4, segments=1:6)")
    for number in range(10):
        sample, example = task.sample(number), task.example(number)
        tokens = example["text"].split()
        assert sample["tokens"] == tokens and tokens[-1] == "#"
        outer = iter(sample["outer"])
        states_of = zip(flat_run(sample["machine"], tokens), sample["inner"], strict=True)
        for token, (states, inner), (words, among) in zip(
            tokens, states_of, example["sets"], strict=True
        ):
            # The reachable set is the product of its two sides.
            qs, ps = {q for q, _ in states}, {p for _, p in states}
            assert states == set(itertools.product(qs, ps))
            assert ps == set(inner)
            if token == "#":
                assert sorted(qs) == next(outer)
                assert [w for w in words if w[0] == "q"] == [f"q{q}" for q in sorted(qs)]
            else:
                assert words == [f"p{p}" for p in sorted(ps)]
            assert set(words) <= set(among)
        assert sample["accept"] == bool(qs & set(sample["machine"]["accept"]))
        assert ("yes" in example["sets"][-1][0]) == sample["accept"]


def test_machines_remember_as_long_as_their_family_says():
    medians = {}
    for family in FAMILIES:
        machine = machines.draw(family, 6, np.random.RandomState(3))
        medians[family] = machines.memory(machine, np.random.RandomState(0))
    assert medians["total"]["median"] < 16 and medians["total"]["never"] == 0
    assert medians["collapsing"]["median"] > 16 and 0 < medians["collapsing"]["never"] < 1
    assert medians["group"]["never"] == medians["counter"]["never"] == 1


def test_a_scratchpad_writes_the_outer_sets():
    task = synthetic.parse("bi-nfa(family=total, mode=scratchpad, segments=3)")
    example, sample = task.example(5), task.sample(5)
    written = [example["text"][first:last].split() for first, last in example["learned"]]
    for words, states in zip(written, sample["outer"], strict=True):
        assert words[: words.index(";")] == [f"q{q}" for q in states]
    assert written[-1][-1] == ("yes" if sample["accept"] else "no")
    assert "sets" not in example


def test_controls_change_what_they_say():
    plain, hidden, moved = (
        synthetic.parse(f"bi-nfa({options})").example(3)
        for options in ("", "separators=hidden", "coordinates=random")
    )
    assert plain["text"].replace(" #", "") == hidden["text"]
    assert len(plain["segments"][0]) == len(hidden["segments"][0]) == len(moved["segments"][0])
    assert plain["segments"] != moved["segments"] and plain["text"] == moved["text"]
    # A segment begins after a "#".
    text = plain["text"]
    assert [text[: at - 1].split()[-1] for at in plain["segments"][0]] == ["#"] * (
        text.count("#") - 1
    )


def value_of(expression: str) -> int:
    """An expression in Z_11, by Python's parser and fractions of whole numbers."""

    def walk(node) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        first, second = walk(node.left), walk(node.right)
        if isinstance(node.op, ast.Div):
            return next(x for x in range(11) if x * second % 11 == first % 11 and second % 11)
        kinds = {ast.Add: first + second, ast.Sub: first - second, ast.Mult: first * second}
        return kinds[type(node.op)] % 11

    return walk(ast.parse(expression, mode="eval").body)


def test_each_step_of_arithmetic_has_the_same_value_and_one_operator_less():
    task = synthetic.parse("arithmetic(operators=1:12)")
    counts = []
    for number in range(60):
        example = task.example(number)
        steps = example["text"].split(" = ")
        assert len({value_of(step) for step in steps}) == 1
        operators = [sum(step.count(c) for c in "+-*/") for step in steps]
        assert operators == list(range(operators[0], -1, -1))
        ((first, last),) = example["learned"]
        assert example["text"][:first].endswith("= ") and last == len(example["text"])
        assert set(example["text"].split()) <= set(task.words)
        counts.append(operators[0])
    assert len(task.words) == 18  # with <unk>, BOS and EOS: 21
    assert np.mean(counts) > 7  # in proportion to their number: 8.3, not 6.5


def test_brackets_are_where_precedence_needs_them():
    task = synthetic.parse("arithmetic(operators=8)")
    for number in range(40):
        expression = task.example(number)["text"].split(" = ")[0]
        tree = ast.dump(ast.parse(expression))
        tokens = expression.split()
        for i, token in enumerate(tokens):
            if token == "(":
                depth = 0
                for j in range(i, len(tokens)):
                    depth += {"(": 1, ")": -1}.get(tokens[j], 0)
                    if depth == 0:
                        break
                without = tokens[:i] + tokens[i + 1 : j] + tokens[j + 1 :]
                assert ast.dump(ast.parse(" ".join(without))) != tree, expression


def test_each_segment_of_a_fold_takes_up_the_last_result():
    task = synthetic.parse("fold(operators=9)")
    text = task.example(1)["text"]
    steps = [step.split(" = ") for step in text.removesuffix(" ;").split(" ; ")]
    assert len(steps) == 9
    for (before, after), following in zip(steps, [*steps[1:], None], strict=True):
        assert value_of(before) == int(after)
        assert following is None or following[0].split()[0] == after
    learned = [text[first:last].strip() for first, last in task.example(1)["learned"]]
    firsts = [before.split()[0] for before, _ in steps[1:]]
    results = [after for _, after in steps]
    assert learned == [results[0], *itertools.chain(*zip(firsts, results[1:], strict=True))]


@pytest.mark.parametrize("back", [1, 3])
def test_recall_is_of_the_value_so_many_segments_back(back):
    example = synthetic.parse(f"recall(back={back}, segments=6)").example(2)
    tokens = example["text"].split()
    values = [word for word in tokens if word[0] == "v"]
    ends = [words for word, (words, _) in zip(tokens, example["sets"], strict=True) if word == "#"]
    assert len(values) == len(ends) == 6
    assert ends == [[]] * back + [[value] for value in values[: 6 - back]]


def test_examples_depend_on_seed_split_and_number_alone():
    def texts(options, numbers=range(8)):
        task = synthetic.parse(f"arithmetic(operators=5{options})")
        return [task.example(i)["text"] for i in numbers]

    assert texts("") == texts("") == texts(", count=3")
    assert not set(texts("")) & set(texts(", split=test"))
    assert not set(texts("")) & set(texts(", seed=1"))
    assert texts("", range(2**32, 2**32 + 4)) != texts("", range(4))
    machine = [synthetic.parse(f"bi-nfa(split={s})").machine.inner for s in ("train", "test")]
    assert (machine[0] == machine[1]).all()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("arithmetics", "did you mean 'arithmetic'"),
        ("bi-nfa(stats=3)", "did you mean 'states'"),
        ("bi-nfa(states=9)", "from 3 to 8"),
        ("bi-nfa(family=x)", "total"),
        ("bi-nfa(segments=3:2)", "range"),
        ("bi-nfa(mode=scratchpad, separators=hidden)", "shown"),
        ("arithmetic(operators=a)", "range"),
        ("arithmetic(count=-1)", "at least 0"),
        ("arithmetic(operators)", "no option"),
        ("recall(back=8)", "reach beyond"),
        ("recall(back=x)", "whole number"),
        ("", "no synthetic task"),
    ],
)
def test_wrong_names_and_options_are_one_line(text, named):
    with pytest.raises(UserError) as error:
        synthetic.parse(text, "config.data.train")
    message = str(error.value)
    assert named in message and message.startswith("config.data.train") and "\n" not in message
