"""Runs tasks of EleutherAI's lm-evaluation-harness on a checkpoint.

python -m bipe_jax.harness --checkpoint=runs/x --tasks=piqa,hellaswag [--num_fewshot=5]

Prints the harness's table and writes harness.json. Needs the extra `eval`; most tasks download their data.
"""

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from bipe_jax import cli, commands, flags, processes
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded
from bipe_jax.evaluation.perplexity import default_lengths
from bipe_jax.workdir import Workdir, outputs

_LOG = logging.getLogger("bipe_jax.harness")

MULTIPLES = (1, 4)  # of the training length; --max_length is the last that the model can be run at
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples")  # keys of the harness's results


def run(
    path: str,
    tasks: list[str],
    *,
    max_length: int = 0,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    extend: str = "",
    output: str = "",
    show: Callable[[dict], object] = lambda results: None,
) -> dict:
    """Runs tasks and writes OUTPUT/harness.json.

    Args:
      path: a checkpoint, see `checkpoint.load`.
      tasks: names, or patterns of names. include_path: a directory of further tasks.
      max_length: tokens; 0 takes 4 times the training length, or once if the model has no more positions.
      num_fewshot, limit: see the harness. extend: see `positions.extend`. output: "" takes `path`.
      show: called with the results before they are written, by the first process.

    Returns:
      The results of `lm_eval.simple_evaluate`.

    Raises:
      UserError: the harness is not installed, a task is unknown, its data is not available, or the
        checkpoint is wrong.
    """
    try:
        import lm_eval

        from bipe_jax.evaluation.harness_model import Harness
    except ImportError as error:
        raise UserError(
            f"tasks of the lm-evaluation-harness need it: pip install -e '.[eval]' ({error})"
        ) from None
    if limit is not None and limit <= 0:
        raise UserError(f"--limit={limit:g} must be above 0")
    if (num_fewshot or 0) < 0:
        raise UserError(f"--num_fewshot={num_fewshot} must be at least 0")
    manager, names = find_tasks(tasks, include_path)
    loaded_model = loaded.load(path, extend)
    model = Harness(
        loaded_model, max_length or max(default_lengths(loaded_model.config, MULTIPLES))
    )
    output = output or path
    outputs.check_directory(output, Workdir.harness)
    dictionary = load_tasks(manager, names)
    _LOG.info(
        f"Texts are cut at {model.max_length:,} tokens (--max_length); the model was trained at "
        f"{loaded_model.config.sequence_length:,}"
    )
    results = lm_eval.simple_evaluate(
        model,
        tasks=dictionary,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    config = loaded_model.config
    written = {
        "kind": "harness",
        "name": os.path.basename(os.path.abspath(output)),
        "step": loaded_model.step,
        "training_length": config.sequence_length,
        "position": dataclasses.asdict(config.position),
        "segment_rule": config.segments.rule,
        "model": dataclasses.asdict(config.model),
        "max_length": model.max_length,
        "limit": limit,
        "lm_eval": lm_eval.__version__,
        **{name: plain(results[name]) for name in _KEPT if name in results},
    }
    if processes.is_first():
        show(results)
        outputs.write_json(Workdir(output).harness, written)
    return results


def _print(results: dict) -> None:
    from lm_eval.utils import make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def find_tasks(patterns: list[str], include_path: str | None) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names of matching tasks, groups and tags.

    Raises:
      UserError: a pattern matches nothing, or the directory does not exist.
    """
    from lm_eval import __version__
    from lm_eval.tasks import TaskManager

    if include_path and not os.path.isdir(include_path):
        raise UserError(f"--include_path={include_path}: no such directory")
    if not patterns:
        raise UserError("--tasks is empty: name at least one task")
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in patterns if not manager.match_tasks([name])]:
        raise UserError(
            f"--tasks: {', '.join(unknown)} is unknown to lm_eval {__version__}: `lm_eval ls tasks` "
            "lists all; --include_path=DIR adds your own"
        )
    return manager, manager.match_tasks(patterns)


def load_tasks(manager: Any, names: list[str]) -> list:
    """Tasks and groups with their data.

    Raises:
      UserError: a task's data or a package that it needs is not available, or its kind is not supported.
    """
    tasks = []
    for name in names:
        try:
            parts = manager.load([name])
            group = parts["groups"].get(name)
            tasks += [group] if group is not None else parts["tasks"].values()
            manager.load(tasks)  # refuses duplicates
        except Exception as error:  # tasks are others' code
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--tasks: {name} cannot be loaded: {type(error).__name__}: {reason}"
            ) from None
        for task in parts["tasks"].values():
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"--tasks: {name} is not only of text")
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"--tasks: {name} runs code that the model writes, which is not supported"
                )
    return tasks


def plain(value: Any) -> Any:
    """A value for JSON: None if it is not finite, text if its type is unknown to JSON."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def main():
    args = commands.parser("harness").parse_args()
    cli.set_up()
    run(
        args.checkpoint,
        list(flags.names(args.tasks, ",")),
        max_length=args.max_length,
        extend=args.extend,
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        output=args.output,
        show=_print,
    )
    if processes.is_first():
        print(f"Wrote {args.output or args.checkpoint}/harness.json")
        sys.stdout.flush()


if __name__ == "__main__":
    with cli.user_errors():
        main()
