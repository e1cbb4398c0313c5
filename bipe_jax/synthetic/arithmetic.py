"""Arithmetic in Z_11 with all steps written out, and a running fold of it.

The task is that of Feng et al., "Towards Revealing the Mystery behind Chain of Thought" (2023), section 4,
in wording of our own: an expression is evaluated one operator at a time, the steps joined by "=".
"""

import dataclasses
from typing import Any

import numpy as np

from bipe_jax.synthetic.task import Task, check_range, document

FIELD = 11
OPERATORS = ("+", "-", "*", "/")
EQUALS = "="
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_BROKEN_BY_REGROUPING = ("-", "/")  # a - (b + c) is not a - b + c


@dataclasses.dataclass
class _Node:
    """A number, or an operator with two operands. A number becomes an operator in place."""

    value: int
    operator: str = ""
    operands: "tuple[_Node, _Node] | None" = None


def apply(operator: str, first: int, second: int) -> int:
    """first OPERATOR second in Z_11. Raises ZeroDivisionError."""
    if operator == "/":
        if second == 0:
            raise ZeroDivisionError
        return first * pow(second, -1, FIELD) % FIELD
    return {"+": first + second, "-": first - second, "*": first * second}[operator] % FIELD


def _split(value: int, random: np.random.RandomState) -> tuple[str, int, int]:
    """An operator and two operands that give a value: the second is solved for."""
    while True:
        operator, first = OPERATORS[random.randint(4)], random.randint(FIELD)
        if operator in "*/" and (first == 0 or value == 0):
            continue  # there is no second operand, or any
        second = {
            "+": value - first,
            "-": first - value,
            "*": value * pow(first or 1, -1, FIELD),
            "/": first * pow(value or 1, -1, FIELD),
        }[operator]
        return operator, first, second % FIELD


def _write(node: _Node) -> list[str]:
    """The tokens of an expression, with brackets where precedence needs them."""
    if node.operands is None:
        return [str(node.value)]
    tokens: list[str] = []
    for place, operand in enumerate(node.operands):
        written = _write(operand)
        if operand.operands is not None:
            own, outer = _PRECEDENCE[operand.operator], _PRECEDENCE[node.operator]
            regrouped = place == 1 and own == outer and node.operator in _BROKEN_BY_REGROUPING
            if own < outer or regrouped:
                written = ["(", *written, ")"]
        tokens += [node.operator, *written] if place else written
    return tokens


def _weighted(random: np.random.RandomState, bounds: tuple[int, int]) -> int:
    """A number of a range, with a probability that grows with the number."""
    numbers = np.arange(bounds[0], bounds[1] + 1)
    at = random.random_sample() * numbers.sum()
    return int(numbers[np.searchsorted(np.cumsum(numbers), at, side="right")])


@dataclasses.dataclass(frozen=True)
class _Operators(Task):
    """A task of a number of operators. Attributes: operators: range of it, drawn in proportion to itself."""

    operators: tuple[int, int] = (1, 15)

    def problems(self) -> dict[str, str]:
        problems = super().problems()
        check_range(problems, "operators", self.operators, 1)
        return problems

    def sample(self, number: int) -> dict[str, Any]:
        example = self.example(number)
        return {"text": example["text"], "operators": example["labels"]["operators"]}


@dataclasses.dataclass(frozen=True)
class Arithmetic(_Operators):
    """An expression, each step of its evaluation, and the answer: "5 + 7 / 9 = 5 + 2 = 7".

    It is made backwards from the answer: again and again a random number is replaced by an expression
    that is equal to it. All after the first "=" is learned.
    """

    @property
    def words(self) -> tuple[str, ...]:
        return (*map(str, range(FIELD)), *OPERATORS, "(", ")", EQUALS)

    def make(self, random: np.random.RandomState) -> dict[str, Any]:
        count = _weighted(random, self.operators)
        root = _Node(random.randint(FIELD))
        numbers, history = [root], [_write(root)]
        for _ in range(count):
            node = numbers.pop(random.randint(len(numbers)))
            node.operator, first, second = _split(node.value, random)
            node.operands = _Node(first), _Node(second)
            numbers += node.operands
            history.append(_write(root))
        steps = [[*step, EQUALS] for step in reversed(history)]
        steps[-1].pop()
        tokens = [token for step in steps for token in step]
        begins = np.cumsum([0, *map(len, steps)]).tolist()
        return document(
            tokens,
            learned=[(begins[1], len(tokens))],
            segments=begins[:-1],
            labels={"operators": count, "longest": max(map(len, steps))},
        )


@dataclasses.dataclass(frozen=True)
class Fold(_Operators):
    """Segments that take up the last result, and apply an operator to it: "5 + 7 = 1 ; 1 * 3 = 3 ;".

    The operators and their second operands are given; the first operands and the results are learned. Only
    the number of segments grows with the text.
    """

    @property
    def words(self) -> tuple[str, ...]:
        return (*map(str, range(FIELD)), *OPERATORS, EQUALS, ";")

    def make(self, random: np.random.RandomState) -> dict[str, Any]:
        count = _weighted(random, self.operators)
        value = random.randint(FIELD)
        tokens: list[str] = []
        learned: list[tuple[int, int]] = []
        for number in range(count):
            operator = OPERATORS[random.randint(4)]
            second = random.randint(1, FIELD) if operator in "*/" else random.randint(FIELD)
            result = apply(operator, value, second)
            at = len(tokens)
            if number:
                learned.append((at, at + 1))
            learned.append((at + 4, at + 5))
            tokens += [str(value), operator, str(second), EQUALS, str(result), ";"]
            value = result
        return document(
            tokens,
            learned=learned,
            segments=list(range(0, len(tokens), 6)),
            labels={"operators": count},
        )
