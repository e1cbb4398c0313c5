"""Prompts of an asked length, with the facts at an asked depth.

Each is a pure function of the task, the haystack, the tokenizer, the length, the depth, the seed and
its number: nothing depends on what else is run. The same seed, depth and number have the same facts at
every length, so that lengths compare; the haystack alone grows.
"""

import dataclasses
from collections.abc import Sequence
from random import Random

import numpy as np

from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.tasks.generators import Draft, Task
from bipe_jax.tasks.haystack import Haystack

_ROOMS = 8  # room for answers is a multiple of so many tokens


@dataclasses.dataclass(frozen=True)
class Sample:
    """Attributes:
    prompt: its text. tokens: (L,) int32.
    room: tokens that the answer may have; L + room is at most the length asked for.
    answers: what must be said.
    """

    prompt: str
    tokens: np.ndarray
    room: int
    answers: tuple[str, ...]


def compose(draft: Draft, units: Sequence[str]) -> str:
    """The prompt: each fact is a line of its own, between the units nearest to its depth.

    Depth is the share of the haystack's characters that lie before.
    """
    ends = np.cumsum([0, *map(len, units)])
    middles = (ends[1:] + ends[:-1]) / 2
    places = [int(np.searchsorted(middles, depth * ends[-1])) for depth, _ in draft.needles]
    parts, before = [draft.head], 0
    for i in sorted(range(len(places)), key=places.__getitem__):
        parts += ["".join(units[before : places[i]]), draft.needles[i][1]]
        before = places[i]
    parts += ["".join(units[before:]), draft.tail]
    return "\n".join(part.rstrip() for part in parts if part.strip())


def _drawn(task: Task, depth: float, seed: int, index: int) -> tuple[Draft, float]:
    """A prompt's facts, and where in the haystack it begins (0 … 1)."""
    rng = Random(f"{seed} {task.name} {depth!r} {index}")  # of a text: the same in every process
    return task.draw(rng, depth), rng.random()


def _room(task: Task, draft: Draft, tokenizer: Tokenizer) -> int:
    """Twice the tokens of a right answer, for those that are put otherwise, rounded up.

    Few different numbers, so that prompts are decoded together. Raises UserError.
    """
    tokens = tokenizer.encode(draft.expected)
    if task.score(draft.answers, tokenizer.decode(tokens)) < 1:
        raise UserError(
            f"{task.name}: the tokenizer cannot spell {draft.expected.strip()!r}: it has neither these "
            "characters nor bytes"
        )
    return -(-2 * len(tokens) // _ROOMS) * _ROOMS


def least(task: Task, tokenizer: Tokenizer, depth: float, seed: int, index: int) -> int:
    """Tokens of a prompt without any haystack, and of its answer. Raises UserError as `make`."""
    draft, _ = _drawn(task, depth, seed, index)
    return len(tokenizer.encode(compose(draft, []))) + _room(task, draft, tokenizer)


def make(
    task: Task,
    tokenizer: Tokenizer,
    haystack: Haystack,
    length: int,
    depth: float,
    seed: int,
    index: int,
) -> Sample:
    """The prompt of a number; with the answer's room it has `length` tokens, or as few less as can be.

    Raises:
      UserError: the length has no room for it, or the tokenizer cannot spell the answer.
    """
    draft, begin = _drawn(task, depth, seed, index)
    first = int(begin * len(haystack.units))
    room = _room(task, draft, tokenizer)

    def encoded(size):
        prompt = compose(draft, haystack.take(first, size))
        return prompt, tokenizer.encode(prompt)

    prompt, tokens = encoded(0)
    wanted = length - room
    if len(tokens) > wanted:
        raise UserError(
            f"{task.name} needs {len(tokens) + room} tokens for its question and answer: length "
            f"{length} is too short"
        )
    low, high, over = 0, None, 0  # characters: the most that fit, and the fewest that do not
    size, step = 3 * length, 0
    while len(tokens) < wanted and (high is None or high - low > 1):
        found = encoded(size)
        if len(found[1]) <= wanted:
            low, (prompt, tokens) = size, found
        else:
            high, over = size, len(found[1])
        step += 1
        if high is None:
            size *= 2
        else:  # the tokens grow nearly evenly; halving now and then bounds the number of steps
            part = (wanted - len(tokens)) / (over - len(tokens)) if step % 3 else 0.5
            size = min(max(low + int(part * (high - low)), low + 1), high - 1)
    return Sample(prompt, tokens, room, draft.answers)
