"""Evaluates a checkpoint on data sets of SCROLLS, from SCROLLS' own files.

python -m bipe_jax.scrolls --checkpoint=runs/qasper --data=scrolls --tasks=qasper

Prints a line for each data set and the mean, and writes scrolls.json and predictions-TASK.jsonl, by default
into the run's directory. --data holds TASK.zip, or TASK/validation.jsonl.
"""

from bipe_jax import cli, commands, flags, processes
from bipe_jax.errors import UserError
from bipe_jax.scrolls.evaluation import Settings, evaluate, tables


def main():
    args = commands.parser("scrolls").parse_args()
    if args.tokens < 0 or args.most < 0:
        raise UserError("--tokens and --most must be at least 0")
    tasks = flags.names(args.tasks, ",")
    settings = Settings(args.data, tasks, args.split, args.tokens, args.most)
    cli.set_up()
    evaluate(args.checkpoint, settings, args.output, lambda result: print(tables(result)))
    if processes.is_first():
        print(f"Wrote {args.output or args.checkpoint}/scrolls.json and predictions")


if __name__ == "__main__":
    with cli.user_errors():
        main()
