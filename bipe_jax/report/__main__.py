"""Makes one HTML page of the results of evaluations, or a table of their perplexities.

python -m bipe_jax.report runs/quickstart [runs/rope runs/alibi] --output=report.html

The output's extension is the format: .html for the page; .csv, or .tex for LaTeX with booktabs.
"""

import logging
import os

from bipe_jax import cli, commands
from bipe_jax.report import comparing, page, results, tables
from bipe_jax.workdir import outputs

_LOG = logging.getLogger("bipe_jax.report")


def main():
    args = commands.parser("report").parse_args()
    outputs.check(args.output)
    extension = os.path.splitext(args.output)[1].lower()
    if extension in tables.FORMATS:
        runs = results.read(args.runs, args.names)
        groups = comparing.alone([(r.name, r.evaluation) for r in runs if r.evaluation])
        text = tables.of_format(groups, extension, args.baseline)
        outputs.write_bytes(args.output, text.encode())
    else:
        page.write(args.runs, args.output, names=args.names, baseline=args.baseline)
    size = os.path.getsize(args.output)
    _LOG.info(f"Wrote {args.output} ({size / 1024:,.0f} KiB)")


if __name__ == "__main__":
    with cli.user_errors():
        main()
