"""The cache of decoding: the keys and values of each row's last tokens, with the coordinates of the next one.

It holds a whole text, or as many tokens as can count (`dropping`). The coordinates of the next token follow
from the last (`segments.advance`).

Shape letters: B rows, T tokens that are added at a time, S size of the cache, K key/value heads, H head
width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import model, segments
from bipe_jax.attention import skipping
from bipe_jax.attention.chunked import in_parts
from bipe_jax.attention.scoring import Side
from bipe_jax.evaluation import dropping
from bipe_jax.output import Output
from bipe_jax.plan import Plan
from bipe_jax.positions import LayerEncodings

_SMALLEST = 64  # tokens of the smallest cache
_NEVER = np.iinfo(np.int32).max  # the index of an empty slot: no query comes after it


def bucket(length: int) -> int:
    """The smallest size of a cache for `length` tokens: a power of two, or one and a half of one."""
    size = max(_SMALLEST, 1 << (length - 1).bit_length())
    return size * 3 // 4 if length <= size * 3 // 4 and size > _SMALLEST else size


def empty_cache(config: Plan, rows: int, size: int, drops: bool = False) -> dict:
    """A cache without tokens.

    Args:
      size: S, the tokens of a row that it has room for. drops: whether it may be given more, see `dropping`.

    Returns:
      "length": (B,) number of tokens. "next": coordinates of the next token as far as they are known
      before it, and states of automata, (B,) int32 each.
      "coordinates": those that encodings that act on logits need, (B, S) int32 each. "layers": "key" and
      "value" (layers, B, K, S, H) in `model.dtype`, keys as attention sees them; and "features" that layers
      computed for such encodings, (layers, B, S, ...). Token i of a row is in slot i modulo S.
      If it drops tokens also "exact": (B,) whether none was needed, and "dropped", here and in "layers".
    """
    m, encodings = config.model, config.encodings
    shape = (m.layers, rows, m.kv_heads, size)
    features = encodings.features_of_layers(rows, size)
    cache = {
        "length": jnp.zeros(rows, jnp.int32),
        "next": segments.start((rows,), config.segment_rule),
        "coordinates": {
            name: jnp.zeros((rows, size), jnp.int32) for name in encodings.scoring_coordinates
        },
        "layers": {
            "key": jnp.zeros((*shape, encodings.key_width), m.dtype),
            "value": jnp.zeros((*shape, m.width // m.heads), m.dtype),
            "features": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), features),
        },
    }
    if drops:
        layers, modules = cache["layers"], encodings.make_layer(jax.random.key(0))
        prepared = encodings.prepare(modules, cache["coordinates"])
        prepared = {name: x for name, x in prepared.items() if encodings.abstract[name].acts}
        layers["dropped"], cache["dropped"] = dropping.none_yet(
            layers["key"], layers["features"], prepared
        )
        cache["exact"] = jnp.ones(rows, bool)
    return cache


def extend(
    config: Plan, params: dict, cache: dict, inputs: dict, counts: jax.Array
) -> tuple[jax.Array, dict]:
    """Adds tokens to a cache.

    Args:
      inputs: "tokens" and their coordinates, (B, T) each.
      counts: (B,) how many of each row's T tokens to add; the rest is padding.

    Returns:
      Logits of the token after each row's last one, (B, V) float32 (undefined where the count is 0), and
      the cache, with "next" unchanged.
    """
    B, T = inputs["tokens"].shape
    size = cache["layers"]["key"].shape[3]
    length = cache["length"]
    index = length[:, None] + jnp.arange(T)
    # The last token that is in each slot.
    cached_index = length[:, None] - 1 - (length[:, None] - 1 - jnp.arange(size)) % size
    cached_index = jnp.where(cached_index >= 0, cached_index, _NEVER)
    prepared = model.prepare(config, params, cache["coordinates"])
    heads = jnp.arange(config.model.heads)
    added = jnp.arange(T) < counts[:, None]

    def attend(x, q, k, v, encodings: LayerEncodings, cached):
        features = encodings.features(x, _last(cached["features"], length))
        q, k = encodings.turn(q, k, features)
        acting = encodings.scoring(features)
        new = Side(index, None, [of_tokens for _, of_tokens in acting])
        before = encodings.scoring(prepared | cached["features"])
        old = Side(cached_index, None, [of_tokens for _, of_tokens in before])
        cached_k, cached_v = (jnp.moveaxis(cached[name], 1, 2) for name in ("key", "value"))
        cached_k, excess = jnp.split(cached_k, [k.shape[-1]], axis=-1)  # layers may differ in width
        parts = (cached_k, cached_v, old), (k, v, new)
        kinds = [encoding for encoding, _ in acting]
        mixed, highest = in_parts(q, parts, new, kinds, heads)
        # A layer without one of the encodings keeps its cached features.
        own = {
            name: features.get(name, jax.tree.map(lambda x: x[:, :T], of_cache))
            for name, of_cache in cached["features"].items()
        }
        k = jnp.concatenate([k, jnp.zeros((*k.shape[:-1], excess.shape[-1]), k.dtype)], axis=-1)
        result = {"key": k, "value": v, "features": own}
        if dropped := cached.get("dropped"):
            pairs = encodings.scoring(cache["dropped"] | dropped["features"])
            extents = [extent for _, extent in pairs]
            result["missed"] = dropping.missed(
                q, new, dropped["norms"], extents, highest, kinds, heads, index.max()
            )
        return mixed, result

    x, output, added_layers = model.run(config, params, inputs, attend, cache["layers"])
    logits = after_last(x, output, counts)

    # Padding is written nowhere: it would replace what the row's next tokens see.
    rows, slots = jnp.arange(B)[:, None], jnp.where(added, index % size, size)
    layers = {
        name: cache["layers"][name]
        .at[:, rows, :, slots]
        .set(jnp.moveaxis(added_layers[name], 0, 2), mode="drop")
        for name in ("key", "value")
    }
    layers["features"] = jax.tree.map(
        lambda old, new: old.at[:, rows, slots].set(new, mode="drop"),
        cache["layers"]["features"],
        added_layers["features"],
    )
    result = cache | {
        "layers": layers,
        "coordinates": {
            name: old.at[rows, slots].set(inputs[name], mode="drop")
            for name, old in cache["coordinates"].items()
        },
        "length": length + counts,
    }
    if "dropped" in cache:
        needed = (added_layers["missed"] & added & (length[:, None] > size)).any(axis=(0, 2))
        result["exact"] = cache["exact"] & ~needed
        layers["dropped"], result["dropped"] = _drop(
            cache, prepared, index % size, added & (index >= size)
        )
    return logits, result


def _drop(cache: dict, prepared: dict, slots: jax.Array, dropped: jax.Array) -> tuple[dict, dict]:
    """What is known of dropped tokens, with those in `slots` (B, T) where `dropped` (B, T)."""
    layers, rows = cache["layers"], jnp.arange(len(slots))[:, None]
    known = layers["dropped"]
    norms = skipping.lengths(layers["key"][:, rows, :, slots])  # (B, T, layers, K)
    norms = jnp.where(dropped[..., None, None], norms, 0).max(axis=1, keepdims=True)
    features = {
        name: dropping.widened(
            extent,
            jax.tree.map(lambda x: x[:, rows, slots], layers["features"][name]),
            dropped,
            axis=1,
        )
        for name, extent in known["features"].items()
    }
    of_all = {
        name: dropping.widened(
            extent, jax.tree.map(lambda x: x[rows, slots], prepared[name]), dropped, axis=0
        )
        for name, extent in cache["dropped"].items()
    }
    norms = jnp.maximum(known["norms"], jnp.moveaxis(norms, 2, 0))
    return {"norms": norms, "features": features}, of_all


def _last(features: dict, length) -> dict:
    """The features (B, 1, ...) of each row's last token; zeros for an empty row."""

    def last(leaf):
        rows = jnp.arange(len(length))
        of_last = leaf[rows, jnp.maximum(length - 1, 0) % leaf.shape[1]][:, None]
        exists = (length > 0).reshape(-1, *[1] * (of_last.ndim - 1))
        return jnp.where(exists, of_last, jnp.zeros_like(of_last))

    return jax.tree.map(last, features)


def after_last(x: jax.Array, output: Output, counts: jax.Array) -> jax.Array:
    """Logits (B, V) after the last of each row's `counts` tokens, from hidden states (B, T, D)."""
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    return output.logits(jnp.take_along_axis(x, last, axis=1))[:, 0]


def step(
    config: Plan, params: dict, rule: segments.Rule, cache: dict, tokens: jax.Array
) -> tuple[jax.Array, dict]:
    """Adds one token (B,) to each row; its coordinates follow from the cache's "next".

    Returns:
      Logits (B, V) float32 of the token after it, and the cache.
    """
    coordinates = segments.enter(cache["next"], tokens, rule)
    inputs = {name: array[:, None] for name, array in coordinates.items()}
    counts = jnp.ones_like(tokens)
    logits, added = extend(config, params, cache, inputs | {"tokens": tokens[:, None]}, counts)
    return logits, added | {"next": segments.advance(coordinates, tokens, rule)}
