"""Asks a checkpoint for facts that are hidden in long texts.

python -m bipe_jax.tasks --checkpoint=runs/quickstart [--tasks=passkey,niah-single] [--lengths=256,512]

Prints the share of right answers by task, length and depth, and writes tasks.json, tasks.png and
report.html, by default into the run's directory. The tasks are passkey, niah-single, niah-multikey,
niah-multivalue, niah-multiquery and variable-tracking; niah-multikey:8 has eight keys.
"""

from bipe_jax import cli, commands, flags, processes
from bipe_jax.tasks.evaluation import Settings, evaluate, tables


def main():
    args = commands.parser("tasks").parse_args()
    settings = Settings(
        flags.names(args.tasks, ",") or Settings.tasks,
        flags.numbers("lengths", args.lengths, int),
        flags.numbers("depths", args.depths, float),
        args.samples,
        args.seed,
        args.haystack,
        args.extend,
    )
    cli.set_up()
    evaluate(args.checkpoint, settings, args.output, lambda result: print(tables(result)))
    if processes.is_first():
        print(f"Wrote {args.output or args.checkpoint}/tasks.json, tasks.png and report.html")


if __name__ == "__main__":
    with cli.user_errors():
        main()
