"""The tasks: the facts that are hidden, the question, and the score of an answer.

Prompts end so that a model that only continues texts continues with the answer. The tasks are those of
Mohtashami & Jaggi, "Landmark Attention" (2023), and of RULER (Hsieh et al. 2024, sections 3.1 and 3.2),
with other wording; docs/how-to/tasks.md lists the differences.
"""

import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from bipe_jax import plugins
from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean
from bipe_jax.tasks.haystack import NOISE

_MOST = 64  # keys, values, queries or hops

_ADJECTIVES = (
    "amber", "bold", "brave", "bright", "broken", "calm", "clever", "cold", "curious", "dark",
    "distant", "dry", "early", "eager", "empty", "faint", "fancy", "frozen", "gentle", "golden",
    "grand", "happy", "heavy", "hidden", "humble", "idle", "jolly", "kind", "late", "light",
    "lonely", "loud", "lucky", "narrow", "noble", "old", "pale", "patient", "plain", "proud",
    "quick", "quiet", "rapid", "rough", "round", "rusty", "shy", "silent", "silver", "slow",
    "small", "smooth", "soft", "steep", "strange", "sunny", "sweet", "tall", "tiny", "warm",
    "wide", "wild", "wise", "young",
)  # fmt: skip
_NOUNS = (
    "anchor", "apple", "arrow", "barrel", "basket", "bell", "boat", "bottle", "bridge", "bucket",
    "button", "candle", "carpet", "castle", "cloud", "coin", "corner", "cradle", "desert", "door",
    "engine", "feather", "field", "forest", "fountain", "garden", "guitar", "hammer", "harbor",
    "helmet", "hill", "island", "jacket", "kettle", "ladder", "lantern", "lemon", "meadow", "mirror",
    "mountain", "needle", "ocean", "orchard", "paper", "pencil", "pillow", "planet", "pocket",
    "ribbon", "river", "saddle", "shelter", "shovel", "spider", "stone", "table", "teapot", "thunder",
    "tower", "valley", "violin", "wagon", "willow", "window",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Draft:
    """A prompt without its haystack.

    Attributes:
      head: text before the haystack.
      needles: depth (0 … 1) and text of each fact; facts of the same depth keep their order.
      tail: text after the haystack, which the answer continues.
      answers: strings that a right answer contains.
      expected: a right continuation of the prompt.
    """

    head: str
    needles: Sequence[tuple[float, str]]
    tail: str
    answers: tuple[str, ...]
    expected: str


def share_found(answers: Sequence[str], text: str) -> float:
    """The share of the answers that the text contains, ignoring case (RULER's string_match_all)."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def first_number(answers: Sequence[str], text: str) -> float:
    """1 if the first number in the text is the answer, else 0 (Mohtashami & Jaggi's code)."""
    number = re.search(r"[0-9]+", text)
    return float(number is not None and number[0] == answers[0])


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def passkey(rng: Random, depth: float) -> Draft:
    """A number from 1 to 50000, and the prompt of Mohtashami & Jaggi (2023)."""
    key = str(rng.randint(1, 50_000))
    return Draft(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.",
        [(depth, f"The pass key is {key}. Remember it. {key} is the pass key.")],
        "What is the pass key? The pass key is",
        (key,),
        f" {key}.",
    )


def niah(rng: Random, depth: float, *, keys: int = 1, values: int = 1, queries: int = 1) -> Draft:
    """Keys of two words, each with values of seven digits; the values of the first keys are asked for.

    The first key's first value is at the depth, the others are at random depths.

    Args:
      keys: number of keys. values: of each key. queries: number of keys that are asked for.
    """
    numbers = rng.sample(range(len(_ADJECTIVES) * len(_NOUNS)), keys)
    names = [f"{_ADJECTIVES[n // len(_NOUNS)]}-{_NOUNS[n % len(_NOUNS)]}" for n in numbers]
    digits = iter(map(str, rng.sample(range(1_000_000, 10_000_000), keys * values)))
    of_keys = {name: [next(digits) for _ in range(values)] for name in names}
    one = "The special number" if values == 1 else "One of the special numbers"
    facts = [f"{one} of {name} is {value}." for name in names for value in of_keys[name]]
    depths = [depth, *(rng.random() for _ in facts[1:])]
    asked = rng.sample(names[:queries], queries)
    answers = tuple(value for name in asked for value in of_keys[name])
    listed = _listed(asked)
    subject, verb = ("number", "is") if len(answers) == 1 else ("numbers", "are")
    every = "all the" if values > 1 else "the"
    return Draft(
        "Some special numbers are hidden in the text below. Remember them.",
        list(zip(depths, facts, strict=True)),
        f"What {verb} {every} special {subject} of {listed}? "
        f"{every.capitalize()} special {subject} of {listed} {verb}",
        answers,
        f" {_listed(answers)}.",
    )


def variable_tracking(rng: Random, depth: float, *, hops: int) -> Draft:
    """A chain of variables that get the same value; all their names are asked for.

    The chain begins at the depth; its other links follow at random depths. A solved example comes first, as
    in RULER.
    """
    names: dict[str, None] = {}
    while len(names) < 2 * (hops + 1):
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    example, asked = list(names)[: hops + 1], list(names)[hops + 1 :]
    values = rng.sample(range(10_000, 100_000), 2)
    shown, value = map(str, values)
    task = "Remember which variables have which value."

    def chain(names, value):
        values = [value, *(f"VAR {name}" for name in names)]
        return [f"VAR {name} = {v}" for name, v in zip(names, values, strict=False)]

    def question(names, value):
        return f"Which variables have the value {value}? These {len(names)} variables have it:"

    lines = [
        line
        for i, fact in enumerate(chain(example, shown))
        for line in (NOISE[i % len(NOISE)], fact)
    ]
    solved = f"{question(example, shown)} {' '.join(example)}"
    depths = [depth, *sorted(rng.uniform(depth, 1) for _ in range(hops))]
    return Draft(
        "\n".join([task, *lines, solved, "", task]),
        list(zip(depths, chain(asked, value), strict=True)),
        question(asked, value),
        tuple(asked),
        f" {' '.join(asked)}\n",
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      name: "niah-multikey" or, with another number than the default, "niah-multikey:8".
      draw: (random numbers, depth) -> Draft.
      score: (answers, the model's text) -> 0 … 1.
    """

    name: str
    draw: Callable[[Random, float], Draft]
    score: Callable[[Sequence[str], str], float]


class Family(NamedTuple):
    """Tasks that differ by a number.

    Attributes:
      draw: (random numbers, depth, number) -> Draft.
      number: the default; 0: the task takes none.
      score: of `Task`.
    """

    draw: Callable[[Random, float, int], Draft]
    number: int
    score: Callable[[Sequence[str], str], float]


TASKS = {
    "passkey": Family(lambda rng, depth, _: passkey(rng, depth), 0, first_number),
    "niah-single": Family(lambda rng, depth, _: niah(rng, depth), 0, share_found),
    "niah-multikey": Family(lambda rng, depth, n: niah(rng, depth, keys=n), 4, share_found),
    "niah-multivalue": Family(lambda rng, depth, n: niah(rng, depth, values=n), 4, share_found),
    "niah-multiquery": Family(
        lambda rng, depth, n: niah(rng, depth, keys=n, queries=n), 4, share_found
    ),
    "variable-tracking": Family(
        lambda rng, depth, n: variable_tracking(rng, depth, hops=n), 4, share_found
    ),
}


def _family(name: str) -> Family:
    """The family of a name, which may be a plug-in's. Raises UserError: there is none."""
    if plugin := plugins.find(plugins.TASKS, name, TASKS):
        if not isinstance(plugin.value, Family):
            plugin.refuse("is no bipe_jax.tasks.generators.Family")
        return plugin.value
    if name not in TASKS:
        known = (*TASKS, *plugins.names(plugins.TASKS))
        raise UserError(
            f"--tasks: {name!r} is unknown{did_you_mean(name, known)}: use some of {', '.join(known)}"
        )
    return TASKS[name]


def task(spec: str) -> Task:
    """The task "NAME", or "NAME:N" with the number of its keys, values, queries or hops.

    Raises:
      UserError: the task is unknown, or the number is out of range.
    """
    name, colon, text = spec.partition(":")
    draw, number, score = _family(name)
    if colon:
        if not number:
            raise UserError(f"--tasks: {name} takes no number, such as in {spec!r}")
        if not text.isdecimal() or not 1 <= int(text) <= _MOST:
            raise UserError(
                f"--tasks: the number in {spec!r} must be from 1 to {_MOST}, as in {name}:{number}"
            )
        if int(text) != number:
            name, number = f"{name}:{int(text)}", int(text)
    return Task(name, lambda rng, depth: draw(rng, depth, number), score)
