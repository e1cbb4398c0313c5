"""Runs an experiment: a sweep of trainings, its tables and figures, and a page with what was predicted.

python -m bipe_jax.experiments bi-nfa-total --size=laptop --output=runs/bi-nfa [--seeds=3] [--on=local]
  [--config.KEY=VALUE ...] [-- FLAGS]
python -m bipe_jax.experiments bi-nfa --samples=3
python -m bipe_jax.experiments list

The same command again resumes what is not finished, and writes the files anew. --config.KEY=VALUE is for all
points. What follows -- are flags of launch.sweep, such as --jobs=2, and of the launcher after a second --.
"""

import itertools
import json
import logging
import sys

from bipe_jax import cli, commands, provenance
from bipe_jax.commands.options import SIZES
from bipe_jax.errors import UserError
from bipe_jax.experiments import files, registry, runner
from bipe_jax.experiments.points import stages
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
    experiment = registry.find(args.name)
    if args.samples is not None:
        if args.samples < 1:
            raise UserError(f"--samples={args.samples} must be at least 1")
        for sample in itertools.islice(experiment.samples(), args.samples):
            print(json.dumps(sample))
        return 0
    if not args.output:
        raise UserError("--output=DIR is needed")
    seeds = experiment.seeds[args.size] if args.seeds is None else args.seeds
    if seeds < 1:
        raise UserError(f"--seeds={seeds} must be at least 1")
    outputs.check_directory(args.output, *files.NAMES)
    points = stages(experiment, args.size, seeds, args.output, overrides)
    more = [*overrides, f"--on={args.on}", *argv[where + 1 :]]
    status = runner.run(experiment, args.size, points, args.output, more)
    outcomes = runner.read(experiment, args.size, points, args.output)
    if any(outcomes.values.values()):
        origin = provenance.shared(provenance.record())
        written = files.write(experiment, args.size, outcomes, args.output, origin)
        print(files.text(outcomes))
        print(f"Wrote {', '.join(written[:4])} and {len(written) - 4} figures in {args.output}")
    else:
        _LOG.info("No point is finished yet: the same command writes the tables later")
    return status


def _listed() -> str:
    rows = [
        (name, size, f"{len(one.arms(size)) * one.seeds[size]}", one.cost(size))
        for name, one in registry.EXPERIMENTS.items()
        for size in SIZES
    ]
    return table(("experiment", "size", "runs", "cost"), rows)


if __name__ == "__main__":
    with cli.user_errors():
        sys.exit(main(sys.argv[1:]))
