"""Evaluation of checkpoints at several lengths: evaluate("runs/quickstart", lengths=(256, 1024))."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator

import numpy as np

from bipe_jax import processes
from bipe_jax.config import Config, spec
from bipe_jax.data import prepared, sources
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.evaluation import loaded, perplexity
from bipe_jax.evaluation.protocols import SAME_TOKENS, protocol
from bipe_jax.plan import Plan
from bipe_jax.report import page, pictures
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
      windows: number of windows of the shortest length, for each data set.
      protocol: see `protocols`.
      extend: a scaling of the rotary encoding, see `positions.extend`; "" for none.
    """

    lengths: tuple[int, ...] = ()
    data: str = ""
    sets: tuple[str, ...] = ()
    windows: int = 0
    protocol: str = SAME_TOKENS
    extend: str = ""


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
        windows=settings.windows or evaluation.windows,
    )
    perplexity.check_lengths(config, settings.lengths)
    protocol(settings.protocol, settings.lengths)
    if settings.extend:  # checked here; the mean number of segments is measured later
        loaded.extended(config, settings.extend, {"segment": 1.0})
    spec.parse_evaluation(settings.data, "--data")
    return settings


def documents(config: Config, tokenizer: Tokenizer, settings: Settings) -> Iterator[dict]:
    """Yields the documents to evaluate on: {"set": str, "tokens": (T,) int32, "bytes": (T,)} each.

    "bytes" are those of the text that each token stands for.

    Args:
      config: its `data.on_error` applies. settings: resolved.

    Raises:
      UserError: the source cannot be read, has none of the sets, or was prepared with another
        tokenizer.
    """
    source, sets = spec.parse_evaluation(settings.data, "--data"), settings.sets
    if source.kind == spec.PREPARED:
        source_documents = prepared.documents(source, sets, tokenizer)
    else:
        texts = sources.documents(source, sets, sources.policy_of(config))
        source_documents = (_encoded(document, tokenizer) for document in texts)
    present = set()
    for document in source_documents:
        present.add(document["set"])
        yield document
    if missing := [name for name in sets if name not in present]:
        _LOG.info(f"{settings.data} has no document of the set {' or '.join(map(repr, missing))}")


def _encoded(document: dict, tokenizer: Tokenizer) -> dict:
    tokens, sizes = tokenizer.encode_with_bytes(document["text"])
    # Most are small: half the memory.
    sizes = sizes.astype(np.min_scalar_type(int(sizes.max(initial=0))))
    return {"set": document["set"], "tokens": tokens, "bytes": sizes}


def check_documents(config: Plan, tokenizer: Tokenizer, settings: Settings) -> None:
    """Checks that there is a document to evaluate on, as cheaply as possible.

    Documents are read until one is long enough.

    Args:
      settings: resolved.

    Raises:
      UserError: the source cannot be read, or no document is long enough.
    """
    longest = max(settings.lengths)
    if not any(len(d["tokens"]) > longest for d in documents(config, tokenizer, settings)):
        raise perplexity.too_short(longest)


class Evaluator:
    """Evaluates checkpoints of one run; reads the data and compiles once.

    Args:
      loaded_model: any checkpoint of the run. settings: see `Settings`.

    Raises:
      UserError: a wrong input; see docs/evaluation.md.
    """

    def __init__(self, loaded_model: loaded.LoadedModel, settings: Settings):
        config, tokenizer = loaded_model.config, loaded_model.tokenizer
        self.settings = settings = resolve(settings, config)
        held_out = list(documents(config, tokenizer, settings))
        if settings.extend:
            config = _extended(config, settings, held_out)
            loaded_model = dataclasses.replace(loaded_model, config=config)
        self._evaluation = perplexity.Evaluation(
            loaded_model,
            held_out,
            settings.lengths,
            protocol(settings.protocol, settings.lengths),
            _LOG.info,
            settings.windows,
        )
        self._head = {
            "kind": "perplexity",
            "training_length": config.sequence_length,
            "position": dataclasses.asdict(config.position),
            "segment_rule": config.segments.rule,
            "data": settings.data,
            "protocol": settings.protocol,
            "bos_rule": BOS_RULE,
        }

    def __call__(self, params: dict, name: str, step: int | None) -> dict:
        """The content of evaluation.json, for parameters sharded as those of the loaded model."""
        return {"name": name, "step": step, **self._head, **self._evaluation(params)}


def _extended(config: Plan, settings: Settings, held_out: list[dict]) -> Plan:
    """The config with its rotary encoding scaled by the mean number of segments in training blocks."""
    tokens = [document["tokens"] for document in held_out]
    blocks = perplexity.training_range(tokens, config.sequence_length, config.segment_rule)
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
        pictures.perplexity([(result["name"], evaluation)], directory.extrapolation)
    with pictures.by_product(directory.report):
        page.write([output], directory.report)


def evaluate(
    path: str,
    settings: Settings = Settings(),
    output: str = "",
    show: Callable[[dict], object] = lambda result: None,
    **changes,
) -> dict:
    """Scores a checkpoint at each length, and writes the files of `write`.

    All processes of a program call it; the first one writes.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      output: directory for the files; "" takes `path`.
      show: called with the result before it is written, by the first process.
      **changes: fields of `settings` by name, such as lengths=(256, 512).

    Returns:
      The content of evaluation.json; docs/evaluation.md describes it.

    Raises:
      UserError: a wrong input; see docs/evaluation.md.
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
