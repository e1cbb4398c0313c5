"""Asks a checkpoint for facts that are hidden in long texts:

python -m bipe_jax.tasks --checkpoint=runs/quickstart [--tasks=passkey,niah-single] [--lengths=256,512]

Prints the share of right answers by task, length and depth, and writes tasks.json, tasks.png and
report.html, by default into the run's directory. The tasks are passkey, niah-single, niah-multikey,
niah-multivalue, niah-multiquery and variable-tracking; niah-multikey:8 has eight keys.
"""

import argparse

from bipe_jax import checkpoint, cli, processes
from bipe_jax.errors import UserError
from bipe_jax.tasks.evaluation import Settings, evaluate
from bipe_jax.training.compiling import enable_cache


def _numbers(flag: str, given: str, kind) -> tuple:
    try:
        # Adding 0 makes of -0.0 what is the same number.
        return tuple(kind(number) + 0 for number in given.split(",") if number)
    except ValueError:
        wanted = "whole numbers, such as 256,512" if kind is int else "numbers, such as 0,0.5,1"
        raise UserError(f"--{flag}={given} must be {wanted}") from None


def main():
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.tasks", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's workdir, or one step's directory"
    )
    parser.add_argument("--tasks", default=",".join(defaults.tasks), help="(all)")
    parser.add_argument("--lengths", default="", help="tokens (1 … 16 times the training length)")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="(0,0.25,0.5,0.75,1)")
    parser.add_argument("--samples", type=int, default=defaults.samples, help="a cell (20)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of all that is drawn (0)")
    parser.add_argument(
        "--haystack", default="", help="a source of text, such as 'texts/*.jsonl.zst' (noise)"
    )
    parser.add_argument("--extend", default="", help="scale the rotary encoding, such as ntk:8")
    parser.add_argument("--output", default="", help="directory to write to (--checkpoint)")
    args = parser.parse_args()
    settings = Settings(
        tuple(name for name in args.tasks.split(",") if name),
        _numbers("lengths", args.lengths, int),
        _numbers("depths", args.depths, float),
        args.samples,
        args.seed,
        args.haystack,
        args.extend,
    )
    checkpoint.quiet()
    enable_cache()
    processes.join()
    evaluate(args.checkpoint, settings, args.output)


if __name__ == "__main__":
    with cli.user_errors():
        main()
