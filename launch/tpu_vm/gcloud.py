"""Calls of gcloud for one queued resource, and its answers."""

import dataclasses
import json
import logging
import shlex
import subprocess
from collections.abc import Sequence

from bipe_jax.errors import UserError
from bipe_jax.hardware import Slice
from launch import jobs

_LOG = logging.getLogger(__name__)

_ALPHA = ("--reservation=", "--provisioning-model=")  # flags of the track `alpha` alone
ABSENT = "absent"  # besides the states of Google: ACTIVE, WAITING_FOR_RESOURCES, …


def slice_flags(wanted: Slice) -> list[str]:
    """Flags of `gcloud compute tpus queued-resources create` for the accelerators and their grid."""
    if wanted.default_grid:
        return [f"--accelerator-type={wanted.accelerator_type}"]
    return [f"--type={wanted.chip.type}", f"--topology={wanted.grid}"]


def track(wanted: Slice, flags: Sequence[str] = ()) -> list[str]:
    """gcloud's release track: the general one lacks some flags, and in --type generations after v4."""
    grid = not wanted.default_grid and wanted.chip.generation != "v4"
    return ["alpha"] if grid or any(flag.startswith(_ALPHA) for flag in flags) else []


class Final(UserError):
    """An error that a retry would repeat."""


@dataclasses.dataclass(frozen=True)
class Resource:
    """A queued resource, which may not exist.

    Attributes:
      name: of the queued resource, and of its nodes: NAME, or NAME-0 and so on of several slices.
      project: "" is gcloud's default.
    """

    name: str
    zone: str
    slice: Slice
    project: str = ""
    dry_run: bool = False

    def nodes(self) -> list[str]:
        count = self.slice.slices
        return [self.name] if count == 1 else [f"{self.name}-{i}" for i in range(count)]

    def _line(self, group: str, action: str, *arguments: str, track=()) -> list[str]:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", *track, "compute", "tpus", group, action, *arguments, *where, "--quiet"]

    def state(self) -> str:
        """One of Google's states, or ABSENT; ABSENT in a dry run.

        Raises:
          UserError: gcloud failed, or the resource is another slice.
        """
        line = self._line("queued-resources", "describe", self.name, "--format=json")
        if self.dry_run:
            jobs.execute(line, dry_run=True)
            return ABSENT
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            if "NOT_FOUND" in done.stderr:
                return ABSENT
            reason = " ".join(done.stderr.split()) or f"status {done.returncode}"
            raise UserError(f"{shlex.join(line)}: {reason}")
        try:
            described = json.loads(done.stdout)
            state = described["state"]["state"]
            node = described["tpu"]["nodeSpec"][0].get("node", {})
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{shlex.join(line)} gave an unexpected answer: {error!r}") from None
        there = node.get("acceleratorType")
        wanted = self.slice.accelerator_type
        if there and there != wanted:
            raise Final(
                f"{self.name} is there in {self.zone} as {there}, not {wanted} ({self.slice.name}): use "
                "another name"
            )
        return state

    def create(self, runtime: str, more: list[str]) -> None:
        """Asks for it; Google queues the request.

        Args:
          more: flags of `gcloud compute tpus queued-resources create`, such as --spot.
        """
        count = self.slice.slices
        nodes = (
            [f"--node-id={self.name}"]
            if count == 1
            else [f"--node-count={count}", f"--node-prefix={self.name}"]
        )
        flags = [
            *slice_flags(self.slice),
            f"--runtime-version={runtime or self.slice.chip.runtime}",
        ]
        line = [*nodes, *flags, *more]
        line = self._line(
            "queued-resources", "create", self.name, *line, track=track(self.slice, more)
        )
        jobs.execute(line, self.dry_run)

    def delete(self) -> None:
        """Deletes it with its VMs and their disks."""
        line = self._line("queued-resources", "delete", self.name, "--force")
        jobs.execute(line, self.dry_run)

    def copy(self, files: list[str]) -> None:
        """Copies files to the home directory of all VMs."""
        for node in self.nodes():
            jobs.execute(
                self._line("tpu-vm", "scp", *files, f"{node}:", "--worker=all"), self.dry_run
            )

    def ssh(self, command: str, node: str, worker: str = "all") -> None:
        """Runs a shell command on VMs of a node, with its output on the terminal."""
        line = self._line("tpu-vm", "ssh", node, f"--worker={worker}", f"--command={command}")
        jobs.execute(line, self.dry_run)

    def ask(self, command: str, verbose: bool = False) -> list[tuple[str, str, str]]:
        """Runs a command on all VMs that answers as launch/tpu_vm/worker.py.

        Args:
          verbose: log the command and the answers.

        Returns:
          (host, state, text) of each VM.

        Raises:
          UserError: a VM cannot be reached, or the command failed there.
        """
        answers = []
        for node in self.nodes():
            line = self._line("tpu-vm", "ssh", node, "--worker=all", f"--command={command}")
            if self.dry_run:
                jobs.execute(line, dry_run=True)
                continue
            if verbose:
                _LOG.info(f"+ {shlex.join(line)}")
            done = subprocess.run(line, capture_output=True, text=True)
            rows = [row.split(" ", 3) for row in done.stdout.splitlines()]
            rows = [(*row[1:], "")[:3] for row in rows if row[0] == "bipe_jax" and len(row) > 2]
            for host, state, text in rows:
                if state in ("error", "refused"):
                    raise (Final if state == "refused" else UserError)(f"{host}: {text}")
            if done.returncode or len(rows) < self.slice.hosts:
                last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
                raise UserError(
                    f"{len(rows)} of {self.slice.hosts} hosts of {node} answered: {last}"
                )
            answers += rows
        for answer in answers if verbose else ():
            _LOG.info(" ".join(answer))
        return answers
