"""Makes questions about passages of a text: what line k says, or the one before another.

python -m bipe_jax.data.questions --input=quickstart:train --output=questions.jsonl.gz --ask=line,back

Each is an example (docs/how-to/examples.md) whose answer is exact: a passage of some lines in a row, and a
question at its end. The same command writes the same file.
"""

import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bipe_jax import cli, commands, flags
from bipe_jax.data import passages
from bipe_jax.data.passages import Passages
from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean
from bipe_jax.workdir import outputs

ASKED = ("line", "back", "before", "key", "passkey")
PASSKEY = "The pass key is"
_WORDS = 3  # of an answer, and of what a line is told from others by
_TRIES = 10_000


class Settings(NamedTuple):
    """What is asked.

    Attributes:
      ask: "line": how line k begins, from 1; "back": how the k-th line from the end begins; "before": how
        the line before one that is quoted begins; "key": how a line goes on whose beginning is quoted, which
        no number of a line helps with; "passkey": a number that a line of its own says.
      lines: range of the number of lines, or sentences.
      k: range of the number of the line that is asked for: from the end, but for "line".
    """

    ask: str
    lines: tuple[int, int]
    k: tuple[int, int]


class Question(NamedTuple):
    """A question about lines, its answer, and the lines themselves, which "passkey" adds one to."""

    lines: list[str]
    text: str
    answer: str


def beginning(line: str) -> str:
    """The first words of a line."""
    return " ".join(line.split()[:_WORDS])


def is_distinct(lines: Sequence[str], at: int) -> bool:
    """Whether a line has enough words to be told from all others by its beginning."""
    own = beginning(lines[at])
    return len(own.split()) == _WORDS and [beginning(line) for line in lines].count(own) == 1


def question(
    ask: str, k: int, lines: Sequence[str], random: np.random.RandomState
) -> Question | None:
    """The question for a line; None if its answer would not be exact.

    Args:
      ask, k: see `Settings`. lines: of the passage; "passkey" replaces the one at k.
    """
    own = list(lines)
    at = k - 1 if ask == "line" else len(own) - k
    if ask == "passkey":
        if PASSKEY in "\n".join(own):
            return None
        number = str(random.randint(10_000, 100_000))
        own[at] = f"{PASSKEY} {number}."
        return Question(own, "What is the pass key?", number)
    if not is_distinct(own, at):
        return None
    first = beginning(own[at])
    if ask == "line":
        return Question(own, f"What does line {k} say?", first)
    if ask == "back":
        return Question(own, f"What does line {k} from the end say?", first)
    if ask == "before":
        quoted = own[at + 1].strip()
        is_clear = is_distinct(own, at + 1) and "\n".join(own).count(quoted) == 1
        return Question(own, f'What is before "{quoted}"?', first) if is_clear else None
    rest = " ".join(own[at].split()[_WORDS : 2 * _WORDS])
    elsewhere = " ".join(" ".join(own).split()).count(first) > 1
    if elsewhere or len(rest.split()) < _WORDS:
        return None
    return Question(own, f'What goes on from "{first}"?', rest)


def example(source: Passages, settings: Settings, random: np.random.RandomState) -> dict[str, Any]:
    """A line of the file. Raises UserError: the source has no such passage."""
    ask = settings.ask
    for _ in range(_TRIES):
        count = int(random.randint(settings.lines[0], settings.lines[1] + 1))
        least = max(settings.k[0], 2 if ask == "before" else 1)
        k = int(random.randint(least, min(settings.k[1], count) + 1))
        name, lines = source.draw(random, count)
        asked = question(ask, k, lines, random)
        if asked is None:
            continue
        ends = np.cumsum([len(line) + 1 for line in asked.lines]).tolist()
        return {
            "prompt": "\n".join([*asked.lines, f"{asked.text} Answer:"]),
            "completion": f" {asked.answer}",
            "answer": asked.answer,
            "labels": {"ask": ask, "lines": count, "k": k},
            "segments": [ends],
            "meta": {"pile_set_name": name},
        }
    raise UserError(
        f"{source.name} has no question {ask!r} for {settings.k[0]} to {settings.k[1]} in passages of "
        f"{settings.lines[0]} to {settings.lines[1]} {source.unit}s: use another source or range"
    )


def examples(
    source: Passages, every: Sequence[Settings], count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields `count` examples of each setting in turn. Raises UserError as `check` and `example`."""
    for settings in every:
        check(settings)
    for number in range(count):
        for which, settings in enumerate(every):
            random = np.random.RandomState([seed, number, which])
            yield example(source, settings, random)


def check(settings: Settings) -> None:
    """Raises UserError if no passage can have such a question."""
    if settings.ask not in ASKED:
        raise UserError(
            f"--ask: {settings.ask!r} is unknown{did_you_mean(settings.ask, ASKED)}: use some of "
            f"{', '.join(ASKED)}"
        )
    (low, high), (first, last) = settings.lines, settings.k
    if not 2 <= low <= high:
        raise UserError(f"--lines={low}:{high} must be a range LOW:HIGH of numbers from 2")
    if not 1 <= first <= min(last, low) or (settings.ask == "before" and last < 2):
        raise UserError(
            f"--k={first}:{last} must be a range LOW:HIGH that begins at {low} at most, the least number of "
            "lines; 'before' needs 2"
        )


def write(path: str, lines: Iterator[dict[str, Any]]) -> int:
    """Writes examples into a .jsonl or .jsonl.gz file. Returns their number. Raises UserError."""
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    content = "".join(texts).encode()
    # Without the time, so that the same examples make the same file.
    outputs.write_bytes(path, gzip.compress(content, mtime=0) if path.endswith(".gz") else content)
    return len(texts)


def main() -> None:
    args = commands.parser("questions").parse_args()
    cli.log_to_terminal()
    lines, k = flags.span("lines", args.lines), flags.span("k", args.k)
    if not args.output.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--output={args.output} must be a name that ends with .jsonl or .jsonl.gz")
    if args.count < 1 or args.seed < 0 or args.width < 1:
        raise UserError("--count and --width must be at least 1, and --seed at least 0")
    every = [Settings(ask, lines, k) for ask in flags.names(args.ask, ",")]
    for settings in every:
        check(settings)
    outputs.check(args.output)
    source = passages.read(args.input, args.unit, args.width)
    written = write(args.output, examples(source, every, args.count, args.seed))
    print(f"Wrote {written:,} questions into {args.output}")


if __name__ == "__main__":
    with cli.user_errors():
        sys.exit(main())
