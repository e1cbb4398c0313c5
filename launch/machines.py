"""The common part of the launchers for clouds: the machines of a job, its checks and its name."""

import argparse
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Collection

from jax.sharding import AbstractMesh

from bipe_jax import cli, hardware, sharding
from bipe_jax.config.needs import Needs
from bipe_jax.errors import UserError
from launch import environment, inputs, jobs, prices

_LOG = logging.getLogger(__name__)

PORT = 8476  # of the coordinator, on the run's first machine


@dataclasses.dataclass(frozen=True)
class Machines:
    """The machines of one run: TPU slices, or nodes with GPUs; each host has one process.

    Attributes:
      slice: the TPU slices, or None. gpu: a kind of GPU, or "". gpus: of one node. nodes: with GPUs.
    """

    slice: hardware.Slice | None
    gpu: str = ""
    gpus: int = 0
    nodes: int = 0

    @property
    def devices(self) -> int:
        """The number of devices of the whole run, as JAX counts them."""
        return self.slice.devices if self.slice else self.gpus * self.nodes


class Parser(cli.Parser):
    """A parser of a launcher's own flags."""

    def __init__(self, module: str):
        job = "of the job: --config=FILE --workdir=DIR [--name=NAME] [--config.KEY=VALUE …]"
        super().__init__(module, job)
        self.add_argument("--slice", help="TPU slices, such as v5e:16x16 or v5e:16x16*2")
        self.add_argument("--gpus", help="GPUs of one node, such as h100:8")
        self.add_argument("--nodes", type=int, help="with those GPUs (1)")
        self.add_argument(
            "--volume",
            action="append",
            default=[],
            help="SOURCE:PATH, to mount: gs://BUCKET or the name of a volume; again for more",
        )
        self.add_argument("--spot", action="store_true", help="machines that may be preempted")
        self.add_argument(
            "--skip-preflight",
            action="store_true",
            help="launch without compiling for the slice",
        )
        self.add_argument("--dry-run", action="store_true", help="print the job, launch nothing")
        prices.add_flag(self)
        environment.add_flags(self)


def of(args: argparse.Namespace) -> Machines:
    """The machines of parsed flags.

    Raises:
      UserError: the flags name none, or unknown ones.
    """
    if bool(args.slice) == bool(args.gpus):
        raise UserError("one of --slice=v5e:4x4 and --gpus=h100:8 is needed")
    if args.slice:
        if args.nodes is not None:
            raise UserError("--nodes is for --gpus: the number of hosts of a slice is known")
        return Machines(hardware.parse_slice(args.slice))
    kind, _, count = args.gpus.partition(":")
    if kind not in hardware.GPUS or not re.fullmatch("[1248]|16", count):
        raise UserError(
            f"--gpus={args.gpus} is unknown: use KIND:COUNT, KIND one of {', '.join(hardware.GPUS)}, "
            "COUNT one of 1, 2, 4, 8, 16 a node"
        )
    nodes = 1 if args.nodes is None else args.nodes
    if nodes < 1:
        raise UserError(f"--nodes={nodes} must be at least 1")
    return Machines(None, kind, int(count), nodes)


def cost(machines: Machines, args: argparse.Namespace, cheaper: bool) -> str:
    """The price of the machines of one run, in a line. Raises UserError: --price makes no sense.

    Args:
      cheaper: whether they are of a tier below the list price.
    """
    prices.check(args.price)
    if machines.slice:
        return prices.of_slice(machines.slice, args.price, cheaper)
    count = machines.gpus * machines.nodes
    return prices.of_gpus(f"{machines.gpu}:{machines.gpus}", count, args.price, cheaper)


def volumes(args: argparse.Namespace, to_launch: list[jobs.Job]) -> list[tuple[str, str]]:
    """The volumes of parsed flags, as pairs (source, path).

    Raises:
      UserError: a volume is not SOURCE:PATH, or a workdir is in no volume.
    """
    pairs = []
    for text in args.volume:
        jobs.check_line("--volume", text)
        source, _, path = text.rpartition(":")
        path = path.rstrip("/")
        name = re.fullmatch(r"(gs://)?[a-z0-9][a-z0-9._-]*", source)
        if not name or not re.fullmatch("/[^$]+", path):  # SkyPilot fills in $X
            raise UserError(
                f"--volume={text} must be gs://BUCKET:/PATH or NAME:/PATH, such as gs://my-runs:/runs"
            )
        pairs.append((source, path))
    for job in to_launch:
        if not any(f"{job.workdir}/".startswith(f"{path}/") for _, path in pairs):
            raise UserError(
                f"--workdir={job.workdir} is in none of the volumes: it must outlive the machines, as "
                "in --volume=gs://my-runs:/runs --workdir=/runs/x"
            )
    return pairs


def job_of(arguments: list[str]) -> jobs.Job:
    """The job of --config=FILE --workdir=DIR [--name=NAME] [--config.KEY=VALUE …].

    Raises:
      UserError: a flag is missing or unknown.
    """
    flags, overrides = {}, []
    for argument in arguments:
        match = re.fullmatch(r"--(config|workdir|name|config\.[\w.]+)=(.*)", argument, re.DOTALL)
        if not match:
            raise UserError(f"unexpected argument {argument!r}: flags are --name=value")
        if match[1].startswith("config."):
            overrides.append((match[1].removeprefix("config."), match[2]))
        else:
            flags[match[1]] = match[2]
    for name in ("config", "workdir"):
        if not flags.get(name):
            raise UserError(f"--{name} is needed")
    name = flags.get("name") or os.path.basename(flags["workdir"].rstrip("/"))
    return jobs.Job(flags["config"], flags["workdir"], tuple(overrides), name)


def ready(
    to_launch: list[jobs.Job],
    machines: Machines,
    skip_preflight: bool,
    place: inputs.Place,
    variables: Collection[str] | None,
) -> list[tuple[jobs.Job, Needs]]:
    """The checked jobs, with the number of devices in their configs, and what they need.

    Args:
      place: where they will be. variables: as `inputs.check`.

    Raises:
      UserError: a config is wrong, not in this repository, does not fit the slice, or lacks what it needs.
    """
    done = []
    for job in to_launch:
        path = job.config.partition(":")[0]
        if os.path.isabs(path) or os.path.normpath(path).startswith(".."):
            raise UserError(
                f"--config={job.config} must be a path inside this repository, such as "
                "configs/quickstart.py: the machines get its files alone"
            )
        # Otherwise machines that do not join each other would train separate runs.
        overrides = dict(job.overrides) | {"mesh.devices": machines.devices}
        job = dataclasses.replace(job, overrides=tuple(overrides.items()))
        config = jobs.check(job)
        if not machines.slice:  # GPUs have no preflight
            shape = sharding.mesh_shape(config, machines.devices)
            sharding.check_batch(config, AbstractMesh(shape, sharding.AXES))
        done.append((job, inputs.check(config, place, variables, job.workdir)))
    for job, _ in done:
        if machines.slice:
            jobs.preflight(job, machines.slice.name, skip_preflight)
        elif skip_preflight:
            _LOG.info("--skip-preflight skips nothing: only TPU slices have a preflight")
    return done


def names(to_launch: list[jobs.Job], most: int) -> list[str]:
    """Names of the jobs, of at most `most` letters, digits and hyphens, for the DNS (RFC 1035).

    A name that had to be changed ends in a hash of the original, so that it stays unique.

    Raises:
      UserError: two jobs have the same name.
    """
    done = {}
    for job in to_launch:
        name = re.sub("[^a-z0-9]+", "-", job.name.lower()).strip("-")
        if name != job.name or not name[:1].isalpha() or len(name) > most:
            digest = hashlib.sha256(job.name.encode(errors="surrogatepass")).hexdigest()[:6]
            name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
            name = f"{name[: most - 7].rstrip('-')}-{digest}"
        if name in done:
            raise UserError(f"two jobs have the name {job.name!r}: nothing was launched")
        done[name] = job
    return list(done)
