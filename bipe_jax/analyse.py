"""Shows how far back a checkpoint's attention looks, by layer and head.

python -m bipe_jax.analyse --checkpoint=runs/quickstart [--lengths=128,512] [--data=SOURCE]

Runs the model over the starts of long documents, sums the attention weights into bins of the distance
in segments and in tokens, prints a table and writes attention.json and report.html, by default into
the run's directory.
"""

from bipe_jax import cli, commands, flags, processes
from bipe_jax.evaluation.attention_distance import analyse
from bipe_jax.evaluation.tables import attention


def main():
    args = commands.parser("analyse").parse_args()
    lengths = flags.numbers("lengths", args.lengths, int)
    cli.set_up()
    analyse(
        args.checkpoint,
        lengths,
        args.data,
        args.output,
        args.blocks,
        lambda result: print(attention(result)),
    )
    if processes.is_first():
        print(f"Wrote {args.output or args.checkpoint}/attention.json and report.html")


if __name__ == "__main__":
    with cli.user_errors():
        main()
