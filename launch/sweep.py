"""Trains all points of a sweep, on this machine or through a launcher, and compares them.

python -m launch.sweep --config=configs/quickstart.py --sweep=configs/sweeps/positions.py \\
  --output=runs/positions [--on=local|slurm|gke|sky] [--jobs=2] [--config.KEY=VALUE ...] [-- BACKEND FLAGS]
python -m launch.sweep --collect=runs/positions

All points are checked before the first starts. The same command again resumes unfinished points. See
docs/how-to/sweeps.md.
"""

import argparse
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from bipe_jax import cli
from bipe_jax.errors import PREEMPTED, UserError
from bipe_jax.workdir import heartbeat
from launch import environment, inputs, jobs, local, points

_LOG = logging.getLogger("launch.sweep")

_BACKENDS = ("slurm", "gke", "sky")
_SHARED = ("slurm",)  # backends whose runs share the file system of this machine


def parser() -> cli.Parser:
    """The parser of the sweep's own flags."""
    parser = cli.Parser("launch.sweep", __doc__)
    parser.add_argument("--config", default="", help="such as configs/quickstart.py[:ARGUMENT]")
    parser.add_argument("--sweep", default="", help="such as configs/sweeps/positions.py")
    parser.add_argument("--output", default="", help="directory with a directory for each point")
    parser.add_argument("--on", default="local", help="local, slurm, gke or sky (local)")
    parser.add_argument("--jobs", type=int, default=None, help="local runs at a time (1)")
    environment.add_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument(
        "--collect",
        nargs="?",
        const="",
        metavar="DIR",
        help="compare the points in --output, or DIR",
    )
    parser.add_argument(
        "--over",
        default=None,
        metavar="FIELD",
        help="with --collect: average over the values of this field ('': none; the seed, if it varies)",
    )
    parser.add_argument(
        "--baseline",
        default="",
        metavar="LABEL",
        help="with --collect: what the others are compared with, as the table names it (the first)",
    )
    return parser


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]], list[str]]:
    """The arguments, the overrides, and the backend's flags."""
    argv, backend = _split(argv, "--")
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    for argument in overrides:
        if "=" not in argument:
            raise UserError(f"{argument}: overrides are --config.KEY=VALUE")
    args = parser().parse_args([argument for argument in argv if argument not in overrides])
    split = (argument.removeprefix("--config.").partition("=") for argument in overrides)
    return args, [(key, value) for key, _, value in split], backend


def _split(argv: list[str], at: str) -> tuple[list[str], list[str]]:
    where = argv.index(at) if at in argv else len(argv)
    return argv[:where], argv[where + 1 :]


def main(argv: list[str]) -> int:
    args, overrides, flags = _parse(argv)
    if args.collect is not None:
        from launch.collect import collect  # matplotlib is slow to import

        collect(args.collect or _needed(args, "output"), args.over, args.baseline)
        return 0
    if args.over is not None or args.baseline:
        raise UserError("--over and --baseline are for --collect")
    for name in ("config", "sweep", "output"):
        _needed(args, name)
    if args.on != "local" and args.on not in _BACKENDS:
        raise UserError(f"--on={args.on} is unknown: use local, {', '.join(_BACKENDS)}")
    if args.on in ("local", *_SHARED):
        jobs.check_on_disk("--output", args.output)
    if args.on == "local" and flags:
        raise UserError(
            f"-- {shlex.join(flags)}: flags after -- are for --on={'|'.join(_BACKENDS)}"
        )
    if args.on != "local" and args.jobs is not None:
        raise UserError(f"--jobs={args.jobs} is for --on=local: {args.on} has a queue of its own")
    if args.on != "local" and (args.env or args.env_file):
        raise UserError(f"--env and --env-file of --on={args.on} follow --, among its flags")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be at least 1")
    checked = points.check(points.read(args.sweep), args.config, overrides, args.output, args.sweep)
    if args.on != "local":
        return _submit(checked, args, flags)
    variables = environment.of(args)
    for point in checked:
        if not points.finished(point.job.workdir, point.config):
            inputs.check(point.config, inputs.LOCAL, variables, point.job.workdir)
    if args.dry_run:
        for point in _unfinished(checked):
            jobs.execute([*jobs.TRAIN, *point.job.arguments()], dry_run=True)
        return 0
    status = local.run(checked, args.jobs or 1, variables)
    if status != PREEMPTED:
        _LOG.info(f"To compare them: python -m launch.sweep --collect={shlex.quote(args.output)}")
    return status


def _needed(args, name: str) -> str:
    if not getattr(args, name):
        raise UserError(f"--{name} is needed: see python -m launch.sweep --help")
    return getattr(args, name)


def _unfinished(checked: Sequence[points.Checked]) -> list[points.Checked]:
    """The unfinished points; the others are logged."""
    left = []
    for point in checked:
        if points.finished(point.job.workdir, point.config):
            _LOG.info(f"{point.job.name}: finished before")
        else:
            left.append(point)
    return left


def _submit(checked: Sequence[points.Checked], args, flags: list[str]) -> int:
    try:
        backend = importlib.import_module(f"launch.{args.on}")
    except ImportError as error:
        raise UserError(
            f"--on={args.on} cannot be used here ({error}); nothing was launched"
        ) from None
    if args.on not in _SHARED and not os.path.isdir(args.output):
        _LOG.info(f"{args.output} is not on this machine: finished points are not known here")
    left = []
    for point in _unfinished(checked):
        if beat := heartbeat.read_alive(point.job.workdir):
            _LOG.info(f"{point.job.name}: running on {beat.get('host')} ({beat['phase']})")
        else:
            left.append(point)
    if not left:
        _LOG.info("Nothing to launch")
        return 0
    backend.submit([point.job for point in left], flags, args.dry_run)
    if not args.dry_run and (args.on in _SHARED or os.path.isdir(args.output)):
        for point in checked:
            points.record(point.job.workdir, point.config)
    return 0


if __name__ == "__main__":
    with cli.user_errors():
        sys.exit(main(sys.argv[1:]))
