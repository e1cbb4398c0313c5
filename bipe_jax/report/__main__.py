"""Makes one HTML page of the results of evaluations.

python -m bipe_jax.report runs/quickstart [runs/rope runs/alibi] --output=report.html
"""

import argparse
import logging
import os

from bipe_jax import cli
from bipe_jax.report import page
from bipe_jax.workdir import outputs

_LOG = logging.getLogger("bipe_jax.report")


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.report", description=__doc__)
    parser.add_argument("runs", nargs="+", help="directories of runs that were evaluated")
    parser.add_argument("--output", default="report.html", help="the page to write (report.html)")
    args = parser.parse_args()
    outputs.check(args.output)
    page.write(args.runs, args.output)
    size = os.path.getsize(args.output)
    _LOG.info(f"Wrote {args.output} ({size / 1024:,.0f} KiB)")


if __name__ == "__main__":
    with cli.user_errors():
        main()
