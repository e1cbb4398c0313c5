"""python -m launch.gke --config=FILE --workdir=DIR --slice=v5e:16x16 --image=IMAGE … (docs/how-to/gke.md)."""

import sys

from bipe_jax import cli
from launch import machines
from launch.gke import jobset

if __name__ == "__main__":
    with cli.user_errors():
        args, rest = jobset.parser().parse_known_args(sys.argv[1:])
        jobset.launch([machines.job_of(rest)], args, args.dry_run)
