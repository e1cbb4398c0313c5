"""Shows how far back a checkpoint's attention looks, by layer and head:

python -m bipe_jax.analyse --checkpoint=runs/quickstart [--lengths=128,512] [--data=SOURCE]

Runs the model over the starts of long documents, sums the attention weights into bins of the distance
in segments and in tokens, prints a table and writes attention.json and report.html, by default into
the run's directory.
"""

import argparse
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import checkpoint, cli, model, processes, segments, sharding
from bipe_jax.attention.chunked import CHUNK, scores
from bipe_jax.attention.scoring import Side
from bipe_jax.config.spec import parse_source
from bipe_jax.data import sources
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, perplexity
from bipe_jax.plan import Plan
from bipe_jax.positions import LayerEncodings
from bipe_jax.report import page, text
from bipe_jax.training.compiling import enable_cache
from bipe_jax.workdir import Workdir, files

_LOG = logging.getLogger("bipe_jax.analyse")

BY = ("segment", "position")
MULTIPLES = (1, 4)  # of the training length
BLOCKS = 16


def bins_to(largest: int) -> list[tuple[int, int]]:
    """Bins of distances, both ends inclusive, that hold 0 … largest: 0, 1, 2-3, 4-7, …"""
    return [(0, 0), *((1 << i, (2 << i) - 1) for i in range(largest.bit_length()))]


def _sum_by_distance(weights, distance, count: int):
    """(B, N, S) weights, and (B, S) integers -> (B, N, count): sums over the bins of `bins_to`.

    Weights at negative distances are left out.
    """
    bins = (32 - jax.lax.clz(distance))[:, None]  # 0 -> 0, 1 -> 1, 2-3 -> 2, …; below 0 -> 32
    sums = [jnp.where(bins == i, weights, 0).sum(axis=-1) for i in range(count)]
    return jnp.stack(sums, axis=-1)


def attend_and_measure(config: Plan, inputs, counts: dict):
    """The `attend` of `model.run` that also says where attention goes.

    As `model.attend_causally` on documents of a block each, with exact encodings, a chunk of queries at
    a time: memory is linear in the length. What it gives besides are averages over the queries.

    Args:
      inputs: "tokens" and coordinates, (B, L) each.
      counts: coordinate -> number of bins, see `bins_to`.

    Returns:
      attend, which gives (B, L, N, H) and {coordinate: (B, N, bins), "entropy" (nats) and "first"
      (weight on the block's first token): (B, N)}, float32.
    """
    places = {coordinate: inputs[coordinate] for coordinate in counts}
    index = jnp.arange(inputs["tokens"].shape[1])[None]
    heads = jnp.arange(config.model.heads)

    def attend(x, q, k, v, encodings: LayerEncodings, _):
        of_tokens = encodings.features(x)
        q, k = encodings.turn(q, k, of_tokens)
        acting = encodings.scoring(of_tokens)
        features = [of_encoding for _, of_encoding in acting]
        key = Side(index, None, features)

        def one(query):
            """Of one query in each block: (B, N, H) and what was measured."""
            q, index, features, at = jax.tree.map(lambda x: x[:, None], query)
            logits = scores(q, k, Side(index, None, features), key, [e for e, _ in acting], heads)
            weights = jax.nn.softmax(logits, axis=-1)
            mixed = jnp.einsum("bkms,bskh->bkmh", weights.astype(v.dtype), v)
            weights = weights.reshape(q.shape[0], q.shape[2], -1)
            found = {
                name: _sum_by_distance(weights, at[name] - places[name], count)
                for name, count in counts.items()
            }
            found["entropy"] = jax.scipy.special.entr(weights).sum(axis=-1)
            found["first"] = weights[..., 0]
            return mixed.reshape(q.shape[0], q.shape[2], -1), found

        queries = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, index, features, places))
        mixed, found = jax.lax.map(one, queries, batch_size=CHUNK)
        return jnp.moveaxis(mixed, 0, 1), jax.tree.map(lambda x: x.mean(axis=0), found)

    return attend


def _measures(config, counts, params, inputs) -> dict:
    return model.run(config, params, inputs, attend_and_measure(config, inputs, counts))[2]


def measure(loaded_model: loaded.LoadedModel, blocks: np.ndarray) -> tuple[dict, dict, dict]:
    """Where attention goes, on average over the blocks and their queries.

    Args:
      blocks: (M, L) token ids, of one document each.

    Returns:
      The bins of each coordinate in BY. The measures: {coordinate: (layers, N, bins), "entropy" and
      "first": (layers, N)}, see `attend_and_measure`. And what each bin would have if all tokens that
      a query sees weighed the same: {coordinate: (bins,)}.
    """
    config, mesh = loaded_model.config, loaded_model.mesh
    coordinates = segments.coordinates(blocks, loaded_model.rule)
    bins = {name: bins_to(int(coordinates[name].max())) for name in BY}
    counts = {name: len(some) for name, some in bins.items()}
    run = jax.jit(
        functools.partial(_measures, config, counts), out_shardings=sharding.replicated(mesh)
    )
    devices = sharding.batch_shards(mesh)
    rows = max(config.evaluation.batch_tokens // blocks.shape[1] // devices, 1) * devices
    rows = min(rows, -(-len(blocks) // devices) * devices)
    found = []
    for first in range(0, len(blocks), rows):
        some = slice(first, first + rows)
        inputs = {"tokens": blocks, **coordinates}
        size = len(blocks[some])
        inputs = {
            name: np.pad(x[some], ((0, rows - size), (0, 0)), "edge") for name, x in inputs.items()
        }
        with jax.set_mesh(mesh):
            placement = sharding.batch_sharding(mesh)
            inputs = {name: sharding.place(x, placement) for name, x in inputs.items()}
            of_rows = jax.device_get(run(loaded_model.params, inputs))
        found.append({name: x[:, :size] for name, x in of_rows.items()})
    means = {
        name: np.concatenate([x[name] for x in found], axis=1).mean(axis=1, dtype=np.float64)
        for name in found[0]
    }
    uniform = {
        name: np.mean([_uniform(row, bins[name]) for row in coordinates[name]], axis=0)
        for name in BY
    }
    return bins, means, uniform


def _uniform(places: np.ndarray, bins) -> np.ndarray:
    """What each bin would get if all queries weighed all tokens that they see alike.

    Args:
      places: (L,) a coordinate that never falls.
    """
    seen = np.arange(1, len(places) + 1)
    counts = [
        np.minimum(np.searchsorted(places, places - near, "right"), seen)
        - np.searchsorted(places, places - far, "left")
        for near, far in bins
    ]
    return (counts / seen).mean(axis=1)


def choose(documents: Iterable[dict], encode, longest: int, limit: int) -> np.ndarray:
    """The first `longest` tokens of at most `limit` documents that have so many.

    The sets take turns, so that each has its part.

    Args:
      documents: {"set": str, "text": str} each. encode: text -> (T,) token ids.

    Returns:
      (M, longest) int32, M at most `limit`; M is 0 if no document is long enough.
    """
    sets: dict[str, list] = {}
    for document in documents:
        of_set = sets.setdefault(document["set"], [])
        if len(of_set) < limit and len(tokens := encode(document["text"])) >= longest:
            of_set.append(tokens[:longest])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*sets.values()))
    chosen = list(itertools.islice((tokens for tokens in turns if tokens is not None), limit))
    return np.array(chosen, np.int32).reshape(-1, longest)


def analyse(path: str, lengths: Sequence[int] = (), data="", output="", blocks=BLOCKS) -> dict:
    """Measures attention at each length, on the starts of the same documents, and writes it.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      lengths: tokens; () takes 1 and 4 times the training length.
      data: a source, see `data.sources.documents`; "" takes the config's `data.evaluation`.
      output: directory for attention.json and report.html; "" takes `path`.
      blocks: how many documents at most.

    Returns:
      What attention.json holds: "results" are mean weights of attention in each bin of distance, for
      each length, coordinate, layer and head (both from 0); "heads" have the mean entropy of
      attention (nats) and the share on the block's first token; "uniform" is what weights that are
      all the same would give.

    Raises:
      UserError: a wrong input.
    """
    if blocks < 1:
        raise UserError(f"--blocks={blocks} must be at least 1")
    loaded_model = loaded.load(path)
    config = loaded_model.config
    lengths = lengths or perplexity.default_lengths(config, MULTIPLES)
    lengths = sorted(set(lengths))
    perplexity.check_lengths(config, lengths)
    data, output = data or config.data.evaluation, output or path
    Workdir(output).make("--output")
    documents = sources.documents(parse_source(data), config.data.sets, sources.policy_of(config))
    chosen = choose(documents, loaded_model.tokenizer.encode, lengths[-1], blocks)
    if not len(chosen):
        raise UserError(
            f"data: no document of {data!r} has {lengths[-1]} tokens: use shorter --lengths"
        )
    result = {
        "kind": "attention",
        "name": os.path.basename(os.path.abspath(output)),
        "step": loaded_model.step,
        "training_length": config.sequence_length,
        "position": dataclasses.asdict(config.position),
        "segment_rule": config.segments.rule,
        "data": data,
        "documents": len(chosen),
        "results": [],
        "heads": [],
        "uniform": [],
    }
    for length in lengths:
        bins, means, uniform = measure(loaded_model, chosen[:, :length])
        _add(result, length, bins, means, uniform)
        _LOG.info(f"{length} tokens: {len(chosen)} blocks")
    if processes.is_first():
        files.write_json(Workdir(output).attention, result)
        page.write([output], Workdir(output).report)
        print(table(result))
        print(f"Wrote {output}/attention.json and report.html")
    return result


def _add(result: dict, length: int, bins: dict, means: dict, uniform: dict) -> None:
    def binned(by, weights):
        return [
            {"from": near, "to": far, "weight": float(weight)}
            for (near, far), weight in zip(bins[by], weights, strict=True)
        ]

    layers, heads = means["entropy"].shape
    for layer, head in itertools.product(range(layers), range(heads)):
        place = {"length": length, "layer": layer, "head": head}
        result["heads"].append(
            place | {name: float(means[name][layer, head]) for name in ("entropy", "first")}
        )
        for by in BY:
            result["results"].append(place | {"by": by, "bins": binned(by, means[by][layer, head])})
    for by in BY:
        result["uniform"].append({"length": length, "by": by, "bins": binned(by, uniform[by])})


_SHOWN = {
    "segment": {
        "own segment": (0, 0),
        "1 before": (1, 1),
        "2-7": (2, 7),
        "8 and more": (8, np.inf),
    },
    "position": {"0-15 tokens": (0, 15), "16-127": (16, 127), "128 and more": (128, np.inf)},
}


def table(result: dict) -> str:
    """Text: for each length and layer, means over the heads."""
    found: dict = {}
    for row in result["heads"]:
        line = found.setdefault((row["length"], row["layer"]), {"entropy": [], "first token": []})
        line["entropy"].append(row["entropy"])
        line["first token"].append(row["first"])
    for row in result["results"]:
        for name, (low, high) in _SHOWN[row["by"]].items():
            share = sum(b["weight"] for b in row["bins"] if low <= b["from"] <= high)
            found[row["length"], row["layer"]].setdefault(name, []).append(share)
    lines = [
        (
            f"{length:,}, {layer}",
            f"{np.mean(line.pop('entropy')):.2f}",
            *(f"{np.mean(shares):.1%}" for shares in line.values()),
        )
        for (length, layer), line in found.items()
    ]
    names = [name for spans in _SHOWN.values() for name in spans]
    return text.table(("length, layer", "entropy", "first token", *names), lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m bipe_jax.analyse", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's workdir, or one step's directory"
    )
    parser.add_argument("--lengths", default="", help="such as 256,1024 (1 and 4 times training's)")
    parser.add_argument("--data", default="", help="such as 'texts/*.jsonl.zst' (the config's)")
    parser.add_argument("--output", default="", help="directory to write to (--checkpoint)")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"documents at most ({BLOCKS})")
    args = parser.parse_args()
    try:
        lengths = [int(length) for length in args.lengths.split(",") if length]
    except ValueError:
        raise UserError(
            f"--lengths={args.lengths} must be whole numbers, such as 256,512"
        ) from None
    checkpoint.quiet()
    enable_cache()
    processes.join()
    analyse(args.checkpoint, lengths, args.data, args.output, args.blocks)


if __name__ == "__main__":
    with cli.user_errors():
        main()
