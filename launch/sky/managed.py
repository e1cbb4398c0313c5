"""Checks jobs, fills in tpu.yaml or gpu.yaml for each, and passes them to `sky jobs launch`."""

import argparse
import json
import logging
import pathlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence

import yaml

from bipe_jax import hardware
from bipe_jax.errors import UserError
from launch import environment, inputs, jobs, machines
from launch.machines import Machines

_LOG = logging.getLogger(__name__)

_LAUNCHER = "python -m launch.sky"
_LAUNCH = ["sky", "jobs", "launch", "--yes", "--detach-run"]
_MOST = 50  # letters of a name
_MOST_CHIPS = 2048  # of a slice in SkyPilot's catalogue


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as literal blocks."""


def _text(dumper, text):
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def parser() -> machines.Parser:
    """The parser of all flags other than the job's."""
    return machines.Parser("launch.sky")


def submit(to_launch: list[jobs.Job], arguments: list[str], dry_run: bool) -> None:
    """Launches a managed job for each job; `arguments` are the flags of parser().

    Raises:
      UserError: a flag or a job is wrong, or sky failed.
    """
    launch(to_launch, parser().parse_args(arguments), dry_run)


def launch(to_launch: list[jobs.Job], args: argparse.Namespace, dry_run: bool) -> None:
    """Launches as `submit`, with parsed flags."""
    wanted = machines.of(args)
    accelerators = _accelerators(wanted)
    _LOG.info(machines.cost(wanted, args, args.spot))
    variables = environment.of(args)
    volumes = machines.volumes(args, to_launch)
    names = machines.names(to_launch, _MOST)
    if not dry_run:
        jobs.need("sky", _LAUNCHER)
    files = inputs.not_ignored()
    place = inputs.Place("the files that git does not ignore", files, volumes, others=False)
    ready = machines.ready(to_launch, wanted, args.skip_preflight, place, variables)
    secrets = environment.hidden(variables) if dry_run else variables
    made = {}
    for name, (job, needed) in zip(names, ready, strict=True):
        filled = task(name, job, wanted, accelerators, spot=args.spot, volumes=volumes)
        filled["setup"] = _with_extras(filled["setup"], needed.extras)
        if secrets:
            filled["secrets"] = secrets
        made[name] = yaml.dump(filled, Dumper=_Dumper, sort_keys=False)
    if dry_run:
        for name, text in made.items():
            print(f"---\n# {shlex.join([*_LAUNCH, f'{name}.yaml'])}\n{text}", end="", flush=True)
        return
    running = _unfinished()
    with tempfile.TemporaryDirectory() as directory:
        for name, text in made.items():
            if name in running:  # two jobs would write to the same workdir
                _LOG.info(f"{name} is not finished: kept (sky jobs cancel --name {name})")
                continue
            path = pathlib.Path(directory, f"{name}.yaml")
            path.write_text(text, encoding="utf-8")
            jobs.execute([*_LAUNCH, str(path)], False)
    _LOG.info("Logs: sky jobs queue; sky jobs logs --name NAME")


def task(name, job: jobs.Job, wanted: Machines, accelerators, *, spot, volumes) -> dict:
    """The configuration of a SkyPilot task.

    Args:
      volumes: pairs (source, path) to mount: gs://BUCKET, or the name of one of SkyPilot's volumes.
    """
    template = pathlib.Path(__file__).with_name("tpu.yaml" if wanted.slice else "gpu.yaml")
    made = yaml.safe_load(template.read_text(encoding="utf-8"))
    made["name"] = name
    made["resources"] |= {"accelerators": accelerators, "use_spot": spot}
    if not wanted.slice:
        made["num_nodes"] = wanted.nodes
    mode = made["file_mounts"]["/runs"]["mode"]
    made["file_mounts"] = {
        path: {"source": source, "mode": mode}
        for source, path in volumes
        if source.startswith("gs://")
    }
    if named := {path: source for source, path in volumes if not source.startswith("gs://")}:
        made["volumes"] = named
    first, _, rest = made["run"].partition("\n")
    assert first.startswith("set -- "), first
    # The only host needs no coordination, see `processes.start`.
    alone = "export JAX_NUM_PROCESSES=1\n" if wanted.slice and wanted.slice.hosts == 1 else ""
    made["run"] = f"set -- {shlex.join(job.arguments())}\n{alone}{rest}"
    return made


def _with_extras(setup: str, extras: Sequence[str]) -> str:
    """The script that also installs extras, besides `tpu` or `cuda`."""
    added, count = re.subn(r"'\.\[(\w+)\]'", lambda m: f"'.[{','.join([m[1], *extras])}]'", setup)
    assert count == 1, setup
    return added


def _accelerators(machines: Machines) -> str:
    wanted = machines.slice
    if not wanted:
        return f"{hardware.GPUS[machines.gpu].sky}:{machines.gpus}"
    # SkyPilot's names of slices have no grid.
    named = wanted.chip.type and wanted.default_grid and wanted.chips <= _MOST_CHIPS
    if wanted.slices > 1 or not named:
        raise UserError(
            f"--slice={wanted.name}: SkyPilot launches one slice of v4, v5e, v5p or v6e in Google's default "
            "shape for its number of chips: use python -m launch.gke or launch.tpu_vm"
        )
    return f"tpu-{wanted.accelerator_type}"


def _unfinished() -> set[str]:
    """The names of unfinished managed jobs."""
    line = ["sky", "jobs", "queue", "--skip-finished", "--output=json"]
    done = subprocess.run(line, capture_output=True, text=True)
    try:
        if done.returncode:
            raise ValueError(" ".join(done.stderr.split()) or f"status {done.returncode}")
        return {record["job_name"] for record in json.loads(done.stdout)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shlex.join(line)}: {error}; nothing was launched") from None
