"""Draws perplexity by length, of several runs in one picture.

python -m bipe_jax.plot runs/quickstart runs/rope runs/alibi --output=comparison.png

The output's extension is the format, such as .png, .svg or .pdf.
"""

import logging

from bipe_jax import cli, commands
from bipe_jax.errors import UserError
from bipe_jax.report import comparing, pictures, results
from bipe_jax.workdir import outputs

_LOG = logging.getLogger("bipe_jax.plot")


def main():
    args = commands.parser("plot").parse_args()
    if args.width is not None and not 2.5 <= args.width <= 50:
        raise UserError(f"--width={args.width:g} must be from 2.5 to 50 inches")
    outputs.check(args.output)
    names = results.names_of(args.runs, args.names)
    evaluations = [results.read_file(path, results.Evaluation) for path in args.runs]
    groups = comparing.alone(list(zip(names, evaluations, strict=True)))
    pictures.perplexity(groups, args.output, args.width, args.ratio)
    _LOG.info(f"Wrote {args.output}")


if __name__ == "__main__":
    with cli.user_errors():
        main()
