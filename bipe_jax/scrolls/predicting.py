"""What a model predicts: greedy outputs, and how probable listed options are as outputs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bipe_jax.data import marked, scrolls
from bipe_jax.data.scrolls import DataSet
from bipe_jax.evaluation import decode, loaded, scoring
from bipe_jax.evaluation.protocols import Window

Row = dict[str, np.ndarray]  # "tokens" (L,), with segmenters also "starts"


@dataclasses.dataclass(frozen=True)
class Example:
    """An input with its outputs.

    Attributes:
      prompt: what the model reads.
      options: outputs, each with its row: the prompt, the output and EOS; () if any output may be.
      references: the outputs of the data; [] if they are not known.
    """

    prompt: Row
    options: tuple[tuple[str, Row], ...]
    references: list[str]


def read(
    loaded_model: loaded.LoadedModel, data: DataSet, names: Sequence[str], most: int
) -> dict[str, Example]:
    """The first inputs of a data set by id, of which there are most; 0: all.

    Args:
      names: of the model's segmenters.

    Raises:
      UserError: the data cannot be read.
    """
    every: dict[str, Example] = {}
    for record in scrolls.records(data):
        if record.id not in every:
            if most and len(every) == most:
                continue
            options = tuple(
                (option, encoded(loaded_model, data, record.input, option, names))
                for option in scrolls.options(data, record.input)
            )
            prompt = encoded(loaded_model, data, record.input, "", names)
            every[record.id] = Example(prompt, options, [])
        if record.output is not None:
            every[record.id].references.append(record.output)
    return every


def encoded(
    loaded_model: loaded.LoadedModel, data: DataSet, text: str, output: str, names: Sequence[str]
) -> Row:
    """The tokens of an input, and of an output with EOS unless that is "", cut as in training."""
    document = scrolls.to_example(data, text, output)
    rows = marked.encode(loaded_model.tokenizer, list(marked.parts_of(document, names)))
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    del joined["learned"]
    return joined


def outputs(loaded_model: loaded.LoadedModel, examples: Sequence[Example], most: int) -> list[str]:
    """The greedy output of each example, of at most so many tokens, without white space at its ends."""
    tokenizer = loaded_model.tokenizer
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt["tokens"]))
    longest = len(examples[order[-1]].prompt["tokens"]) + most
    generator = decode.Generator(loaded_model, longest)
    rows = loaded_model.batch_rows(longest, len(examples))
    written = [""] * len(examples)
    for first in range(0, len(order), rows):
        some = order[first : first + rows]
        prompts = [examples[i].prompt for i in some]
        prompts += [prompts[-1]] * (rows - len(some))  # one shape, compiled once
        tokens = generator(
            [prompt["tokens"] for prompt in prompts],
            most,
            stop=tokenizer.ends,
            starts=[prompt.get("starts") for prompt in prompts],
        )
        for i, own in zip(some, tokens, strict=False):
            written[i] = tokenizer.decode(own).strip()
    return written


def log_probabilities(
    loaded_model: loaded.LoadedModel, examples: Sequence[Example]
) -> list[dict[str, float]]:
    """Option -> the log-probability, in nats, that it is the output and the output ends; for each example."""
    rows: list[Row] = []
    windows: list[Window] = []
    for example in examples:
        for _, row in example.options:
            end = len(row["tokens"]) - 1
            windows.append(Window(len(rows), 0, end, end + 1 - len(example.prompt["tokens"])))
            rows.append(row)
    if not rows:
        return [{} for _ in examples]
    scores = scoring.Scorer(loaded_model)(
        loaded_model.params,
        [row["tokens"] for row in rows],
        windows,
        max(window.end for window in windows),
        [row.get("starts") for row in rows],
    )
    sums = iter([float(log_probs.sum(dtype=np.float64)) for log_probs, _ in scores])
    return [{option: next(sums) for option, _ in example.options} for example in examples]
