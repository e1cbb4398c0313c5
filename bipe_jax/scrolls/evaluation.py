"""Evaluates a checkpoint on data sets of SCROLLS."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from bipe_jax import processes, segments
from bipe_jax.data import scrolls
from bipe_jax.data.scrolls import DataSet
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, room
from bipe_jax.report.text import table
from bipe_jax.scrolls import metrics, predicting
from bipe_jax.scrolls.predicting import Example
from bipe_jax.suggest import did_you_mean
from bipe_jax.workdir import Workdir, outputs

_LOG = logging.getLogger(__name__)

KIND = "scrolls"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is evaluated on.

    Attributes:
      data: a directory with data sets, see `data.scrolls`. tasks: names of some; (): all that are there.
      split: "validation", or "test", whose outputs may be unknown.
      tokens: of a row, see `data.scrolls.DataSet`; 0: the sequence length of the training.
      most: inputs of a data set, its first ones; 0: all.
    """

    data: str
    tasks: tuple[str, ...] = ()
    split: str = "validation"
    tokens: int = 0
    most: int = 0


def data_sets(settings: Settings, tokens: int) -> list[DataSet]:
    """The data sets of the settings, in rows of so many tokens. Raises UserError: one is not there."""
    if tokens < scrolls.LEAST:
        raise UserError(f"--tokens={tokens} must be at least {scrolls.LEAST}")
    for name in settings.tasks:
        if name not in scrolls.TASKS:
            raise UserError(
                f"--tasks: {name!r} is unknown{did_you_mean(name, scrolls.TASKS)}: use some of "
                f"{', '.join(scrolls.TASKS)}"
            )
    directory = settings.data.rstrip("/")
    every = [
        DataSet(f"{directory}/{name}", name, settings.split, tokens)
        for name in settings.tasks or scrolls.TASKS
    ]
    found = [one for one in every if epath.Path(one.file).exists()]
    if settings.tasks and len(found) < len(every):
        missing = next(one for one in every if one not in found)
        raise UserError(f"--data: there is neither {missing.file} nor {missing.path}.zip")
    if not found:
        raise UserError(
            f"--data={settings.data} has no data set of SCROLLS: it must hold TASK/{settings.split}.jsonl or "
            f"TASK.zip, TASK being one of {', '.join(scrolls.TASKS)}"
        )
    return found


def result_of(
    data: DataSet, examples: Sequence[Example], written: Sequence[str], chosen: Sequence[str]
) -> dict[str, Any]:
    """The scores of a data set, in percent.

    Args:
      written: the predicted output of each example. chosen: its most probable option, "" without options.

    Returns:
      "score", see `metrics.summary`, with what it is made of; "choice": the share of examples whose most
      probable option is a reference; "option": that of outputs that are an option, right or not. All are None
      if the references are not known, "choice" and "option" also without options.
    """
    result: dict[str, Any] = {
        "task": data.name,
        "metric": data.task.metric,
        "inputs": len(examples),
    }
    known = [
        (example, own, choice)
        for example, own, choice in zip(examples, written, chosen, strict=True)
        if example.references
    ]
    result |= {"score": None, "choice": None, "option": None}
    if not known:
        return result
    result |= metrics.summary(
        [metrics.scores(data.task.metric, own, example.references) for example, own, _ in known]
    )
    if all(choice for _, _, choice in known):
        right = [_is_one_of(choice, example.references) for example, _, choice in known]
        listed = [
            _is_one_of(own, [option for option, _ in example.options]) for example, own, _ in known
        ]
        result |= {
            "choice": 100 * sum(right) / len(known),
            "option": 100 * sum(listed) / len(known),
        }
    return result


def _is_one_of(text: str, others: Sequence[str]) -> bool:
    return any(metrics.exact_match(text, other) for other in others)


def measure(
    loaded_model: loaded.LoadedModel, settings: Settings, directory: str = ""
) -> dict[str, Any]:
    """The content of scrolls.json, without the run's name.

    Args:
      directory: where predictions-TASK.jsonl is written for each data set; "": nowhere.

    Raises:
      UserError: as `evaluate`.
    """
    config = loaded_model.config
    names = segments.segmenters_of_text(config)
    tokens = settings.tokens or config.sequence_length
    every = data_sets(settings, tokens)
    for data in every:
        metrics.check(data.task.metric)
    config.encodings.check_length(tokens)
    room.check(loaded_model, tokens)
    results = []
    for data in every:
        by_id = predicting.read(loaded_model, data, names, settings.most)
        if not by_id:
            raise UserError(f"{data.file} has no line: leave {data.name} out of --tasks")
        _LOG.info(f"{data.name}: {len(by_id):,} inputs")
        examples = list(by_id.values())
        written = predicting.outputs(loaded_model, examples, data.limits.output)
        of_options = predicting.log_probabilities(loaded_model, examples)
        chosen = [max(of, key=of.__getitem__) if of else "" for of in of_options]
        results.append(result_of(data, examples, written, chosen))
        if directory and processes.is_first():
            lines = [
                {"id": number, "prediction": own, "references": example.references}
                | ({"options": of} if of else {})
                for (number, example), own, of in zip(
                    by_id.items(), written, of_options, strict=True
                )
            ]
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            path = os.path.join(directory, f"predictions-{data.name}.jsonl")
            outputs.write_bytes(path, content.encode())
    scores = [result["score"] for result in results if result["score"] is not None]
    return {
        "kind": KIND,
        "step": loaded_model.step,
        "training_length": config.sequence_length,
        "position": dataclasses.asdict(config.position),
        "segment_rule": config.segments.rule,
        "seed": config.seed,
        "data": settings.data,
        "split": settings.split,
        "tokens": tokens,
        "results": results,
        "mean": sum(scores) / len(scores) if scores else None,
    }


def evaluate(
    path: str,
    settings: Settings,
    output: str = "",
    show: Callable[[dict], object] = lambda result: None,
) -> dict[str, Any]:
    """Evaluates a checkpoint, and writes scrolls.json and predictions-TASK.jsonl.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      output: directory for the files; "" takes `path`. show: called with the result before it is written.

    Returns:
      The content of scrolls.json; see docs/how-to/scrolls.md.

    Raises:
      UserError: a wrong input, or rouge-score is needed and not installed.
    """
    loaded_model = loaded.load(path)
    output = output or path
    outputs.check_directory(output, Workdir.scrolls)
    result = {
        "name": os.path.basename(os.path.abspath(output)),
        **measure(loaded_model, settings, output),
    }
    if processes.is_first():
        show(result)
        outputs.write_json(Workdir(output).scrolls, result)
    return result


def tables(result: dict[str, Any]) -> str:
    """The scores as text: a line for each data set, the mean last."""
    title = (
        f"{result['split']} of {result['data']}; rows of {result['tokens']:,} tokens; trained at "
        f"{result['training_length']:,}"
    )
    lines = [
        (
            row["task"], row["metric"], f"{row['inputs']:,}",
            *(_shown(row[name]) for name in ("score", "choice", "option")),
        )
        for row in result["results"]
    ]  # fmt: skip
    lines.append(("mean", "", "", _shown(result["mean"]), "", ""))
    head = ("data set", "metric", "inputs", "score", "likeliest option", "outputs that are one")
    return f"{title}\n\n{table(head, lines)}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
