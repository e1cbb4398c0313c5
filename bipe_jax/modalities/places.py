"""Measures where held-out games and proofs are continued rightly: legal moves, references to steps.

python -m bipe_jax.modalities.places --checkpoint=runs/chess [--data='data/chess/held-out.jsonl']

At each place the model has read the document up to it, and its most probable token counts, or tokens. So one
pass over a document is enough. Writes places.json: right and total of each measure by the number of the ply
or the step, and by the number of tokens before it.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import cli, commands, model, processes, segments, sharding
from bipe_jax.config.spec import parse_source
from bipe_jax.data import marked, sources
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, room
from bipe_jax.modalities import games, proofs
from bipe_jax.modalities.place import Place
from bipe_jax.plan import Plan
from bipe_jax.report.text import table
from bipe_jax.workdir import outputs

FILE = "places.json"
NUMBER, TOKENS = "number", "tokens"  # what the places are counted by
PLACES = {  # by the set of a document
    games.SET: games.places,
    proofs.SET: proofs.places,
    proofs.RELATIVE: proofs.places,
}


def judged(
    places: Sequence[Place], sizes: np.ndarray, actual: Sequence[str], predicted: Sequence[str]
) -> Iterator[tuple[int, bool]]:
    """Yields for each place the number of tokens before it, and whether the model is right.

    Args:
      sizes: the characters that each token stands for, (L,). actual: the tokens, L.
      predicted: the most probable token at each place, given those before it, L.
    """
    ends = np.cumsum(sizes)
    for place in places:
        first = int(np.searchsorted(ends, place.start, side="right"))
        last = int(np.searchsorted(ends, place.end, side="left"))
        if place.allowed is None:
            yield first, list(actual[first : last + 1]) == list(predicted[first : last + 1])
        else:
            yield first, predicted[last] in place.allowed


def doubling(number: int, first: int = 1) -> int:
    """The least of first, 2 first, 4 first, ... that is at least a number."""
    while first < number:
        first *= 2
    return first


def likeliest(loaded_model: loaded.LoadedModel, rows: Sequence[dict]) -> Iterator[np.ndarray]:
    """Yields the most probable token at each place of documents, given those before it, (L,) each.

    The first of each means nothing.

    Args:
      rows: see `marked.encode_whole`.
    """
    config = loaded_model.config
    run = jax.jit(
        functools.partial(_likeliest, config),
        out_shardings=sharding.replicated(loaded_model.mesh),
    )
    longest = max(len(row["tokens"]) for row in rows)
    width = -(-longest // config.loss_chunk) * config.loss_chunk
    count = loaded_model.batch_rows(width, len(rows))
    for first in range(0, len(rows), count):
        some = list(rows[first : first + count])
        whole = [*some, *[some[-1]] * (count - len(some))]
        starts = [row.get("starts") for row in whole]
        inputs = loaded.padded([row["tokens"] for row in whole], width, loaded_model.rule, starts)
        with jax.set_mesh(loaded_model.mesh):
            found = np.asarray(run(loaded_model.params, loaded_model.shard(inputs)))
        for row, own in zip(some, found, strict=False):
            yield np.roll(own, 1)[: len(row["tokens"])]


def _likeliest(config: Plan, params: dict, batch: dict) -> jax.Array:
    hidden, output = model.hidden(config, params, batch)
    return jnp.argmax(output.logits(hidden.astype(output.dtype)), axis=-1)


def measure(loaded_model: loaded.LoadedModel, data: str = "") -> dict[str, Any]:
    """The content of places.json.

    Args:
      data: a source of text; "": the config's held-out one.

    Raises:
      UserError: it cannot be read, or has neither games nor proofs.
    """
    config, tokenizer = loaded_model.config, loaded_model.tokenizer
    source = parse_source(data or config.data.evaluation)
    read = sources.documents(source, config.data.sets, sources.policy_of(config))
    documents = [document for document in read if document["set"] in PLACES]
    if not documents:
        raise UserError(f"{source.text} has no set of {', '.join(PLACES)}: name one by --data")
    names = segments.segmenters_of(config)
    encoded = [marked.encode_whole(tokenizer, document, names) for document in documents]
    longest = max(len(row["tokens"]) for row, _ in encoded)
    config.encodings.check_length(longest)
    room.check(loaded_model, longest)
    words = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    tallies: dict[tuple[str, str, int], list[int]] = {}
    found = likeliest(loaded_model, [row for row, _ in encoded])
    for document, (row, sizes), predicted in zip(documents, encoded, found, strict=True):
        places = list(PLACES[document["set"]](document["text"]))
        pieces = [[words[token] for token in some] for some in (row["tokens"], predicted)]
        judgements = judged(places, sizes, *pieces)
        for place, (before, is_right) in zip(places, judgements, strict=True):
            for key in ((NUMBER, place.number), (TOKENS, doubling(before))):
                tally = tallies.setdefault((place.measure, *key), [0, 0])
                tally[0] += is_right
                tally[1] += 1
    return {
        "kind": "places",
        "step": loaded_model.step,
        "training_length": config.sequence_length,
        "data": source.text,
        "documents": len(documents),
        "results": [
            {"measure": name, "by": by, "at": at, "right": right, "total": total}
            for (name, by, at), (right, total) in sorted(tallies.items())
        ],
    }


def shown(result: dict[str, Any]) -> str:
    """The shares by the number of tokens before a place, as text."""
    rows = [
        (
            row["measure"],
            f"{row['at']:,}",
            f"{row['right'] / row['total']:.1%}",
            f"{row['total']:,}",
        )
        for row in result["results"]
        if row["by"] == TOKENS
    ]
    return table(("measure", "tokens before, at most", "share", "places"), rows)


def main() -> None:
    args = commands.parser("places").parse_args()
    cli.set_up()
    loaded_model = loaded.load(args.checkpoint)
    output = args.output or args.checkpoint
    outputs.check_directory(output, FILE)
    result = measure(loaded_model, args.data)
    if processes.is_first():
        outputs.write_json(os.path.join(output, FILE), result)
        print(shown(result))
        print(f"Wrote {output}/{FILE}")


if __name__ == "__main__":
    with cli.user_errors():
        main()
