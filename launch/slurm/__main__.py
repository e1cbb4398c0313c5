"""Checks a run and submits it to SLURM:

python -m launch.slurm --config=FILE --workdir=DIR [--config.KEY=VALUE ...] [--dry-run] [-- FLAGS OF SBATCH]
"""

import argparse
import sys

from bipe_jax import cli
from bipe_jax.errors import UserError
from launch import jobs, slurm


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        allow_abbrev=False,
        description="Checks a run and submits it; flags of sbatch follow --.",
        epilog="--config.KEY=VALUE sets a field of the config.",
    )
    parser.add_argument("--config", required=True, help="such as configs/quickstart.py:rope")
    parser.add_argument("--workdir", required=True, help="on a disk that all nodes share")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    end = argv.index("--") if "--" in argv else len(argv)
    args, changes = parser.parse_known_args(argv[:end])
    for change in changes:
        if not change.startswith("--config.") or "=" not in change:
            raise UserError(f"unexpected argument {change!r}: flags of sbatch follow --")
    pairs = (change.removeprefix("--config.").partition("=") for change in changes)
    job = jobs.Job(args.config, args.workdir, tuple((key, value) for key, _, value in pairs))
    jobs.check(job)
    slurm.submit_one(job, argv[end + 1 :], args.dry_run)


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])
