"""Runs tasks with a checkpoint: accuracy by length and depth."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bipe_jax import processes, segments
from bipe_jax.data import sources
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import decode, loaded, perplexity, room
from bipe_jax.evaluation.evaluator import MULTIPLES
from bipe_jax.plan import Plan
from bipe_jax.report import page, pictures
from bipe_jax.report.results import Tasks, read_file
from bipe_jax.report.text import line, table
from bipe_jax.tasks import haystack, samples
from bipe_jax.tasks.generators import TASKS, Task, task
from bipe_jax.workdir import Workdir, outputs

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The tasks, lengths and depths to run.

    Attributes:
      tasks: names, see `generators.task`.
      lengths: tokens of prompt and answer; (): 1 … 16 times the training length, where all tasks fit.
      depths: shares of the haystack before the fact, 0 … 1.
      samples: prompts for each task, length and depth.
      seed: of all random choices.
      haystack: a source, see `config.spec`; "": the passkey paper's sentences.
      extend: a scaling of the rotary encoding, see `positions.extend`; "": none.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    seed: int = 0
    haystack: str = ""
    extend: str = ""


class Prompt(NamedTuple):
    """A sample with its task, depth and index."""

    task: Task
    depth: float
    index: int
    sample: samples.Sample


def check(settings: Settings) -> list[Task]:
    """The tasks of the settings. Raises UserError if the settings are wrong for any model."""
    tasks = {one.name: one for one in map(task, settings.tasks)}
    if not tasks:
        raise UserError(f"--tasks is empty: use some of {', '.join(TASKS)}")
    if not settings.depths or not all(0 <= depth <= 1 for depth in settings.depths):
        shown = ",".join(f"{depth:g}" for depth in settings.depths)
        raise UserError(f"--depths={shown} must be numbers from 0 to 1, such as 0,0.5,1")
    if settings.samples < 1:
        raise UserError(f"--samples={settings.samples} must be at least 1")
    return list(tasks.values())


def fitting_lengths(
    settings: Settings, tasks: Sequence[Task], config: Plan, tokenizer: Tokenizer
) -> list[int]:
    """The lengths to run at, ascending.

    Raises:
      UserError: a length is too short for a task, or the model has no positions for it.
    """
    needed = {
        one.name: max(
            samples.least(one, tokenizer, depth, settings.seed, index)
            for depth in settings.depths
            for index in range(settings.samples)
        )
        for one in tasks
    }
    name, most = max(needed.items(), key=lambda item: item[1])
    lengths = sorted(set(settings.lengths))
    if not lengths:
        multiples = perplexity.default_lengths(config, MULTIPLES)
        lengths = [length for length in multiples if length >= most] or list(multiples)
    perplexity.check_lengths(config, lengths)
    if lengths[0] < most:
        raise UserError(
            f"--lengths: {lengths[0]:,} tokens are too few for {name}, whose question, facts and answer "
            f"alone need {most:,} with this tokenizer: use longer ones, or other --tasks"
        )
    return lengths


def prompts(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    hay: haystack.Haystack,
    length: int,
    settings: Settings,
    segmenters: Sequence[str] = (),
) -> Iterator[Prompt]:
    """Yields all samples of one length, in a fixed order."""
    for one in tasks:
        for depth in sorted(set(settings.depths)):
            for index in range(settings.samples):
                sample = samples.make(
                    one, tokenizer, hay, length, depth, settings.seed, index, segmenters
                )
                yield Prompt(one, depth, index, sample)


def _batches(samples: Iterable[Prompt], rows: int) -> Iterator[list[Prompt]]:
    """Yields at most `rows` samples at a time that have the same room."""
    buffers: dict[int, list[Prompt]] = {}
    for one in samples:
        batch = buffers.setdefault(one.sample.room, [])
        batch.append(one)
        if len(batch) == rows:
            yield buffers.pop(one.sample.room)
    yield from buffers.values()


def answer(
    loaded_model: loaded.LoadedModel, samples: Iterable[Prompt], length: int, rows: int
) -> Iterator[tuple[Prompt, str]]:
    """Yields the model's greedy answer to each sample, until its document or its room ends."""
    tokenizer = loaded_model.tokenizer
    generator = decode.Generator(loaded_model, length)
    for batch in _batches(samples, rows):
        some = [one.sample for one in batch]
        some += [some[-1]] * (rows - len(some))  # one shape, compiled once
        answers = generator(
            [sample.tokens for sample in some],
            some[0].room,
            stop=tokenizer.ends,
            starts=[sample.starts for sample in some],
        )
        for one, tokens in zip(batch, answers, strict=False):
            yield one, tokenizer.decode(tokens)


def measure(loaded_model: loaded.LoadedModel, settings: Settings) -> dict:
    """The content of tasks.json, without the run's name. Raises UserError as `evaluate`."""
    tasks = check(settings)
    config, tokenizer = loaded_model.config, loaded_model.tokenizer
    names = segments.segmenters_of_text(config)
    lengths = fitting_lengths(settings, tasks, config, tokenizer)
    room.check(loaded_model, lengths[-1])
    hay = haystack.noise()
    if settings.haystack:
        hay = haystack.of_source(settings.haystack, lengths[-1], sources.policy_of(config))
    results, examples = [], []
    for length in lengths:
        count = len(tasks) * len(set(settings.depths)) * settings.samples
        most = max(min(config.evaluation.batch_tokens // length, count), 1)
        rows = 1 << (most.bit_length() - 1)  # the generator rounds up to a power of two
        _LOG.info(f"{length:,} tokens: {count:,} prompts")
        cells: dict[tuple[str, float], list[tuple]] = {}
        of_length = prompts(tasks, tokenizer, hay, length, settings, names)
        for one, text in answer(loaded_model, of_length, length, rows):
            sample = one.sample
            score = one.task.score(sample.answers, text)
            coordinates = segments.coordinates(
                sample.tokens, loaded_model.rule, starts=sample.starts
            )
            count = coordinates["segment"][-1] + 1
            cell = cells.setdefault((one.task.name, one.depth), [])
            cell.append((score, len(sample.tokens), count))
            if (length, one.depth, one.index) == (lengths[0], min(settings.depths), 0):
                examples.append(_example(one, length, text, score))
        results += [_cell(name, depth, length, rows) for (name, depth), rows in cells.items()]
    order = [one.name for one in tasks]
    results.sort(key=lambda row: (order.index(row["task"]), row["length"], row["depth"]))
    examples.sort(key=lambda example: order.index(example["task"]))
    return {
        "kind": "tasks",
        "step": loaded_model.step,
        "training_length": config.sequence_length,
        "position": dataclasses.asdict(config.position),
        "segment_rule": config.segments.rule,
        "data": hay.name,
        "seed": settings.seed,
        "results": results,
        "examples": examples,
    }


def _cell(name: str, depth: float, length: int, rows: Sequence[tuple]) -> dict:
    """The result of one cell, from (score, tokens, segments) of each sample."""
    scores, tokens, counts = np.array(rows, float).T
    return {
        "task": name,
        "length": length,
        "depth": depth,
        "accuracy": float(scores.mean()),
        # If every score is 0 or 1, this is the binomial sqrt(p (1 - p) / n).
        "error": float(scores.std() / math.sqrt(len(scores))),
        "samples": len(scores),
        "prompt_tokens": float(tokens.mean()),
        "segments": float(counts.mean()),
    }


def _example(one: Prompt, length: int, text: str, score: float) -> dict:
    return {
        "task": one.task.name,
        "length": length,
        "depth": one.depth,
        "prompt": one.sample.prompt,
        "answers": list(one.sample.answers),
        "said": text,
        "score": score,
    }


def evaluate(
    path: str,
    settings: Settings = Settings(),
    output: str = "",
    show: Callable[[dict], object] = lambda result: None,
) -> dict:
    """Runs the tasks, and writes tasks.json, tasks.png and report.html.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      output: directory for the files; "" takes `path`.
      show: called with the result before it is written, by the first process.

    Returns:
      The content of tasks.json.

    Raises:
      UserError: a wrong input; see docs/how-to/tasks.md.
    """
    check(settings)
    loaded_model = loaded.load(path, settings.extend)
    output = output or path
    directory = Workdir(output)
    outputs.check_directory(output, Workdir.tasks, Workdir.tasks_picture, Workdir.report)
    result = {"name": os.path.basename(os.path.abspath(output)), **measure(loaded_model, settings)}
    if processes.is_first():
        show(result)
        outputs.write_json(directory.tasks, result)
        with pictures.by_product(directory.tasks_picture):
            pictures.accuracy(result["name"], read_file(output, Tasks), directory.tasks_picture)
        with pictures.by_product(directory.report):
            page.write([output], directory.report)
    return result


def tables(result: dict) -> str:
    """Percent of right answers, as text: a line for each task and length, a column for each depth."""
    rows = result["results"]
    depths = sorted({row["depth"] for row in rows})
    title = (
        f"percent right; haystack {line(result['data'])}; {rows[0]['samples']:,} samples a cell; "
        f"rule {result['segment_rule']}; trained at {result['training_length']:,} tokens"
    )
    head = ("task", "length", *(f"{depth:.0%}" for depth in depths), "all", "±", "segments")
    lines = []
    for key in dict.fromkeys((row["task"], row["length"]) for row in rows):
        cells = {row["depth"]: row for row in rows if (row["task"], row["length"]) == key}
        error = math.sqrt(sum(cell["error"] ** 2 for cell in cells.values())) / len(cells)
        lines.append((
            key[0],
            f"{key[1]:,}",
            *(f"{100 * cells[depth]['accuracy']:.0f}" for depth in depths),
            f"{100 * np.mean([cell['accuracy'] for cell in cells.values()]):.1f}",
            f"{100 * error:.1f}",
            f"{np.mean([cell['segments'] for cell in cells.values()]):.0f}",
        ))  # fmt: skip
    return f"{title}\n\n{table(head, lines)}"
