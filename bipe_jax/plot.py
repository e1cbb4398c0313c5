"""Draws perplexity by length, of several runs in one picture.

python -m bipe_jax.plot runs/quickstart runs/rope runs/alibi --output=comparison.png
"""

import argparse
import logging
import os

from bipe_jax import cli
from bipe_jax.report import pictures, results
from bipe_jax.workdir import outputs

_LOG = logging.getLogger("bipe_jax.plot")


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", help="directories that hold an evaluation.json")
    parser.add_argument("--output", default="extrapolation.png", help="the picture to write")
    args = parser.parse_args()
    outputs.check(args.output)
    paths = [os.path.abspath(path) for path in args.runs]
    names = [os.path.basename(path) for path in paths]
    names = [n if names.count(n) == 1 else path for n, path in zip(names, paths, strict=True)]
    evaluations = [results.read_file(path, results.Evaluation) for path in args.runs]
    pictures.perplexity(list(zip(names, evaluations, strict=True)), args.output)
    _LOG.info(f"Wrote {args.output}")


if __name__ == "__main__":
    with cli.user_errors():
        main()
