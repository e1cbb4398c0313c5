"""Runs an experiment: a sweep of trainings, its tables and figures, and a page with what was predicted.

python -m bipe_jax.experiments bi-nfa-total --size=laptop --output=runs/bi-nfa [--seeds=3] [--on=local]
  [--config.KEY=VALUE ...] [-- FLAGS]
python -m bipe_jax.experiments bi-nfa --samples=3
python -m bipe_jax.experiments table --size=laptop --output=results/table [--tables_only]
python -m bipe_jax.experiments list

The same command again resumes what is not finished, and writes the files anew; with --tables_only it only
writes them. The table is several experiments with the same arms. --config.KEY=VALUE is for all
points. What follows -- are flags of launch.sweep, such as --jobs=2, and of the launcher after a second --.
"""

import itertools
import json
import logging
import os
import sys
from typing import NamedTuple

from bipe_jax import cli, commands, provenance
from bipe_jax.commands.options import SIZES
from bipe_jax.errors import DONE, PREEMPTED, UserError
from bipe_jax.experiments import files, registry, runner, table_files
from bipe_jax.experiments.experiment import Experiment
from bipe_jax.experiments.outcomes import Outcomes
from bipe_jax.experiments.points import stages
from bipe_jax.experiments.table import Table
from bipe_jax.report.text import table
from bipe_jax.workdir import outputs

_LOG = logging.getLogger("bipe_jax.experiments")


def main(argv: list[str]) -> int:
    where = argv.index("--") if "--" in argv else len(argv)
    overrides = [word for word in argv[:where] if word.startswith("--config.")]
    args = commands.parser("experiments").parse_args(
        [word for word in argv[:where] if word not in overrides]
    )
    if args.name == "list":
        print(_listed())
        return 0
    chosen = registry.find(args.name)
    if args.samples is not None:
        if args.samples < 1:
            raise UserError(f"--samples={args.samples} must be at least 1")
        for sample in itertools.islice(chosen.samples(), args.samples):
            print(json.dumps(sample))
        return 0
    if not args.output:
        raise UserError("--output=DIR is needed")
    if args.seeds is not None and args.seeds < 1:
        raise UserError(f"--seeds={args.seeds} must be at least 1")
    more = [*overrides, f"--on={args.on}", *argv[where + 1 :]]
    command = _Command(args.size, args.seeds, args.output, overrides, more, args.tables_only)
    return _table(chosen, command) if isinstance(chosen, Table) else _alone(chosen, command)


class _Command(NamedTuple):
    """What the command line says."""

    size: str
    seeds: int | None
    output: str
    overrides: list[str]
    more: list[str]
    tables_only: bool


def _alone(experiment: Experiment, command: _Command) -> int:
    status, outcomes = _run(experiment, command, command.output, command.seeds)
    if _write(experiment, command, outcomes, command.output):
        print(files.text(outcomes))
    return status


def _table(table: Table, command: _Command) -> int:
    """Runs the tests of a table seed by seed, so that all of its columns fill."""
    outputs.check_directory(command.output, *table_files.NAMES)
    counts = {
        test.name: command.seeds or test.experiment.seeds[command.size] for test in table.tests
    }
    if not command.tables_only:
        for test in table.tests:
            runner.check_installed(test.experiment)
    results: dict[str, Outcomes] = {}
    status = DONE
    for seeds in range(1, max(counts.values()) + 1):
        for test in table.tests:
            output = os.path.join(command.output, test.name)
            wanted = counts[test.name] if command.tables_only else min(seeds, counts[test.name])
            of_test, results[test.name] = _run(test.experiment, command, output, wanted)
            status = max(status, of_test)
            if of_test == PREEMPTED:
                return status
        if command.tables_only:
            break
    for test in table.tests:
        _write(
            test.experiment, command, results[test.name], os.path.join(command.output, test.name)
        )
    if any(of.values.get(arm) for of in results.values() for arm in of.arms):
        origin = provenance.shared(provenance.record())
        written = table_files.write(table, command.size, results, command.output, origin)
        print(table_files.text(table, results))
        print(f"Wrote {', '.join(written)} in {command.output}")
    return status


def _run(
    experiment: Experiment, command: _Command, output: str, seeds: int | None
) -> tuple[int, Outcomes]:
    """Trains what is not finished. Returns a status, see `runner.run`, and the values of finished points."""
    outputs.check_directory(output, *files.NAMES)
    count = seeds or experiment.seeds[command.size]
    points = stages(experiment, command.size, count, output, command.overrides)
    status = DONE
    if not command.tables_only:
        status = runner.run(experiment, command.size, points, output, command.more)
    return status, runner.read(experiment, command.size, points, output)


def _write(experiment: Experiment, command: _Command, outcomes: Outcomes, output: str) -> bool:
    """Writes the files of an experiment, if a point is finished."""
    if not any(outcomes.values.values()):
        _LOG.info(
            f"{experiment.name}: no point is finished yet: the same command writes its tables later"
        )
        return False
    origin = provenance.shared(provenance.record())
    written = files.write(experiment, command.size, outcomes, output, origin)
    _LOG.info(f"Wrote {', '.join(written[:4])} and {len(written) - 4} figures in {output}")
    return True


def _listed() -> str:
    rows = [
        (name, size, f"{one.runs(size)}", one.cost(size))
        for name, one in registry.ALL.items()
        for size in SIZES
    ]
    return table(("experiment", "size", "runs", "cost"), rows)


if __name__ == "__main__":
    with cli.user_errors():
        sys.exit(main(sys.argv[1:]))
