"""Checks jobs, writes their JobSets and passes them to kubectl."""

import argparse
import logging
import re
import subprocess
from collections.abc import Mapping

import yaml

from bipe_jax.errors import UserError
from launch import environment, inputs, jobs, machines
from launch.gke import manifest

_LOG = logging.getLogger(__name__)

_LAUNCHER = "python -m launch.gke"
_OBJECT = r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?"
_MOST_HOURS = 24 * 365


def parser() -> machines.Parser:
    """The parser of all flags other than the job's."""
    flags = machines.Parser("launch.gke")
    flags.add_argument("--image", required=True, help="built from launch/gke/Dockerfile")
    flags.add_argument(
        "--service-account", default="", help="Kubernetes service account of the pods"
    )
    flags.add_argument(
        "--secret",
        action="append",
        default=[],
        help="a Kubernetes Secret whose keys become variables of the run; again for more",
    )
    flags.add_argument("--flex-start", action="store_true", help="nodes of flex-start, for 7 days")
    flags.add_argument("--reservation", default="", help="name of the reservation of the nodes")
    flags.add_argument("--queue", default="", help="local queue of Kueue")
    flags.add_argument("--priority", default="", help="priority class of Kueue's workloads")
    flags.add_argument("--ttl-hours", type=float, help="delete the JobSet so long after its end")
    return flags


def submit(to_launch: list[jobs.Job], arguments: list[str], dry_run: bool) -> None:
    """Launches a JobSet for each job; `arguments` are the flags of parser().

    Raises:
      UserError: a flag or a job is wrong, or kubectl failed.
    """
    launch(to_launch, parser().parse_args(arguments), dry_run)


def launch(to_launch: list[jobs.Job], args: argparse.Namespace, dry_run: bool) -> None:
    """Launches as `submit`, with parsed flags."""
    wanted = machines.of(args)
    if wanted.slice and wanted.slice.slices > 1 and wanted.slice.hosts == 1:
        raise UserError(
            f"--slice={wanted.slice.name}: GKE joins slices of several hosts only, and {wanted.slice.grid} "
            "is one host: use a larger slice"
        )
    _LOG.info(machines.cost(wanted, args, args.spot or args.flex_start))
    variables = environment.of(args)
    volumes = machines.volumes(args, to_launch)
    names = machines.names(to_launch, manifest.longest_name(wanted))
    if not dry_run:
        jobs.need("kubectl", _LAUNCHER)
    place = inputs.Place("the image", inputs.image(), volumes, others=False)
    # What is in a Secret of the cluster is not known here.
    known = None if args.secret else variables
    ready = machines.ready(to_launch, wanted, args.skip_preflight, place, known)
    if extras := sorted({extra for _, needed in ready for extra in needed.extras}):
        base = "tpu" if wanted.slice else "cuda"
        _LOG.info(
            f"The image must have been built with --build-arg EXTRA={','.join([base, *extras])}"
        )
    settings = _settings(args, volumes)

    def made(values: Mapping[str, str]) -> str:
        objects = []
        for name, (job, _) in zip(names, ready, strict=True):
            own = [manifest.secret(name, values)] if values else []
            secrets = (*args.secret, *([name] if values else []))
            objects += [*own, manifest.jobset(name, job, wanted, settings, secrets)]
        return yaml.safe_dump_all(objects, sort_keys=False)

    if dry_run:
        _LOG.info("kubectl apply -f -  would get:")
        print(made(environment.hidden(variables)), end="", flush=True)
        return
    for name in names:
        _remove_failed(name)
    jobs.execute(["kubectl", "apply", "-f", "-"], False, made(variables))
    selector = f"jobset.sigs.k8s.io/jobset-name={names[0]}"
    _LOG.info(f"Logs: kubectl logs --follow --selector={selector} --container=train")


def _settings(args: argparse.Namespace, volumes: list[tuple[str, str]]) -> manifest.Settings:
    kinds = {
        "--spot": args.spot,
        "--flex-start": args.flex_start,
        "--reservation": args.reservation,
    }
    if len(chosen := [flag for flag, value in kinds.items() if value]) > 1:
        raise UserError(f"{' and '.join(chosen)}: nodes are of one kind")
    labels = {"--queue": args.queue, "--priority": args.priority, "--reservation": args.reservation}
    names = {**labels, **{f"--secret={name}": name for name in args.secret}}
    for flag, name in names.items():
        if name and not re.fullmatch(_OBJECT, name):
            raise UserError(f"{flag.partition('=')[0]}={name} is not a name of Kubernetes")
    if args.ttl_hours is not None and not 0 <= args.ttl_hours < _MOST_HOURS:
        raise UserError(f"--ttl-hours={args.ttl_hours:g} must be between 0 and {_MOST_HOURS}")
    return manifest.Settings(
        args.image,
        tuple(volumes),
        spot=args.spot,
        flex_start=args.flex_start,
        reservation=args.reservation,
        account=args.service_account,
        queue=args.queue,
        priority=args.priority,
        ttl=None if args.ttl_hours is None else round(args.ttl_hours * 3600),
    )


def _remove_failed(name: str) -> None:
    """Deletes a JobSet that has failed, since it would stay failed when applied again."""
    line = ["kubectl", "get", "jobset", name, "--ignore-not-found"]
    line.append("--output=jsonpath={.status.terminalState}")
    state = subprocess.run(line, capture_output=True, text=True)
    if state.returncode:
        reason = (state.stderr.strip().splitlines() or ["it failed"])[-1]
        raise UserError(f"kubectl: {reason}; nothing was launched")
    if state.stdout.strip() == "Failed":
        jobs.execute(["kubectl", "delete", "jobset", name, "--wait"], False)
