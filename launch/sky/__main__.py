"""python -m launch.sky --config=FILE --workdir=DIR --slice=v5e:4x4 --volume=… (see docs/how-to/sky.md)."""

import sys

from bipe_jax import cli
from launch import machines
from launch.sky import managed

if __name__ == "__main__":
    with cli.user_errors():
        args, rest = managed.parser().parse_known_args(sys.argv[1:])
        managed.launch([machines.job_of(rest)], args, args.dry_run)
