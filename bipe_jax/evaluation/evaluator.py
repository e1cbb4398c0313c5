"""Evaluation of checkpoints at several lengths: evaluate("runs/quickstart", lengths=(256, 1024))."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from bipe_jax import processes
from bipe_jax.config import spec
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import documents, loaded, perplexity
from bipe_jax.evaluation.protocols import SAME_TOKENS, protocol
from bipe_jax.evaluation.targets import Targets, digest
from bipe_jax.plan import Plan
from bipe_jax.report import comparing, page, pictures
from bipe_jax.report.results import Evaluation, read_file
from bipe_jax.workdir import Workdir, outputs

_LOG = logging.getLogger(__name__)

MULTIPLES = (1, 2, 4, 8, 16)
BOS_RULE = "BOS where a document begins, nowhere else"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The data and lengths of an evaluation; an empty value, or 0, takes the config's.

    Attributes:
      lengths: in tokens; by default 1 … 16 times the training length, as far as the model can be run.
      data: a source, see `config.spec`.
      sets: names of the data sets.
      context: the largest length that may score the targets; by default the longest of the config's
        lengths. What is to be compared needs the same.
      tokens: targets of each set, about; 0: all that can be scored. None takes the config's.
      protocol: see `protocols`.
      extend: a scaling of the rotary encoding, see `positions.extend`; "" for none.
      draws: draws coordinates as in training (`position.draws`) instead of the true ones.
    """

    lengths: tuple[int, ...] = ()
    data: str = ""
    sets: tuple[str, ...] = ()
    context: int = 0
    tokens: int | None = None
    protocol: str = SAME_TOKENS
    extend: str = ""
    draws: bool = False


def default_context(config: Plan) -> int:
    """The context of a config: the longest of its lengths unless it says so, see `protocols`."""
    multiples = [config.sequence_length * multiple for multiple in MULTIPLES]
    return config.evaluation.context or max(config.evaluation.lengths or multiples)


def resolve(settings: Settings, config: Plan) -> Settings:
    """The settings, with the config's values in place of empty ones.

    Raises:
      UserError: the model cannot be run at a length, or the protocol, the scaling or the data is malformed.
    """
    evaluation = config.evaluation
    lengths = settings.lengths or tuple(evaluation.lengths)
    settings = dataclasses.replace(
        settings,
        lengths=lengths or perplexity.default_lengths(config, MULTIPLES),
        data=settings.data or config.data.evaluation,
        sets=settings.sets or tuple(config.data.sets),
        context=settings.context or default_context(config),
        tokens=evaluation.tokens if settings.tokens is None else settings.tokens,
    )
    perplexity.check_lengths(config, settings.lengths)
    protocol(settings.protocol, settings.lengths, settings.context)
    if settings.extend:  # checked here; the mean number of segments is measured later
        loaded.extended(config, settings.extend, {"segment": 1.0})
    if spec.parse_evaluation(settings.data, "--data")[0].kind in spec.OF_EXAMPLES:
        raise UserError(
            f"{settings.data!r} are examples, and perplexity at several lengths, such as by --follow and "
            "config.evaluation.every, is of text: leave those out"
        )
    if settings.draws and not config.encodings.draws:
        raise UserError("--draws: the model has no config.position.draws: leave it out")
    return settings


def _reader(config: Plan, tokenizer: Tokenizer, settings: Settings) -> documents.Reader:
    source = spec.parse_evaluation(settings.data, "--data")[0]
    return documents.reader(config, tokenizer, source, settings.sets)


def check_documents(config: Plan, tokenizer: Tokenizer, settings: Settings) -> None:
    """Checks that there is a document to evaluate on, as cheaply as possible.

    Args:
      settings: resolved.

    Raises:
      UserError: the source cannot be read, or no document is long enough.
    """
    documents.check(_reader(config, tokenizer, settings), settings.context)


def read_targets(config: Plan, tokenizer: Tokenizer, settings: Settings) -> list[Targets]:
    """The targets of an evaluation, see `documents.read`; sets that are missing are logged.

    Args:
      settings: resolved, with `tokens`.

    Raises:
      UserError: the source cannot be read, or no document is long enough.
    """
    targets = documents.read(
        _reader(config, tokenizer, settings),
        protocol(settings.protocol, settings.lengths, settings.context),
        settings.context,
        settings.tokens or 0,
    )
    if missing := [s for s in settings.sets if s not in {of_set.set for of_set in targets}]:
        names = " or ".join(map(repr, missing))
        _LOG.info(f"{settings.data} has no document of the set {names} to score")
    return targets


class Evaluator:
    """Evaluates checkpoints of one run; reads the data and compiles once.

    Args:
      loaded_model: any checkpoint of the run. settings: see `Settings`.

    Raises:
      UserError: a wrong input; see docs/explanation/evaluation.md.
    """

    def __init__(self, loaded_model: loaded.LoadedModel, settings: Settings):
        config, tokenizer = loaded_model.config, loaded_model.tokenizer
        self.settings = settings = resolve(settings, config)
        targets = read_targets(config, tokenizer, settings)
        if settings.extend:
            config = _extended(config, settings, targets)
            loaded_model = dataclasses.replace(loaded_model, config=config)
        self._evaluation = perplexity.Evaluation(
            loaded_model,
            targets,
            settings.lengths,
            protocol(settings.protocol, settings.lengths, settings.context),
            _LOG.info,
            settings.draws,
        )
        self._head = {
            "kind": "perplexity",
            "training_length": config.sequence_length,
            "position": dataclasses.asdict(config.position),
            "segment_rule": config.segments.rule,
            "data": settings.data,
            "protocol": settings.protocol,
            "context": settings.context,
            "tokenizer": digest(tokenizer.model),
            "draws": settings.draws,
            "bos_rule": BOS_RULE,
        }

    def __call__(self, params: dict, name: str, step: int | None) -> dict:
        """The content of evaluation.json, for parameters sharded as those of the loaded model."""
        return {"name": name, "step": step, **self._head, **self._evaluation(params)}


def _extended(config: Plan, settings: Settings, targets: Sequence[Targets]) -> Plan:
    """The config with its rotary encoding scaled by the mean number of segments in training blocks."""
    scored = [document for of_set in targets for document in of_set.documents]
    tokens, starts = [d.tokens for d in scored], [d.starts for d in scored]
    blocks = perplexity.training_range(tokens, config.sequence_length, config.segment_rule, starts)
    return loaded.extended(config, settings.extend, {"segment": blocks["segments"]})


def check_output(output: str, flag: str = "--output") -> None:
    """Makes a directory. Raises UserError unless the files of `write` can be written there."""
    outputs.check_directory(
        output, Workdir.evaluation, Workdir.extrapolation, Workdir.report, flag=flag
    )


def write(result: dict, output: str) -> None:
    """Writes evaluation.json, extrapolation.png and report.html into a directory. Raises UserError."""
    directory = Workdir(output)
    outputs.write_json(directory.evaluation, result)
    with pictures.by_product(directory.extrapolation):
        evaluation = read_file(output, Evaluation)
        groups = comparing.alone([(result["name"], evaluation)])
        pictures.perplexity(groups, directory.extrapolation)
    with pictures.by_product(directory.report):
        page.write([output], directory.report)


def evaluate(
    path: str,
    settings: Settings = Settings(),
    output: str = "",
    show: Callable[[dict], object] = lambda result: None,
    **changes: Any,
) -> dict:
    """Scores a checkpoint at each length, and writes the files of `write`.

    All processes of a program call it; the first one writes.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      output: directory for the files; "" takes `path`.
      show: called with the result before it is written, by the first process.
      **changes: fields of `settings` by name, such as lengths=(256, 512).

    Returns:
      The content of evaluation.json; docs/explanation/evaluation.md describes it.

    Raises:
      UserError: a wrong input; see docs/explanation/evaluation.md.
    """
    settings = dataclasses.replace(settings, **changes)
    loaded_model = loaded.load(path)
    resolve(settings, loaded_model.config)
    output = output or path
    check_output(output)
    name = os.path.basename(os.path.abspath(output))
    result = Evaluator(loaded_model, settings)(loaded_model.params, name, loaded_model.step)
    if processes.is_first():
        show(result)
        write(result, output)
    return result
