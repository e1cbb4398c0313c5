"""Makes data sets of SCROLLS' form from any text, with outputs that are exact.

| data set     | like        | input                                  | output                             |
|--------------|-------------|----------------------------------------|------------------------------------|
| `outlines`   | GovReport   | lines                                  | the beginnings of every fourth one |
| `lines`      | Qasper      | what line k says; lines                | its beginning                      |
| `neighbours` | QuALITY     | what is before a line; 4 options; lines | the beginning of that line        |
| `orders`     | ContractNLI | that a line is before another; lines   | whether it is, or one is not there |

A beginning is the first words of a line. Its line is the only one that begins so.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bipe_jax.data import questions
from bipe_jax.data.passages import Passages
from bipe_jax.data.scrolls import LABELS
from bipe_jax.errors import UserError
from bipe_jax.workdir import outputs

_TRIES = 10_000
_OPTIONS = 4
_EVERY = 4  # lines, of which one is in an outline
_Made = tuple[str, str] | None  # input and output; None if the output would not be exact
_Lines = tuple[int, int]  # range of the number of lines


def _outline(source: Passages, lines: list[str], random: np.random.RandomState) -> _Made:
    wanted = range(0, len(lines), _EVERY)
    if not all(questions.is_distinct(lines, at) for at in wanted):
        return None
    return "\n".join(lines), "\n".join(questions.beginning(lines[at]) for at in wanted)


def _line(source: Passages, lines: list[str], random: np.random.RandomState) -> _Made:
    k = int(random.randint(1, len(lines) + 1))
    asked = questions.question("line", k, lines, random)
    return asked and (f"{asked.text}\n\n" + "\n".join(asked.lines), asked.answer)


def _neighbour(source: Passages, lines: list[str], random: np.random.RandomState) -> _Made:
    asked = questions.question("before", int(random.randint(2, len(lines) + 1)), lines, random)
    others = [
        questions.beginning(line)
        for at, line in enumerate(lines)
        if questions.is_distinct(lines, at)
    ]
    if asked is None or len(others) < _OPTIONS:
        return None
    others.remove(asked.answer)
    options = [asked.answer, *random.permutation(others)[: _OPTIONS - 1].tolist()]
    options = random.permutation(options).tolist()
    listed = "\n".join(
        f" ({letter}) {option}" for letter, option in zip("ABCD", options, strict=True)
    )
    # An option that has the mark of another one could not be told from two.
    if any("(" in option for option in options):
        return None
    return f"{asked.text}\n\n{listed}\n\n\n" + "\n".join(lines), asked.answer


def _order(source: Passages, lines: list[str], random: np.random.RandomState) -> _Made:
    label = LABELS[random.randint(len(LABELS))]
    first, second = sorted(random.permutation(len(lines))[:2].tolist())
    if not questions.is_distinct(lines, first) or not questions.is_distinct(lines, second):
        return None
    quoted = [lines[first].strip(), lines[second].strip()]
    if label == "Contradiction":
        quoted.reverse()
    if label == "Not mentioned":
        _, (other,) = source.draw(random, 1)
        missing = random.randint(2)
        quoted[missing] = other.strip()
        known = map(questions.beginning, lines)
        if len(other.split()) < 3 or questions.beginning(other) in known:
            return None
    return f'"{quoted[0]}" is before "{quoted[1]}".\n\n' + "\n".join(lines), label


_MAKERS: dict[str, Callable[[Passages, list[str], np.random.RandomState], _Made]] = {
    "outlines": _outline,
    "lines": _line,
    "neighbours": _neighbour,
    "orders": _order,
}
NAMES = tuple(_MAKERS)


def records(
    source: Passages, name: str, lines: _Lines, count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields lines of a data set's file, of passages of so many lines. Raises UserError: there are none."""
    for number in range(count):
        random = np.random.RandomState([seed, NAMES.index(name), number])
        for _ in range(_TRIES):
            _, own = source.draw(random, int(random.randint(lines[0], lines[1] + 1)))
            made = _MAKERS[name](source, own, random)
            if made:
                break
        else:
            raise UserError(
                f"{source.name} has no passage of {lines[0]} to {lines[1]} lines for {name}: use more text"
            )
        pid = f"{name}-{seed}-{number}"
        yield {"id": pid, "pid": f"{pid}_0", "input": made[0], "output": made[1]}


def write(
    directory: str, split: str, source: Passages, lines: _Lines, count: int, seed: int
) -> None:
    """Writes DIRECTORY/TASK/SPLIT.jsonl of all data sets, unless they are there. Raises UserError."""
    for name in NAMES:
        path = os.path.join(directory, name, f"{split}.jsonl")
        if os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        made = records(source, name, lines, count, seed)
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in made)
        outputs.write_bytes(path, content.encode())
