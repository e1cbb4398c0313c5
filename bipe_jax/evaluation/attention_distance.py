"""Attention by distance: how far back each head looks, in segments and in tokens."""

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import model, processes, segments, sharding
from bipe_jax.attention.chunked import CHUNK, scores
from bipe_jax.attention.scoring import Side
from bipe_jax.config.spec import parse_source
from bipe_jax.data import marked, sources
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, perplexity
from bipe_jax.plan import Plan
from bipe_jax.positions import LayerEncodings
from bipe_jax.report import page, pictures
from bipe_jax.workdir import Workdir, outputs

_LOG = logging.getLogger(__name__)

BY = ("segment", "position")
MULTIPLES = (1, 4)  # of the training length
BLOCKS = 16


def bins_to(largest: int) -> list[tuple[int, int]]:
    """Bins of the distances 0 … largest, both ends inclusive: 0, 1, 2-3, 4-7, …."""
    return [(0, 0), *((1 << i, (2 << i) - 1) for i in range(largest.bit_length()))]


def _sum_by_distance(weights, distance, count: int):
    """Sums weights (B, N, S) over the bins of distances (B, S): (B, N, count), see `bins_to`.

    Weights at negative distances are left out.
    """
    bins = (32 - jax.lax.clz(distance))[:, None]  # 0 -> 0, 1 -> 1, 2-3 -> 2, …; below 0 -> 32
    sums = [jnp.where(bins == i, weights, 0).sum(axis=-1) for i in range(count)]
    return jnp.stack(sums, axis=-1)


def attend_and_measure(config: Plan, inputs, counts: dict):
    """The `attend` of `model.run` that also measures the attention weights.

    It computes `model.attend_causally` for blocks of one document each, with exact encodings, a chunk
    of queries at a time: memory is linear in the length.

    Args:
      inputs: "tokens" and coordinates, (B, L) each.
      counts: coordinate -> number of bins, see `bins_to`.

    Returns:
      attend, which returns (B, L, N, H) and the means over the queries {coordinate: (B, N, bins),
      "entropy" (nats) and "first" (weight on the block's first token): (B, N)}, float32.
    """
    coordinates = {coordinate: inputs[coordinate] for coordinate in counts}
    index = jnp.arange(inputs["tokens"].shape[1])[None]
    heads = jnp.arange(config.model.heads)

    def attend(x, q, k, v, encodings: LayerEncodings, _):
        of_tokens = encodings.features(x)
        q, k = encodings.turn(q, k, of_tokens)
        acting = encodings.scoring(of_tokens)
        features = [of_encoding for _, of_encoding in acting]
        key = Side(index, None, features)

        def one(query):
            """Attention of one query in each block: (B, N, H), and its measures."""
            q, index, features, own = jax.tree.map(lambda x: x[:, None], query)
            logits = scores(q, k, Side(index, None, features), key, [e for e, _ in acting], heads)
            weights = jax.nn.softmax(logits, axis=-1)
            mixed = jnp.einsum("bkms,bskh->bkmh", weights.astype(v.dtype), v)
            weights = weights.reshape(q.shape[0], q.shape[2], -1)
            measures = {
                name: _sum_by_distance(weights, own[name] - coordinates[name], count)
                for name, count in counts.items()
            }
            measures["entropy"] = jax.scipy.special.entr(weights).sum(axis=-1)
            measures["first"] = weights[..., 0]
            return mixed.reshape(q.shape[0], q.shape[2], -1), measures

        queries = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, index, features, coordinates))
        mixed, measures = jax.lax.map(one, queries, batch_size=CHUNK)
        return jnp.moveaxis(mixed, 0, 1), jax.tree.map(lambda x: x.mean(axis=0), measures)

    return attend


def _measures(config, counts, params, inputs) -> dict:
    return model.run(config, params, inputs, attend_and_measure(config, inputs, counts))[2]


def measure(
    loaded_model: loaded.LoadedModel, blocks: np.ndarray, starts: np.ndarray | None = None
) -> tuple[dict, dict, dict]:
    """Measures attention by distance, averaged over the blocks and their queries.

    Args:
      blocks: (M, L) token ids, of one document each. starts: of their segments, see `segments.coordinates`.

    Returns:
      The bins of each coordinate in BY. The measures: {coordinate: (layers, N, bins), "entropy" and
      "first": (layers, N)}, see `attend_and_measure`. The weight of each bin under uniform attention:
      {coordinate: (bins,)}.
    """
    config, mesh = loaded_model.config, loaded_model.mesh
    coordinates = segments.coordinates(blocks, loaded_model.rule, starts=starts)
    bins = {name: bins_to(int(coordinates[name].max())) for name in BY}
    counts = {name: len(some) for name, some in bins.items()}
    run = jax.jit(
        functools.partial(_measures, config, counts), out_shardings=sharding.replicated(mesh)
    )
    rows = loaded_model.batch_rows(blocks.shape[1], len(blocks))
    parts = []
    for first in range(0, len(blocks), rows):
        some = slice(first, first + rows)
        size = len(blocks[some])
        inputs = {
            name: np.pad(array[some], ((0, rows - size), (0, 0)), "edge")
            for name, array in {"tokens": blocks, **coordinates}.items()
        }
        with jax.set_mesh(mesh):
            measures = jax.device_get(run(loaded_model.params, loaded_model.shard(inputs)))
        parts.append({name: array[:, :size] for name, array in measures.items()})
    means = {
        name: np.concatenate([part[name] for part in parts], axis=1).mean(axis=1, dtype=np.float64)
        for name in parts[0]
    }
    uniform = {
        name: np.mean([_uniform(row, bins[name]) for row in coordinates[name]], axis=0)
        for name in BY
    }
    return bins, means, uniform


def _uniform(coordinate: np.ndarray, bins: Sequence[tuple[int, int]]) -> np.ndarray:
    """The weight of each bin if all queries weigh all tokens that they see alike.

    Args:
      coordinate: (L,) ascending.
    """
    seen = np.arange(1, len(coordinate) + 1)
    counts = [
        np.minimum(np.searchsorted(coordinate, coordinate - near, "right"), seen)
        - np.searchsorted(coordinate, coordinate - far, "left")
        for near, far in bins
    ]
    return (counts / seen).mean(axis=1)


def choose(
    documents: Iterable[dict], encode: Callable[[dict], dict], longest: int, limit: int
) -> list[dict]:
    """The first `longest` tokens of at most `limit` documents, taken from the sets in turn.

    Args:
      documents: {"set": str, ...} each. encode: document -> {"tokens", ...}, (T,) each.

    Returns:
      What `encode` gives, (longest,) each; none if no document is long enough.
    """
    sets: dict[str, list] = {}
    for document in documents:
        of_set = sets.setdefault(document["set"], [])
        if len(of_set) < limit and len((encoded := encode(document))["tokens"]) >= longest:
            of_set.append({name: array[:longest] for name, array in encoded.items()})
    turns = itertools.chain.from_iterable(itertools.zip_longest(*sets.values()))
    return list(itertools.islice((encoded for encoded in turns if encoded), limit))


def analyse(
    path: str,
    lengths: Sequence[int] = (),
    data: str = "",
    output: str = "",
    blocks: int = BLOCKS,
    show: Callable[[dict], object] = lambda result: None,
) -> dict:
    """Measures attention at each length, on the starts of the same documents, and writes the result.

    Args:
      path: a workdir, its checkpoints directory or one step's directory.
      lengths: in tokens; () takes 1 and 4 times the training length.
      data: a source, see `data.sources.documents`; "" takes the config's `data.evaluation`.
      output: directory for attention.json and report.html; "" takes `path`.
      blocks: the largest number of documents.
      show: called with the result before it is written, by the first process.

    Returns:
      The content of attention.json: "results" are mean weights of attention in each bin of distance,
      for each length, coordinate, layer and head (both from 0); "heads" have the mean entropy of
      attention (nats) and the weight on the block's first token; "uniform" are the weights of uniform
      attention.

    Raises:
      UserError: a wrong input.
    """
    if blocks < 1:
        raise UserError(f"--blocks={blocks} must be at least 1")
    loaded_model = loaded.load(path)
    config = loaded_model.config
    lengths = sorted(set(lengths or perplexity.default_lengths(config, MULTIPLES)))
    perplexity.check_lengths(config, lengths)
    data, output = data or config.data.evaluation, output or path
    directory = Workdir(output)
    outputs.check_directory(output, Workdir.attention, Workdir.report)
    documents = sources.documents(parse_source(data), config.data.sets, sources.policy_of(config))
    names = segments.segmenters_of(config)

    def encode(document: dict) -> dict:
        return marked.encode_whole(loaded_model.tokenizer, document, names)[0]

    chosen = choose(documents, encode, lengths[-1], blocks)
    if not chosen:
        raise UserError(
            f"data: no document of {data!r} has {lengths[-1]} tokens: use shorter --lengths"
        )
    rows = {name: np.stack([encoded[name] for encoded in chosen]) for name in chosen[0]}
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
        cut = {name: array[:, :length] for name, array in rows.items()}
        bins, means, uniform = measure(loaded_model, cut["tokens"], cut.get("starts"))
        _add(result, length, bins, means, uniform)
        _LOG.info(f"{length} tokens: {len(chosen)} blocks")
    if processes.is_first():
        show(result)
        outputs.write_json(directory.attention, result)
        with pictures.by_product(directory.report):
            page.write([output], directory.report)
    return result


def _add(result: dict, length: int, bins: dict, means: dict, uniform: dict) -> None:
    def binned(by, weights):
        return [
            {"from": near, "to": far, "weight": float(weight)}
            for (near, far), weight in zip(bins[by], weights, strict=True)
        ]

    layers, heads = means["entropy"].shape
    for layer, head in itertools.product(range(layers), range(heads)):
        which = {"length": length, "layer": layer, "head": head}
        result["heads"].append(
            which | {name: float(means[name][layer, head]) for name in ("entropy", "first")}
        )
        for by in BY:
            result["results"].append(which | {"by": by, "bins": binned(by, means[by][layer, head])})
    for by in BY:
        result["uniform"].append({"length": length, "by": by, "bins": binned(by, uniform[by])})
