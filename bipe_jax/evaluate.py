"""Evaluates a checkpoint at several lengths:

python -m bipe_jax.evaluate --checkpoint=runs/quickstart --lengths=256,512,1024 [--data=GLOBS]

Prints a table and writes evaluation.json and extrapolation.png, by default into the run's directory.
"""

import argparse
import json
import os

from bipe_jax import checkpoint, cli, perplexity, plot
from bipe_jax.compiling import enable_cache
from bipe_jax.data import sources
from bipe_jax.errors import UserError

MULTIPLES = (1, 2, 4, 8, 16)


def evaluate(path: str, lengths=(), data: str = "", output: str = "", windows: int = 0) -> dict:
    """Scores the same targets at each length, prints the table, writes evaluation.json and a plot.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      lengths: tokens; () takes the config's, which are 1 … 16 times the training length by default.
      data: a source, see `data.sources.documents`; "" takes the config's `data.evaluation`.
      output: directory for the two files; "" takes `path`.
      windows: target windows a data set; 0 takes the config's.

    Returns:
      What evaluation.json holds.

    Raises:
      UserError: a wrong input; see the README.
    """
    meta, params = checkpoint.load(path)
    config = meta.config
    config.evaluation.windows = windows or config.evaluation.windows
    lengths = lengths or config.evaluation.lengths
    lengths = lengths or [config.sequence_length * multiple for multiple in MULTIPLES]
    data = data or config.data.evaluation
    perplexity.check_lengths(config, lengths)
    output = output or path
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be made: {error.strerror}") from None
    documents = [
        {"set": d["set"], "tokens": meta.tokenizer.encode(d["text"])}
        for d in sources.documents(data, tuple(config.data.sets), sources.policy_of(config))
    ]
    rows = perplexity.by_length(
        config, params, documents, meta.tokenizer.byte_lengths(), lengths, cli.say
    )
    result = {
        "name": os.path.basename(os.path.abspath(output)),
        "step": meta.step,
        "training_length": config.sequence_length,
        "position": config.position.to_dict(),
        "segment_rule": config.segments.rule,
        "data": data,
        "protocol": "same targets at every length; BOS only at a document's start",
        "results": rows,
    }
    with open(os.path.join(output, "evaluation.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    picture = os.path.join(output, "extrapolation.png")
    plot.draw([result], picture)
    print(table(rows))
    print(f"Wrote {output}/evaluation.json and {picture}")
    return result


def table(rows: list[dict]) -> str:
    """The rows as text: perplexity ± its standard error over documents, and what it was scored on."""
    head = ("data set", "length", "perplexity", "±", "bits/byte", "tokens", "documents",
            "tokens/segment", "segments")  # fmt: skip
    lines = [
        (
            row["set"],
            f"{row['length']:,}",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity_error']:.2f}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['tokens']:,}",
            f"{row['documents']}",
            f"{row['segment_tokens_mean']:.1f}",
            f"{row['segments_per_block']:.0f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def pad(line):
        first = line[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    return "\n".join(map(pad, [head, *lines]))


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's workdir, or one step's directory"
    )
    parser.add_argument("--lengths", default="", help="such as 256,512,1024 (the config's)")
    parser.add_argument("--data", default="", help="such as 'texts/*.jsonl.zst' (the config's)")
    parser.add_argument("--output", default="", help="directory to write to (--checkpoint)")
    parser.add_argument("--windows", type=int, default=0, help="windows a data set (the config's)")
    args = parser.parse_args()
    try:
        lengths = [int(length) for length in args.lengths.split(",") if length]
    except ValueError:
        raise UserError(
            f"--lengths={args.lengths} must be whole numbers, such as 256,512"
        ) from None
    checkpoint.quiet()
    enable_cache()
    evaluate(args.checkpoint, lengths, args.data, args.output, args.windows)


if __name__ == "__main__":
    with cli.user_errors():
        main()
