"""Evaluates a checkpoint at several lengths.

python -m bipe_jax.evaluate --checkpoint=runs/quickstart --lengths=256,512,1024 [--data=SOURCE]

Prints tables and writes evaluation.json, extrapolation.png and report.html, by default into the run's
directory. With --follow it evaluates each new checkpoint of a run in training.
"""

import argparse

from bipe_jax import cli, processes
from bipe_jax.errors import UserError
from bipe_jax.evaluation.evaluator import Settings, evaluate
from bipe_jax.evaluation.follow import follow
from bipe_jax.evaluation.protocols import SAME_TOKENS
from bipe_jax.evaluation.tables import tables, written


def main():
    settings, args = _settings()
    cli.set_up()
    if args.follow:
        follow(args.checkpoint, settings, args.output)
        return
    evaluate(args.checkpoint, settings, args.output, lambda result: print(tables(result)))
    if processes.is_first():
        print(written(args.output or args.checkpoint))


def _settings() -> tuple[Settings, argparse.Namespace]:
    """The settings and all arguments of the command line. Raises UserError."""
    parser = cli.checkpoint_parser("bipe_jax.evaluate", __doc__)
    parser.add_argument("--lengths", default="", help="such as 256,512,1024 (the config's)")
    parser.add_argument("--data", default="", help="such as 'texts/*.jsonl.zst' (the config's)")
    parser.add_argument("--sets", default="", help="names of sets, separated by | (the config's)")
    parser.add_argument("--windows", type=int, default=0, help="windows a data set (the config's)")
    parser.add_argument(
        "--protocol",
        default=SAME_TOKENS,
        help=f"{SAME_TOKENS}, non-overlapping or sliding:STRIDE ({SAME_TOKENS})",
    )
    parser.add_argument("--extend", default="", help="scale the rotary encoding, such as yarn:8")
    parser.add_argument("--output", default="", help="directory to write to (--checkpoint)")
    parser.add_argument("--follow", action="store_true", help="evaluate each new checkpoint")
    args = parser.parse_args()
    lengths = cli.numbers("lengths", args.lengths, int)
    if args.windows < 0:
        raise UserError(f"--windows={args.windows} must be at least 1")
    sets = tuple(name for name in args.sets.split("|") if name)
    return Settings(lengths, args.data, sets, args.windows, args.protocol, args.extend), args


if __name__ == "__main__":
    with cli.user_errors():
        main()
