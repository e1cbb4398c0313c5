"""Short texts: the harness's tasks on checkpoints, to see what an encoding costs where nothing is long."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bipe_jax.data import quickstart
from bipe_jax.experiments import text
from bipe_jax.experiments.experiment import DATA, Arm, Cell, Evaluation, Prediction, encodings
from bipe_jax.experiments.outcomes import Outcomes, shown

_ACCURACY = "accuracy"
_TASK = "continuation"  # of the sizes that download nothing
_TASKS = "piqa,hellaswag,arc_easy,arc_challenge,winogrande"
_COUNTS = {"quick": 40, "laptop": 2000}  # of questions
_CHOICES, _CONTEXT, _LINE = (
    4,
    200,
    20,
)  # choices; characters of a context at most, of a line at least
_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def questions() -> Iterator[dict[str, Any]]:
    """Questions about held-out text: which line follows a few others, of four of the same document."""
    for document in quickstart.documents("validation"):
        lines = document["text"].splitlines(keepends=True)
        random = np.random.RandomState(len(lines))
        places = [i for i, line in enumerate(lines) if i and len(line.strip()) >= _LINE]
        for at in places[:: max(len(places) // 50, 1)]:
            others = [i for i in places if abs(i - at) > _CHOICES and lines[i] != lines[at]]
            if len(others) < _CHOICES - 1:
                break
            drawn = random.choice(others, _CHOICES - 1, replace=False)
            choices = [lines[i] for i in (at, *drawn)]
            order = random.permutation(_CHOICES)
            yield {
                "context": "".join(lines[max(at - 5, 0) : at])[-_CONTEXT:],
                "choices": [choices[i] for i in order],
                "answer": int(np.flatnonzero(order == 0)[0]),
            }


def prepare(size: str, directory: str) -> None:
    """Writes the questions as a task of the harness; the size "paper" has published tasks."""
    if size not in _COUNTS:
        return
    made = list(questions())
    chosen = made[:: max(len(made) // _COUNTS[size], 1)][: _COUNTS[size]]
    with open(os.path.join(directory, f"{_TASK}.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(question) + "\n" for question in chosen)
    path = os.path.join(os.path.abspath(directory), f"{_TASK}.jsonl")
    task = _YAML.format(task=_TASK, file=json.dumps(path))  # a text of JSON is one of YAML
    with open(os.path.join(directory, f"{_TASK}.yaml"), "w", encoding="utf-8") as file:
        file.write(task)


def _arms(size: str) -> list[Arm]:
    names = {"quick": ("rope", "bipe_rope"), "laptop": ("rope", "bipe_rope", "bipe_alibi", "nope")}
    flags = (f"--tasks={_TASK}", f"--include_path={DATA}")
    if size not in _COUNTS:
        flags = (f"--tasks={_TASKS}",)
    short = Evaluation("short", "bipe_jax.harness", flags)
    few = names.get(size, ("rope", "bipe_rope", "bipe_alibi", "alibi", "nope"))
    return [arm._replace(evaluations=(short,)) for arm in encodings(*few)]


def cells(files: Mapping[str, Any]) -> list[Cell]:
    """The accuracy of each task, and the loss by length."""
    values: list[Cell] = []
    result = files["short/harness.json"]
    for task, of_task in result["results"].items():
        if "acc,none" in of_task:  # groups have none
            count = result["n-samples"][task]["effective"]
            right = round(of_task["acc,none"] * count)
            values.append(Cell(_ACCURACY, task, result["training_length"], right, count))
    return values + text.cells(files)


def _as_good(outcomes: Outcomes) -> tuple[str, bool | None]:
    words, verdicts = [], []
    for key in (key for key in outcomes.keys if key.measure == _ACCURACY):
        rope, bipe = (outcomes.mean(arm, *key) for arm in ("rope", "bipe_rope"))
        words.append(f"{key.condition}: rope {shown(rope)}, bipe_rope {shown(bipe)}")
        verdicts.append(bipe.mean >= rope.mean - 0.01 if rope and bipe else None)
    known = bool(verdicts) and None not in verdicts
    return "; ".join(words) or "–", all(verdicts) if known else None


NORMAL_LENGTH = text.experiment(
    "normal-length",
    "What does BiPE cost where texts are short?",
    "Models that are trained on the same blocks answer the multiple-choice questions of the "
    "lm-evaluation-harness, all of them shorter than a block. At the size paper these are published tasks, "
    "at the others which line of four follows in a held-out text.",
    arms=_arms,
    cells=cells,
    prepare=prepare,
    extras={"lm_eval": "eval"},
    samples=questions,
    predictions=(
        Prediction(
            "BiPE-RoPE's accuracy is at most 1 point below RoPE's on each task.",
            "the paper: no loss on text of normal length",
            _as_good,
        ),
    ),
)
