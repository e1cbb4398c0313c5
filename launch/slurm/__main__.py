"""Checks a run and submits it to SLURM (see docs/how-to/slurm.md).

python -m launch.slurm --config=FILE --workdir=DIR [--config.KEY=VALUE ...] [--dry-run] [-- FLAGS OF SBATCH]
"""

import sys

from bipe_jax import cli
from launch import environment, machines, slurm


def parser() -> cli.Parser:
    """The parser of its own flags: before `--`, beside the job's."""
    parser = cli.Parser("launch.slurm", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the command, run nothing")
    environment.add_flags(parser)
    return parser


def main(argv: list[str]) -> None:
    end = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser().parse_known_args(argv[:end])
    job = machines.job_of(rest)
    slurm.submit_one(job, argv[end + 1 :], environment.of(args), args.dry_run)


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])
