"""The committed results: tables are those of the values of the points, which this version can read."""

import contextlib
import csv
import json
import shutil

import pytest
from paths import ROOT

from bipe_jax.errors import UserError
from bipe_jax.experiments import files, registry, runner, table_files
from bipe_jax.experiments.points import stages
from bipe_jax.experiments.table import Table

DIRECTORIES = sorted(path.parent for path in (ROOT / "results").glob("*/results.json"))


def seeds_of(directory):
    """The seeds of the points whose values are there."""
    kept = [json.loads(path.read_text()) for path in directory.glob("results/*.json")]
    return 1 + max((point["seed"] for point in kept), default=-1)


def outcomes(experiment, size, directory):
    points = stages(experiment, size, max(seeds_of(directory), 1), str(directory))
    return runner.read(experiment, size, points, str(directory))


def rows(path):
    """The lines of a table, and all its numbers."""
    lines = list(csv.reader(path.open(newline="")))
    numbers = [float(cell) for line in lines for cell in line if is_number(cell)]
    return [[is_number(cell) or cell for cell in line] for line in lines], numbers


def is_number(text):
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_committed_tables_are_those_of_the_committed_values(directory, tmp_path):
    result = json.loads((directory / "results.json").read_text())
    name, size = result.get("experiment") or result["table"], result["size"]
    experiment = registry.find(name)
    if isinstance(experiment, Table):
        made = {
            test.name: outcomes(test.experiment, size, directory / test.name)
            for test in experiment.tests
        }
        table_files.write(experiment, size, made, str(tmp_path), {})
        assert (tmp_path / "table.md").read_text() == (directory / "table.md").read_text()
    else:
        files.write(experiment, size, outcomes(experiment, size, directory), str(tmp_path), {})
    made, numbers = rows(tmp_path / "table.csv")
    committed, of_committed = rows(directory / "table.csv")
    assert made == committed
    assert numbers == pytest.approx(of_committed, rel=1e-6, abs=1e-9)


def test_values_of_another_config_are_refused(tmp_path):
    (directory,) = (path for path in DIRECTORIES if path.name == "bi-nfa-total")
    shutil.copytree(directory / "results", tmp_path / "results")
    with pytest.raises(UserError, match="is of another config or size of the experiment"):
        outcomes(registry.find("bi-nfa-total"), "quick", tmp_path)
