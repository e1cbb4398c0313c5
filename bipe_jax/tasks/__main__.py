"""Asks a checkpoint for facts that are hidden in long texts.

python -m bipe_jax.tasks --checkpoint=runs/quickstart [--tasks=passkey,niah-single] [--lengths=256,512]

Prints the share of right answers by task, length and depth, and writes tasks.json, tasks.png and
report.html, by default into the run's directory. The tasks are passkey, niah-single, niah-multikey,
niah-multivalue, niah-multiquery and variable-tracking; niah-multikey:8 has eight keys.
"""

from bipe_jax import cli, processes
from bipe_jax.tasks.evaluation import Settings, evaluate, tables


def main():
    defaults = Settings()
    parser = cli.checkpoint_parser("bipe_jax.tasks", __doc__)
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
        cli.numbers("lengths", args.lengths, int),
        cli.numbers("depths", args.depths, float),
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
