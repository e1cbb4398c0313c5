"""A checkpoint's answers to examples: whether each is right, and where the first wrong token is.

Greedy decoding writes a completion token by token if and only if each of its tokens is the most probable one
after those before it. One pass over prompt and completion therefore tells whether the whole is right, and
which token is the first wrong one. Only where it is wrong, the answer at its end is decoded.
"""

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bipe_jax import processes, segments, synthetic
from bipe_jax.config import spec
from bipe_jax.data import marked, sources
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import caching, decode, example_scoring, loaded, room
from bipe_jax.evaluation.example_scoring import Encoded
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, outputs

_LOG = logging.getLogger(__name__)

_TRAINED_EXAMPLES = 4000  # from which the largest coordinates in training are measured
_DECODED_ROWS = 64
KIND = "answers"


def check(config: Plan, text: str = "") -> list[spec.Source]:
    """The sources of examples of a config, or of a text.

    Raises:
      UserError: a source is of text; or is a synthetic task without a number of examples.
    """
    parsed = spec.parse_evaluation(text, "--data") if text else config.evaluated
    for source in parsed:
        if source.kind not in spec.OF_EXAMPLES:
            raise UserError(f"{source.text}: it is text, and examples are needed")
        if source.kind == spec.SYNTHETIC and not synthetic.parse(source.path).count:
            raise UserError(
                f"{source.text}: it has no end: set the number of examples, such as count=1000"
            )
    return list(parsed)


def check_examples(config: Plan, tokenizer: Tokenizer, text: str = "") -> None:
    """Checks that the first example of each source can be read and tokenised. Raises UserError."""
    names = segments.segmenters_of(config)
    for source in check(config, text):
        document = next(_read(config, source))
        for part in marked.parts_of(document, names):
            marked.encode(tokenizer, [part])


def _read(config: Plan, source: spec.Source) -> Iterator[dict]:
    return sources.documents(source, config.data.sets, sources.policy_of(config))


def _encode(loaded_model: loaded.LoadedModel, document: dict, names: Sequence[str]) -> Encoded:
    """An example as tokens, cut into what the model reads and what it writes."""
    row, _ = marked.encode_whole(loaded_model.tokenizer, document, names)
    coordinates = segments.coordinates(row["tokens"], loaded_model.rule, starts=row.get("starts"))
    return Encoded(document, row, {name: int(x.max()) for name, x in coordinates.items()})


def _largest_in_training(loaded_model: loaded.LoadedModel, names: Sequence[str]) -> dict[str, int]:
    """The largest value of each coordinate in the first examples of the training; {} if it has none."""
    config, largest = loaded_model.config, {}
    trained = [source for source in config.training.sources if source.kind in spec.OF_EXAMPLES]
    for source in trained:
        for document in itertools.islice(_read(config, source), _TRAINED_EXAMPLES):
            for name, value in _encode(loaded_model, document, names).largest.items():
                largest[name] = max(largest.get(name, 0), value)
    return largest


def _items(encoded: Sequence[Encoded], trained: dict[str, int]) -> list[dict[str, Any]]:
    """For each example its labels, the tokens it has, and whether coordinates exceed those of training."""
    beyond = {f"unseen_{name}": name for name in ("segment", "offset") if name in trained}
    return [
        {
            "labels": one.document["labels"]
            | {label: one.largest[name] > trained[name] for label, name in beyond.items()},
            "tokens": len(one.row["tokens"]),
        }
        for one in encoded
    ]


def _decoded_answers(loaded_model: loaded.LoadedModel, encoded: Sequence[Encoded]) -> list[bool]:
    """Whether the greedy completion of each example ends with its answer.

    One that does not end within twice the tokens of the example's completion has none.
    """
    tokenizer = loaded_model.tokenizer
    rooms = [2 * (len(one.row["tokens"]) - len(one.prompt)) for one in encoded]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].row["tokens"]))
    right = [False] * len(encoded)
    longest = max(len(one.prompt) + max(rooms) for one in encoded)
    generator = decode.Generator(loaded_model, caching.bucket(longest))
    for first in range(0, len(order), _DECODED_ROWS):
        some = order[first : first + _DECODED_ROWS]
        prompts, room_of_all = [encoded[i].prompt for i in some], max(rooms[i] for i in some)
        written = generator(prompts, room_of_all, stop=tokenizer.ends)
        for i, tokens in zip(some, written, strict=True):
            said, answer = tokenizer.decode(tokens).split(), encoded[i].document["answer"].split()
            right[i] = len(tokens) < rooms[i] and said[-len(answer) :] == answer
    return right


def measure(loaded_model: loaded.LoadedModel, text: str = "") -> dict[str, Any]:
    """The content of answers.json, without the run's name; see docs/how-to/examples.md.

    Args:
      text: sources of examples, separated by ";"; "": the config's.

    Raises:
      UserError: a source cannot be read or has no end, or the model has no positions for its examples.
    """
    config = loaded_model.config
    names = segments.segmenters_of(config)
    trained = _largest_in_training(loaded_model, names)
    scorer = example_scoring.Scorer(loaded_model)
    results = []
    for source in check(config, text):
        encoded = [_encode(loaded_model, document, names) for document in _read(config, source)]
        longest = max(len(one.row["tokens"]) for one in encoded)
        config.encodings.check_length(longest)
        room.check(loaded_model, longest)
        _LOG.info(f"{source.text}: {len(encoded):,} examples of at most {longest:,} tokens")
        items = _items(encoded, trained)
        result: dict[str, Any] = {"source": source.text, "longest": longest, "items": items}
        if "sets" in encoded[0].row:
            groups = synthetic.parse(source.path).groups
            result |= scorer.sets(encoded, groups, items)
        else:
            scorer.completions(encoded, items)
            _add_answers(loaded_model, encoded, items)
        results.append(result)
    return {
        "kind": KIND,
        "step": loaded_model.step,
        "training_length": config.sequence_length,
        "position": dataclasses.asdict(config.position),
        "segment_rule": config.segments.rule,
        "seed": config.seed,
        "trained": trained,
        "results": results,
    }


def _add_answers(
    loaded_model: loaded.LoadedModel, encoded: Sequence[Encoded], items: list[dict[str, Any]]
) -> None:
    """Adds whether the answer is right to items, where the completion is all that is written."""
    wrong = []
    for one, item in zip(encoded, items, strict=True):
        if item["whole"]:
            item["answer"] = True
        elif one.is_prompt_and_completion and not one.has_starts:
            wrong.append((one, item))
    if wrong:
        right = _decoded_answers(loaded_model, [one for one, _ in wrong])
        for (_, item), is_right in zip(wrong, right, strict=True):
            item["answer"] = is_right


def evaluate(
    path: str,
    text: str = "",
    output: str = "",
    show: Callable[[dict], object] = lambda result: None,
) -> dict[str, Any]:
    """Scores a checkpoint's answers to examples, and writes answers.json.

    All processes of a program call it; the first one writes.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      text: sources of examples, separated by ";"; "": the config's `data.evaluation`.
      output: directory for the file; "" takes `path`.
      show: called with the result before it is written, by the first process.

    Returns:
      The content of answers.json; see docs/how-to/examples.md.

    Raises:
      UserError: a wrong input.
    """
    loaded_model = loaded.load(path)
    check(loaded_model.config, text)
    output = output or path
    outputs.check_directory(output, Workdir.answers)
    result = {"name": os.path.basename(os.path.abspath(output)), **measure(loaded_model, text)}
    if processes.is_first():
        show(result)
        outputs.write_json(Workdir(output).answers, result)
    return result
