"""Shows how far back a checkpoint's attention looks, by layer and head.

python -m bipe_jax.analyse --checkpoint=runs/quickstart [--lengths=128,512] [--data=SOURCE]

Runs the model over the starts of long documents, sums the attention weights into bins of the distance
in segments and in tokens, prints a table and writes attention.json and report.html, by default into
the run's directory.
"""

from bipe_jax import cli, processes
from bipe_jax.evaluation.attention_distance import BLOCKS, analyse
from bipe_jax.evaluation.tables import attention


def main():
    parser = cli.checkpoint_parser("bipe_jax.analyse", __doc__)
    parser.add_argument("--lengths", default="", help="such as 256,1024 (1 and 4 times training's)")
    parser.add_argument("--data", default="", help="such as 'texts/*.jsonl.zst' (the config's)")
    parser.add_argument("--output", default="", help="directory to write to (--checkpoint)")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"documents at most ({BLOCKS})")
    args = parser.parse_args()
    lengths = cli.numbers("lengths", args.lengths, int)
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
