"""The evaluation of a checkpoint by what it is evaluated on: text has perplexities, examples have answers.

The commands use it: results are printed, and written into a directory.
"""

import dataclasses
from typing import Protocol

from bipe_jax import checkpoint, processes
from bipe_jax.config import spec
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.evaluation import answer_tables, answers, evaluator, tables
from bipe_jax.evaluation.evaluator import Settings
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, outputs


class Ending(Protocol):
    """An evaluation at the end of a training. All of it raises UserError."""

    def check_output(self, workdir: str) -> None:
        """Checks that its results can be written."""
        ...

    def check(self, config: Plan, tokenizer: Tokenizer) -> None:
        """Checks before the training that it can be done."""
        ...

    def evaluate(self, path: str, output: str = "") -> None:
        """Evaluates a checkpoint, prints the result, and writes it into a directory ("": `path`)."""
        ...


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of text at several lengths. Attributes: settings: see `evaluator.resolve`."""

    settings: Settings

    def check_output(self, workdir: str) -> None:
        evaluator.check_output(workdir, "--workdir")

    def check(self, config: Plan, tokenizer: Tokenizer) -> None:
        evaluator.check_documents(config, tokenizer, self.settings)

    def evaluate(self, path: str, output: str = "") -> None:
        evaluator.evaluate(path, self.settings, output, lambda result: print(tables.tables(result)))
        if processes.is_first():
            print(tables.written(output or path))


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to examples. Attributes: data: their sources; "": the config's."""

    data: str = ""

    def check_output(self, workdir: str) -> None:
        outputs.check_directory(workdir, Workdir.answers, flag="--workdir")

    def check(self, config: Plan, tokenizer: Tokenizer) -> None:
        answers.check_examples(config, tokenizer, self.data)

    def evaluate(self, path: str, output: str = "") -> None:
        answers.evaluate(
            path, self.data, output, lambda result: print(answer_tables.tables(result))
        )
        if processes.is_first():
            print(f"Wrote {Workdir(output or path).answers}")


def of(config: Plan) -> Ending:
    """The evaluation at the end of a config's training. Raises UserError, see `evaluator.resolve`."""
    if spec.is_of_examples(config.data.evaluation):
        answers.check(config)
        return Answers()
    return Perplexity(evaluator.resolve(Settings(), config))


def is_of_examples(path: str, data: str) -> bool:
    """Whether a checkpoint is evaluated on examples, by a source or, if that is "", by its config."""
    return spec.is_of_examples(data or checkpoint.describe(path, None)[0].config.data.evaluation)
