"""Evaluates a checkpoint at several lengths:

python -m bipe_jax.evaluate --checkpoint=runs/quickstart --lengths=256,512,1024 [--data=SOURCE]

Prints tables and writes evaluation.json, extrapolation.png and report.html, by default into the run's
directory. With --follow it evaluates each new checkpoint of a run that is still being trained.
"""

import argparse
import dataclasses
import logging
import os
from collections.abc import Iterator

from bipe_jax import checkpoint, cli, processes
from bipe_jax.config import spec
from bipe_jax.data import prepared, sources
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, perplexity
from bipe_jax.evaluation.protocols import SAME_TOKENS, protocol
from bipe_jax.report import page, pictures
from bipe_jax.report.results import Evaluation, read_file
from bipe_jax.report.text import table, visible
from bipe_jax.training.compiling import enable_cache
from bipe_jax.workdir import Workdir, files

_LOG = logging.getLogger("bipe_jax.evaluate")

MULTIPLES = (1, 2, 4, 8, 16)
BOS_RULE = "BOS where a document begins, nowhere else"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to evaluate on; what is empty or 0 is the config's.

    Attributes:
      lengths: tokens; by default 1 … 16 times the training length, as far as the model can be run.
      data: a source, see `data.sources.open_source`, or "prepared:DIR".
      sets: names of sets to keep.
      windows: of the shortest length's targets, a data set.
      protocol: see `protocols`.
      extend: a scaling of the rotary encoding, see `positions.extend`; "" for none.
    """

    lengths: tuple[int, ...] = ()
    data: str = ""
    sets: tuple[str, ...] = ()
    windows: int = 0
    protocol: str = SAME_TOKENS
    extend: str = ""


def resolve(settings: Settings, config) -> Settings:
    """The settings with the config's values filled in. Raises UserError for what does not fit."""
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
    if settings.extend:  # how far segments ran is measured later; what is wrong is said now
        loaded.extended(config, settings.extend, {"segment": 1.0})
    spec.parse_evaluation(settings.data, "--data")
    return settings


def documents(placed: loaded.LoadedModel, settings: Settings) -> Iterator[dict]:
    """Yields {"set": str, "tokens": (T,) int32}.

    Raises:
      UserError: the source cannot be read, has none of the sets, or was prepared with another
        tokenizer.
    """
    source, sets = spec.parse_evaluation(settings.data, "--data"), settings.sets
    found = set()
    if source.kind == spec.PREPARED:
        read = prepared.documents(source, sets, placed.tokenizer)
    else:
        read = (
            {"set": d["set"], "tokens": placed.tokenizer.encode(d["text"])}
            for d in sources.documents(source, sets, sources.policy_of(placed.config))
        )
    for document in read:
        found.add(document["set"])
        yield document
    if missing := [name for name in sets if name not in found]:
        _LOG.info(f"{settings.data} has no document of the set {' or '.join(map(repr, missing))}")


class Evaluator:
    """Evaluates checkpoints of one run; reads the data and compiles once.

    Args:
      placed: any checkpoint of the run. settings: see `Settings`.

    Raises:
      UserError: a wrong input; see docs/evaluation.md.
    """

    def __init__(self, placed: loaded.LoadedModel, settings: Settings):
        self.settings = settings = resolve(settings, placed.config)
        held = list(documents(placed, settings))
        if settings.extend:
            placed = _extended(placed, settings, held)
        config = placed.config.replace({"evaluation.windows": settings.windows})
        placed = dataclasses.replace(placed, config=config)
        self._evaluation = perplexity.Evaluation(
            placed,
            held,
            placed.tokenizer.byte_lengths(),
            settings.lengths,
            protocol(settings.protocol, settings.lengths),
            _LOG.info,
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
        """What evaluation.json holds, of parameters that are placed as those of `loaded.load`."""
        return {"name": name, "step": step, **self._head, **self._evaluation(params)}


def _extended(placed: loaded.LoadedModel, settings: Settings, held: list) -> loaded.LoadedModel:
    """The model with its rotary encoding scaled. How far segments ran in training is measured here."""
    length = placed.config.sequence_length
    blocks = perplexity.training_range([d["tokens"] for d in held], length, placed.rule)
    config = loaded.extended(placed.config, settings.extend, {"segment": blocks["segments"]})
    return dataclasses.replace(placed, config=config)


def write(result: dict, output: str) -> None:
    """Writes evaluation.json, extrapolation.png and report.html into a directory."""
    directory = Workdir(output)
    files.write_json(directory.evaluation, result)
    measured = read_file(output, Evaluation)
    pictures.perplexity([(result["name"], measured)], directory.extrapolation)
    page.write([output], directory.report)


def evaluate(path: str, settings: Settings = Settings(), output: str = "") -> dict:
    """Scores a checkpoint at each length, prints the tables and writes the files.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      output: directory for the files; "" takes `path`.

    Returns:
      What evaluation.json holds.

    Raises:
      UserError: a wrong input; see docs/evaluation.md.
    """
    placed = loaded.load(path)
    resolve(settings, placed.config)
    output = output or path
    Workdir(output).make("--output")
    name = os.path.basename(os.path.abspath(output))
    result = Evaluator(placed, settings)(placed.params, name, placed.step)
    if processes.is_first():
        write(result, output)
        print(tables(result))
        print(f"Wrote {output}/evaluation.json, extrapolation.png and report.html")
    return result


def tables(result: dict) -> str:
    """What was measured, as text."""
    head = (
        f"{result['protocol']}; {result['bos_rule']}; rule {result['segment_rule']}; trained at "
        f"{result['training_length']:,} tokens"
    )
    return "\n\n".join([head, _perplexities(result["results"]), _unseen(result["unseen"])])


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _perplexities(rows: list[dict]) -> str:
    """Perplexity ± its standard error over documents, and what it was scored on."""
    head = ("data set", "length", "perplexity", "±", "bits/byte", "±", "tokens", "docs",
            "tokens/segment", "p99", "segments")  # fmt: skip
    lines = [
        (
            visible(row["set"]),
            f"{row['length']:,}",
            f"{row['perplexity']:.2f}",
            _number(row["perplexity_error"], 2),
            f"{row['bits_per_byte']:.3f}",
            _number(row["bits_per_byte_error"], 3),
            f"{row['tokens']:,}",
            f"{row['documents']}",
            f"{row['segment_tokens_mean']:.1f}",
            f"{row['segment_tokens_p99']:.0f}",
            f"{row['segments_per_block']:.0f}",
        )
        for row in rows
    ]
    return table(head, lines)


def _unseen(rows: list[dict]) -> str:
    """How far each coordinate runs, and the share of the targets that lie beyond training's range."""
    head = ["beyond training", "length"]
    coordinates = list(dict.fromkeys(row["coordinate"] for row in rows))
    for name in coordinates:
        head += [f"{name} to", "share"]
    lines = {}
    for row in rows:
        line = lines.setdefault(
            (row["set"], row["length"]), [visible(row["set"]), f"{row['length']:,}"]
        )
        line += [f"{row['max']:,} / {row['trained_max']:,}", f"{row['share']:.0%}"]
    return table(tuple(head), [tuple(line) for line in lines.values()])


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's workdir, or one step's directory"
    )
    parser.add_argument("--lengths", default="", help="such as 256,512,1024 (the config's)")
    parser.add_argument("--data", default="", help="such as 'texts/*.jsonl.zst' (the config's)")
    parser.add_argument("--sets", default="", help="names of sets, separated by | (the config's)")
    parser.add_argument("--windows", type=int, default=0, help="windows a data set (the config's)")
    parser.add_argument(
        "--protocol",
        default=SAME_TOKENS,
        help=f"{SAME_TOKENS}, non-overlapping or sliding:STRIDE ({SAME_TOKENS})",
    )
    parser.add_argument("--extend", default="", help="scale the rotary encoding, such as yarn:8")
    parser.add_argument("--output", default="", help="directory to write to (--checkpoint)")
    parser.add_argument("--follow", action="store_true", help="evaluate each new checkpoint")
    args = parser.parse_args()
    try:
        lengths = tuple(int(length) for length in args.lengths.split(",") if length)
    except ValueError:
        raise UserError(
            f"--lengths={args.lengths} must be whole numbers, such as 256,512"
        ) from None
    if args.windows < 0:
        raise UserError(f"--windows={args.windows} must be at least 1")
    sets = tuple(name for name in args.sets.split("|") if name)
    settings = Settings(lengths, args.data, sets, args.windows, args.protocol, args.extend)
    checkpoint.quiet()
    enable_cache()
    processes.join()
    if args.follow:
        from bipe_jax.evaluation.follow import follow

        follow(args.checkpoint, settings, args.output)
    else:
        evaluate(args.checkpoint, settings, args.output)


if __name__ == "__main__":
    with cli.user_errors():
        main()
