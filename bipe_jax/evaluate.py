"""Evaluates a checkpoint on text at several lengths, or on examples.

python -m bipe_jax.evaluate --checkpoint=runs/quickstart --lengths=256,512,1024 [--data=SOURCE]

Prints tables and writes evaluation.json, extrapolation.png and report.html, by default into the run's
directory. With --follow it evaluates each new checkpoint of a run in training. On examples
(--data='examples:test.jsonl') it writes answers.json.
"""

import argparse
import dataclasses

from bipe_jax import cli, commands, flags
from bipe_jax.errors import UserError
from bipe_jax.evaluation import ending
from bipe_jax.evaluation.evaluator import Settings
from bipe_jax.evaluation.follow import follow
from bipe_jax.training.observing.evaluation_boards import EvaluationBoards


def main():
    settings, args = _settings()
    cli.set_up()
    if args.follow:  # perhaps before there is a checkpoint
        with EvaluationBoards(args.output or args.checkpoint) as boards:
            follow(args.checkpoint, settings, args.output, boards.add)
        return
    if ending.is_of_examples(args.checkpoint, settings.data):
        usual = Settings(data=settings.data)
        names = [field.name for field in dataclasses.fields(Settings)]
        if wrong := [n for n in names if getattr(settings, n) != getattr(usual, n)]:
            raise UserError(
                f"--{wrong[0]} is for text, and the checkpoint is evaluated on examples: leave it out, or "
                "name text by --data"
            )
        ending.Answers(settings.data).evaluate(args.checkpoint, args.output)
        return
    ending.Perplexity(settings).evaluate(args.checkpoint, args.output)


def _settings() -> tuple[Settings, argparse.Namespace]:
    """The settings and all arguments of the command line. Raises UserError."""
    args = commands.parser("evaluate").parse_args()
    lengths = flags.numbers("lengths", args.lengths, int)
    if args.context < 0:
        raise UserError(f"--context={args.context} must be at least 2")
    settings = Settings(
        lengths,
        args.data,
        args.sets,
        args.context,
        _tokens(args.tokens),
        args.protocol,
        args.extend,
        args.draws,
    )
    return settings, args


def _tokens(text: str) -> int | None:
    """A number of targets: 0 for all, None for the config's. Raises UserError."""
    if text in ("", "all"):
        return 0 if text else None
    if not text.isdecimal() or not int(text):
        raise UserError(f"--tokens={text} must be a whole number above 0, or all")
    return int(text)


if __name__ == "__main__":
    with cli.user_errors():
        main()
