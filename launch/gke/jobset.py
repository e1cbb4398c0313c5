"""Checks jobs, writes their JobSets and passes them to kubectl."""

import argparse
import logging
import subprocess
import sys

import yaml

from bipe_jax.errors import UserError
from launch import jobs, machines
from launch.gke import manifest

_LOG = logging.getLogger(__name__)

_LAUNCHER = "python -m launch.gke"


def parser() -> machines.Parser:
    """The parser of all flags other than the job's."""
    flags = machines.Parser("launch.gke")
    flags.add_argument("--image", required=True, help="built from launch/gke/Dockerfile")
    flags.add_argument(
        "--service-account", default="", help="Kubernetes service account of the pods"
    )
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
    volumes = machines.volumes(args, to_launch)
    names = machines.names(to_launch, manifest.longest_name(wanted))
    if not dry_run:
        jobs.need("kubectl", _LAUNCHER)
    ready = machines.ready(to_launch, wanted, args.skip_preflight)
    made = [
        manifest.jobset(
            name,
            job,
            wanted,
            args.image,
            spot=args.spot,
            volumes=volumes,
            account=args.service_account,
        )
        for name, job in zip(names, ready, strict=True)
    ]
    if dry_run:
        _LOG.info("kubectl apply -f -  would get:")
        yaml.safe_dump_all(made, sys.stdout, sort_keys=False)
        return
    for name in names:
        _remove_failed(name)
    jobs.execute(["kubectl", "apply", "-f", "-"], False, yaml.safe_dump_all(made, sort_keys=False))
    selector = f"jobset.sigs.k8s.io/jobset-name={names[0]}"
    _LOG.info(f"Logs: kubectl logs --follow --selector={selector} --container=train")


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
