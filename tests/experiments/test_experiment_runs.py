"""Experiments at the size quick: all points are trained, and a kill changes no table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

from bipe_jax.experiments import registry

# One of each kind; those of test_modalities.py and test_normal_length.py need other packages.
NAMES = (
    "arithmetic", "bi-nfa-scratchpad", "retrieval-back", "extension", "passkey", "modalities-control"
)  # fmt: skip


def run(name: str, output: Path) -> list[dict]:
    """The rows of an experiment's results."""
    line = [sys.executable, "-m", "bipe_jax.experiments", name, f"--output={output}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "results.json").read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_points_of_an_experiment_are_trained(name, tmp_path):
    rows = run(name, tmp_path)
    arms = {arm.name for arm in registry.find(name).arms("quick")}
    assert {row["arm"] for row in rows} == arms
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_an_experiment_continues_after_a_kill_to_the_same_tables(tmp_path):
    name = "fold"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rows = run(name, whole)
    line = [sys.executable, "-m", "bipe_jax.experiments", name, f"--output={killed}"]
    process = subprocess.Popen(
        line, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(killed.glob("points/*/checkpoints/15/params")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in trainers_of(killed):
        os.kill(pid, signal.SIGKILL)
    assert run(name, killed) == rows
    assert (whole / "table.csv").read_text() == (killed / "table.csv").read_text()


def trainers_of(directory: Path) -> list[int]:
    """The processes whose command line names a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{directory}/points".encode() in words:
                found.append(int(entry.name))
    return found
