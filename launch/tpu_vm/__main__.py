"""Trains on Cloud TPU VMs, through queued resources. See docs/how-to/tpu_vm.md.

python -m launch.tpu_vm create    NAME --zone=Z --slice=v5e:4x4 --config=C --workdir=W [--spot|--reserved]
python -m launch.tpu_vm bootstrap NAME --zone=Z --slice=v5e:4x4 --config=C --workdir=W [--nfs=SERVER:/EXPORT]
python -m launch.tpu_vm run       NAME --zone=Z --slice=v5e:4x4 --config=C --workdir=W [--config.KEY=VALUE]
python -m launch.tpu_vm watch     ...   all three, and again after each preemption, until the run is done
python -m launch.tpu_vm smoke     NAME --zone=Z   20 steps on one chip, restarted, deleted, and the bill
python -m launch.tpu_vm status|logs|stop|delete NAME --zone=Z --slice=v5e:4x4

Each action can be repeated, and does only what is missing. --dry-run prints the calls of gcloud and runs
none. A slice is named as in bipe_jax.preflight: a generation and a grid of chips, and *N for N slices.
"""

import re
import sys

from bipe_jax import cli, hardware
from bipe_jax.errors import UserError
from launch import environment, jobs, machines, prices
from launch.tpu_vm import actions, money, watching
from launch.tpu_vm.gcloud import Resource

ALL = {
    action.__name__: action
    for action in (
        actions.create,
        actions.bootstrap,
        actions.run,
        watching.watch,
        watching.smoke,
        actions.status,
        actions.logs,
        actions.stop,
        actions.delete,
    )
}
OF_A_JOB = ("create", "bootstrap", "run", "watch", "smoke")
_SMALLEST = "v5e:1x1"
_ZONE = r"[a-z]+-[a-z]+\d+-([a-z]|ai\d[a-z])"
_NAME = r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?"


def parser() -> cli.Parser:
    """The parser of all actions' flags."""
    parser = cli.Parser("launch.tpu_vm", __doc__)
    parser.add_argument("action", choices=ALL)
    parser.add_argument("name", help="of the queued resource")
    parser.add_argument("--zone", required=True, help="such as us-west4-a")
    parser.add_argument("--slice", default="", help=hardware.SLICES)
    parser.add_argument("--project", default="", help="default: gcloud's")
    parser.add_argument("--dry-run", action="store_true", help="print gcloud's calls, run none")
    job = parser.add_argument_group(
        "create, bootstrap, run, watch",
        "--config=FILE --workdir=DIR, as the VMs see it, [--config.KEY=VALUE …], and:",
    )
    job.add_argument("--skip-preflight", action="store_true", help="do not compile the step first")
    environment.add_flags(job)
    new = parser.add_argument_group("create, watch; more flags of gcloud's create follow --")
    tier = new.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="cheap, and preempted at any time")
    tier.add_argument("--reserved", action="store_true", help="from the project's reservation")
    tier.add_argument("--reservation", default="", help="from the reservation of this name")
    tier.add_argument("--flex-start", action="store_true", help="cheap, for at most 7 days")
    prices.add_flag(new)
    new.add_argument("--yes", action="store_true", help="rent without asking")
    parser.add_argument(
        "--max-hours",
        type=float,
        help="create, run, watch: hours of the slice after which its VMs have it deleted",
    )
    new.add_argument("--runtime-version", default="", help="default: by generation")
    parser.add_argument("--nfs", default="", help="bootstrap, watch: SERVER:/EXPORT, as /mnt/bipe")
    watch = parser.add_argument_group("watch")
    watch.add_argument(
        "--delete",
        choices=("always", "done", "never"),
        default="never",
        help="the slice, when the run is done, or also when it fails or cannot be started (never)",
    )
    logs = parser.add_argument_group("logs")
    logs.add_argument("--worker", default="0", help="number of a VM of the slice, or all")
    logs.add_argument("--node", type=int, default=0, help="number of the slice, of several")
    logs.add_argument("--follow", action="store_true", help="keep printing")
    return parser


def main(argv: list[str]) -> None:
    """Runs an action. Raises UserError for a wrong argument or job, or if gcloud failed."""
    split = argv.index("--") if "--" in argv else len(argv)
    of_job = [word for word in argv[:split] if re.match(r"--(config[=.]|workdir=)", word)]
    args = parser().parse_args([word for word in argv[:split] if word not in of_job])
    args.extra = argv[split + 1 :]
    if not re.fullmatch(_NAME, args.name):
        raise UserError(
            f"{args.name!r} is not a valid name: use small letters, digits and -, at most 42"
        )
    if not re.fullmatch(_ZONE, args.zone):
        raise UserError(f"--zone={args.zone} does not have the form of a zone, such as us-west4-a")
    if args.nfs and not re.fullmatch(r"[\w.-]+:/[\w./-]*", args.nfs):
        raise UserError(f"--nfs={args.nfs} must be SERVER:/EXPORT, such as 10.0.0.2:/share")
    if not args.slice and args.action != "smoke":
        raise UserError("--slice is needed, such as --slice=v5e:4x4")
    slice_ = hardware.parse_slice(args.slice or _SMALLEST)
    if not slice_.chip.type:
        raise UserError(
            f"--slice={args.slice}: {slice_.chip.generation} is only in GKE: use launch.gke"
        )
    if not 0 <= args.node < slice_.slices or not re.fullmatch(r"\d+|all", args.worker):
        raise UserError(
            f"--node={args.node} --worker={args.worker}: there are {slice_.slices} node(s)"
        )
    money.check(args)
    if args.action in OF_A_JOB:
        if args.action == "smoke":
            batch = f"--config.batch_size={max(8, slice_.devices)}"
            of_job = [*watching.SMOKE, batch, f"--workdir=/tmp/bipe_jax/{args.name}", *of_job]
        args.job = machines.job_of(of_job)
        jobs.check(args.job)
    if not args.dry_run:
        jobs.need("gcloud", "launch.tpu_vm")
    resource = Resource(args.name, args.zone, slice_, args.project, args.dry_run)
    ALL[args.action](resource, args)


if __name__ == "__main__":
    with cli.user_errors():
        try:
            main(sys.argv[1:])
        except KeyboardInterrupt:  # ends `watch` and `logs --follow`, not the run
            sys.exit(130)
