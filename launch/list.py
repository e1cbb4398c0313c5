"""Lists runs everywhere: those in directories, and those that clouds and clusters have.

python -m launch.list [DIR ...] [--zone=us-west4-a ...] [--project=P]

A line for each run below the directories, at any depth; for each queued resource of TPU VMs (gcloud's zone,
or those of --zone), JobSet of kubectl's namespace, job of SLURM and managed job of SkyPilot, where the
program of each is installed. One that does not answer is a line on standard error. It needs no JAX.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import NamedTuple

from bipe_jax import streams
from bipe_jax.report.text import table
from bipe_jax.workdir import Workdir, files, heartbeat, metrics

_SECONDS = 60  # that a program may take
_RUN = Workdir("")
_SIGNS = (_RUN.config, _RUN.heartbeat, _RUN.failed, _RUN.point)  # files that only workdirs have


class Row(NamedTuple):
    """One run. age: seconds since it was heard of, or since a queue has had it; None: not known."""

    where: str
    name: str
    state: str
    step: str = ""
    age: float | None = None


def in_directory(root: str) -> Iterator[Row]:
    """The runs in a directory and below it, by name."""
    for directory, below, names in os.walk(root):
        if {*_SIGNS} & {*names}:
            below.clear()
            yield _of_workdir(directory)
        below.sort()


def _of_workdir(workdir: str) -> Row:
    run = Workdir(workdir)
    config = files.read_json(run.config) or files.read_json(run.point) or {}
    beat = heartbeat.read(workdir)
    step = max(metrics.latest(workdir).step, run.latest_step() or 0)
    steps = config.get("steps")
    total = f"/{steps:,}" if isinstance(steps, int) else ""
    if run.read_failure():
        state = "failed"
    elif heartbeat.alive(beat):
        state = beat["phase"] if beat else ""
    elif beat and beat["phase"] in heartbeat.ENDED:
        state = beat["phase"]
    else:
        state = "dead" if beat else "not started"
    age = heartbeat.age(beat) if beat else None
    return Row("directory", workdir, str(state), f"{step:,}{total}", age)


def _since(timestamp: str | None) -> float | None:
    """Seconds since a time of RFC 3339."""
    if not timestamp:
        return None
    return time.time() - datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()


def _queued_resources(text: str) -> Iterator[Row]:
    for resource in json.loads(text):
        name, state = resource["name"].rpartition("/")[2], resource["state"]["state"]
        node = (resource.get("tpu", {}).get("nodeSpec") or [{}])[0].get("node", {})
        kind = f"tpu_vm {node['acceleratorType']}" if node.get("acceleratorType") else "tpu_vm"
        yield Row(kind, name, state, age=_since(resource.get("createTime")))


def _jobsets(text: str) -> Iterator[Row]:
    for jobset in json.loads(text)["items"]:
        status, suspended = jobset.get("status", {}), jobset["spec"].get("suspend")
        state = status.get("terminalState") or ("Suspended" if suspended else "Running")
        restarts = f", {status['restarts']} restarts" if status.get("restarts") else ""
        age = _since(jobset["metadata"].get("creationTimestamp"))
        yield Row("gke", jobset["metadata"]["name"], f"{state}{restarts}", age=age)


def _slurm_jobs(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        number, state, submitted, comment = line.strip().split("|", 3)
        age = time.time() - datetime.fromisoformat(submitted).timestamp()
        shown = f"{number} {comment}" if comment != "(null)" else number
        yield Row("slurm", shown, state, age=age)


def _sky_jobs(text: str) -> Iterator[Row]:
    for job in json.loads(text):
        submitted = job.get("submitted_at")
        age = time.time() - submitted if submitted else None
        yield Row("sky", str(job["job_name"]), str(job.get("status", "")), age=age)


class Source(NamedTuple):
    """A program that lists runs, and how its output is read."""

    line: list[str]
    read: Callable[[str], Iterator[Row]]


def sources(zones: Sequence[str], project: str) -> list[Source]:
    """Those that this machine has the program of."""
    gcloud = ["gcloud", "compute", "tpus", "queued-resources", "list", "--format=json", "--quiet"]
    gcloud += [f"--project={project}"] if project else []
    wanted = [
        *(Source([*gcloud, *zone], _queued_resources) for zone in ([f"--zone={z}"] for z in zones)),
        *([] if zones else [Source(gcloud, _queued_resources)]),
        Source(["kubectl", "get", "jobsets", "--output=json"], _jobsets),
        Source(["squeue", "--me", "--noheader", "--format=%i|%T|%V|%k"], _slurm_jobs),
        Source(["sky", "jobs", "queue", "--skip-finished", "--output=json"], _sky_jobs),
    ]
    return [source for source in wanted if shutil.which(source.line[0])]


def ask(source: Source) -> tuple[list[Row], str]:
    """The runs of a source, and why there are none, or ""."""
    try:
        done = subprocess.run(
            source.line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
            return [], f"{shlex.join(source.line)}: {reason}"
        return list(source.read(done.stdout)), ""
    except subprocess.TimeoutExpired:
        return [], f"{shlex.join(source.line)}: no answer in {_SECONDS} s"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return [], f"{shlex.join(source.line)} gave an unexpected answer: {error!r}"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def parser() -> argparse.ArgumentParser:
    """The parser of its flags."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.list",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="*", metavar="DIR", help="with workdirs in it")
    parser.add_argument("--zone", action="append", default=[], help="of TPU VMs; again for more")
    parser.add_argument("--project", default="", help="of TPU VMs (gcloud's)")
    return parser


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    rows = [row for root in args.directories for row in in_directory(root)]
    missing = [root for root in args.directories if not os.path.isdir(root)]
    reasons = [f"{root}: no such directory" for root in missing]
    with ThreadPoolExecutor() as pool:
        for found, reason in pool.map(ask, sources(args.zone, args.project)):
            rows += found
            reasons += [reason] * bool(reason)
    if rows:
        cells = [(row.name, row.where, row.state, row.step, _age(row.age)) for row in rows]
        print(table(("run", "where", "state", "step", "age"), cells))
    for reason in reasons:
        print(reason, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    streams.harden()
    sys.exit(main(sys.argv[1:]))
