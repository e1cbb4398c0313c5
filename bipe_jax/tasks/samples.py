"""Prompts of a length, with the facts at a depth.

Each is a pure function of the task, the haystack, the tokenizer, the length, the depth, the seed and its
index. The same seed, depth and index have the same facts at every length, so that lengths compare: only
the haystack grows.
"""

import dataclasses
from collections.abc import Sequence
from random import Random

import numpy as np

from bipe_jax.data import marked
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.tasks.generators import Draft, Task
from bipe_jax.tasks.haystack import Haystack

_ROOMS = 8  # tokens; room for answers is a multiple of this


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt with its answers.

    Attributes:
      prompt: its text. tokens: (L,) int32. starts: of its segments, (L,), or None, see `marked`.
      room: the largest number of tokens of the answer; L + room is at most the length.
      answers: strings that a right answer contains.
    """

    prompt: str
    tokens: np.ndarray
    starts: np.ndarray | None
    room: int
    answers: tuple[str, ...]


def compose(draft: Draft, units: Sequence[str]) -> str:
    """The prompt: each fact is a line of its own, between the units nearest to its depth.

    Depth is the share of the haystack's characters before the fact.
    """
    ends = np.cumsum([0, *map(len, units)])
    middles = (ends[1:] + ends[:-1]) / 2
    indices = [int(np.searchsorted(middles, depth * ends[-1])) for depth, _ in draft.needles]
    parts, begin = [draft.head], 0
    for i in sorted(range(len(indices)), key=indices.__getitem__):
        parts += ["".join(units[begin : indices[i]]), draft.needles[i][1]]
        begin = indices[i]
    parts += ["".join(units[begin:]), draft.tail]
    return "\n".join(part.rstrip() for part in parts if part.strip())


def _drawn(task: Task, depth: float, seed: int, index: int) -> tuple[Draft, float]:
    """The facts of a prompt, and the share of the haystack (0 … 1) before its first unit."""
    rng = Random(f"{seed} {task.name} {depth!r} {index}")  # a text: the same in every process
    return task.draw(rng, depth), rng.random()


def _room(task: Task, draft: Draft, tokenizer: Tokenizer) -> int:
    """Twice the tokens of a right answer, for other wordings, rounded up so that batches share it.

    Raises:
      UserError: the tokenizer cannot spell the answer.
    """
    tokens = tokenizer.encode(draft.expected)
    if task.score(draft.answers, tokenizer.decode(tokens)) < 1:
        raise UserError(
            f"{task.name}: the tokenizer cannot spell {draft.expected.strip()!r}: it has neither these "
            "characters nor bytes"
        )
    return -(-2 * len(tokens) // _ROOMS) * _ROOMS


def least(task: Task, tokenizer: Tokenizer, depth: float, seed: int, index: int) -> int:
    """Tokens of a prompt without a haystack, and of its answer. Raises UserError as `make`."""
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
    segmenters: Sequence[str] = (),
) -> Sample:
    """The sample of an index: the longest prompt that fits into `length` with the answer's room.

    Args:
      segmenters: of the levels of segments, see `segments.segmenters_of_text`.

    Raises:
      UserError: the length is too short, or the tokenizer cannot spell the answer.
    """
    draft, begin = _drawn(task, depth, seed, index)
    first = int(begin * len(haystack.units))
    room = _room(task, draft, tokenizer)

    def encoded(size):
        prompt = compose(draft, haystack.take(first, size))
        return prompt, tokenizer.encode(prompt)

    prompt, tokens = encoded(0)
    target = length - room
    if len(tokens) > target:
        raise UserError(
            f"{task.name} needs {len(tokens) + room} tokens for its question and answer: length "
            f"{length} is too short"
        )
    low, high, over = 0, None, 0  # characters: the most that fit, and the fewest that do not
    size, step = 3 * length, 0
    while len(tokens) < target and (high is None or high - low > 1):
        longer = encoded(size)
        if len(longer[1]) <= target:
            low, (prompt, tokens) = size, longer
        else:
            high, over = size, len(longer[1])
        step += 1
        if high is None:
            size *= 2
        else:  # tokens grow almost linearly; every third step halves, which bounds their number
            part = (target - len(tokens)) / (over - len(tokens)) if step % 3 else 0.5
            size = min(max(low + int(part * (high - low)), low + 1), high - 1)
    starts = marked.starts_of(tokenizer, prompt, segmenters)
    return Sample(prompt, tokens, starts, room, draft.answers)
