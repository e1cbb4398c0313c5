"""Decoding with a cache of keys and values that carries the segment state.

Each row of the cache holds the tokens of one text; the coordinates of the next token follow from the
last (`segments.advance`). Prompts of different lengths are added from the left, in pieces of a fixed
size, so that one program serves all prompts up to the cache's length.

Shape letters: B rows, T tokens that are added at a time, S size of the cache, K key/value heads, H head
width, V vocabulary.
"""

import functools
from collections import abc
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bipe_jax import model, segments, sharding
from bipe_jax.attention.chunked import in_parts
from bipe_jax.attention.scoring import Side
from bipe_jax.errors import UserError
from bipe_jax.evaluation import loaded, room
from bipe_jax.evaluation.sampling import Sampling, check_sampling, sample
from bipe_jax.output import Output
from bipe_jax.plan import Plan
from bipe_jax.positions import LayerEncodings

PIECE = 256  # tokens of a prompt that are computed at a time
_SMALLEST = 64  # tokens of the smallest cache
_NEVER = np.iinfo(np.int32).max  # the index of an empty slot: no query comes after it


def bucket(length: int) -> int:
    """The smallest size of a cache for `length` tokens: a power of two, or one and a half of one."""
    size = max(_SMALLEST, 1 << (length - 1).bit_length())
    return size * 3 // 4 if length <= size * 3 // 4 and size > _SMALLEST else size


def empty_cache(config: Plan, rows: int, size: int) -> dict:
    """A cache without tokens.

    Returns:
      "length": (B,) number of tokens. "next": coordinates of the next token as far as they are known
      before it, and states of automata, (B,) int32 each.
      "coordinates": those that encodings that act on logits need, (B, S) int32 each. "layers": "key" and
      "value" (layers, B, K, S, H) in `model.dtype`, keys as attention sees them; and "features" that layers
      computed for such encodings, (layers, B, S, ...).
    """
    m = config.model
    shape = (m.layers, rows, m.kv_heads, size)
    features = config.encodings.features_of_layers(rows, size)
    return {
        "length": jnp.zeros(rows, jnp.int32),
        "next": segments.start((rows,), config.segment_rule),
        "coordinates": {
            name: jnp.zeros((rows, size), jnp.int32)
            for name in config.encodings.scoring_coordinates
        },
        "layers": {
            "key": jnp.zeros((*shape, config.encodings.key_width), m.dtype),
            "value": jnp.zeros((*shape, m.width // m.heads), m.dtype),
            "features": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), features),
        },
    }


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
    cached_index = jnp.where(jnp.arange(size) < length[:, None], jnp.arange(size), _NEVER)
    prepared = model.prepare(config, params, cache["coordinates"])
    heads = jnp.arange(config.model.heads)

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
        mixed = in_parts(q, parts, new, [encoding for encoding, _ in acting], heads)
        # A layer without one of the encodings keeps its cached features.
        own = {
            name: features.get(name, jax.tree.map(lambda x: x[:, :T], of_cache))
            for name, of_cache in cached["features"].items()
        }
        k = jnp.concatenate([k, jnp.zeros((*k.shape[:-1], excess.shape[-1]), k.dtype)], axis=-1)
        return mixed, {"key": k, "value": v, "features": own}

    x, output, added = model.run(config, params, inputs, attend, cache["layers"])
    logits = after_last(x, output, counts)

    # Padding lies after each row's length, where nothing is read before it is written again.
    rows = jnp.arange(B)[:, None]
    layers = {
        name: cache["layers"][name]
        .at[:, rows, :, index]
        .set(jnp.moveaxis(added[name], 0, 2), mode="drop")
        for name in ("key", "value")
    }
    layers["features"] = jax.tree.map(
        lambda old, new: old.at[:, rows, index].set(new, mode="drop"),
        cache["layers"]["features"],
        added["features"],
    )
    coordinates = {
        name: old.at[rows, index].set(inputs[name], mode="drop")
        for name, old in cache["coordinates"].items()
    }
    return logits, cache | {
        "layers": layers,
        "coordinates": coordinates,
        "length": length + counts,
    }


def _last(features: dict, length) -> dict:
    """The features (B, 1, ...) of each row's last token; zeros for an empty row."""

    def last(leaf):
        rows = jnp.arange(len(length))
        of_last = leaf[rows, jnp.maximum(length - 1, 0)][:, None]
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


class Generator:
    """Continues texts with one model, on all devices.

    For each number of rows (a power of two) it compiles one program for prompts of more than PIECE / 2
    tokens, one for each power of two below that, and one for a token at a time.

    Args:
      longest: the largest number of tokens of a prompt with its answer.

    Raises:
      UserError: a learned table of position has fewer rows, or the memory has no room for the cache.
    """

    def __init__(self, loaded_model: loaded.LoadedModel, longest: int):
        config = loaded_model.config
        config.encodings.check_length(longest)
        room.check(loaded_model, longest)
        self._model, self.size = loaded_model, bucket(longest)
        self._longest = longest
        # Otherwise the whole text is recomputed for each token.
        self._cacheable = config.encodings.cacheable
        shapes = jax.eval_shape(lambda: empty_cache(config, 1, self.size))
        cache = {
            name: jax.tree.map(
                lambda _, leading=int(name == "layers"): self._sharding(leading), part
            )
            for name, part in shapes.items()
        }
        # Fixed, so that each call's outputs have the shardings that the next call was compiled for.
        both = (self._sharding(0), cache)
        self._empty = jax.jit(
            functools.partial(empty_cache, config), static_argnums=(0, 1), out_shardings=cache
        )
        self._extend = jax.jit(
            functools.partial(extend, config), donate_argnums=1, out_shardings=both
        )
        self._whole = jax.jit(functools.partial(_whole, config))
        self._step = jax.jit(
            functools.partial(step, config), static_argnums=1, donate_argnums=2, out_shardings=both
        )
        self._sample = jax.jit(
            sample, static_argnums=0, out_shardings=sharding.replicated(loaded_model.mesh)
        )

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008  (immutable)
        stop: frozenset[int] = frozenset(),
        seed: int = 0,
        starts: Sequence[np.ndarray | None] = (),
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt, (at most max_new_tokens,) int32.

        A row ends before the first token in `stop`. The arguments are those of `stream`.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        steps = self.stream(
            prompts, max_new_tokens, sampling=sampling, stop=stop, seed=seed, starts=starts
        )
        for tokens in steps:
            for answer, token in zip(answers, tokens, strict=True):
                if token is not None:
                    answer.append(token)
        return [np.asarray(answer, np.int32) for answer in answers]

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008
        stop: frozenset[int] = frozenset(),
        seed: int = 0,
        starts: Sequence[np.ndarray | None] = (),
    ) -> abc.Generator[list[int | None], None, None]:
        """Yields the next token of every prompt, None for those that have ended, until all have.

        Args:
          prompts: (L,) integers each, of any lengths.
          max_new_tokens: after which a row ends.
          sampling: how tokens are sampled. seed: of the samples, which are independent for each row.
          stop: tokens that end a row, and are not yielded.
          starts: of the prompts' segments, see `segments.coordinates`; (L,) each, or None. By a rule that
            reads the text no segment begins in what is generated.

        Raises:
          UserError: a prompt is empty, has unknown token ids, or does not fit into the cache; a setting
            is out of its range.
        """
        self._check(prompts, max_new_tokens)
        check_sampling(sampling)
        if not 0 <= seed < 1 << 32:  # JAX takes 32 bits of it
            raise UserError(f"seed={seed} must be from 0 to {(1 << 32) - 1}")
        loaded_model = self._model
        shards = sharding.batch_shards(loaded_model.mesh)
        rows = -(-(1 << (len(prompts) - 1).bit_length()) // shards) * shards
        padded = [np.asarray(p, np.int32) for p in prompts]
        padded += [padded[0][:1]] * (rows - len(prompts))
        marks = [np.asarray(s, np.int32) for s in starts if s is not None]
        marks += [s[:1] for s in marks[:1]] * (rows - len(prompts))
        ended = [False] * len(prompts)
        with jax.set_mesh(loaded_model.mesh):
            logits, cache = self._prefill(padded, marks)
        for number in range(max_new_tokens):
            continues = number + 1 < max_new_tokens
            with jax.set_mesh(loaded_model.mesh):
                tokens = self._sample(sampling, logits, np.uint32(seed), number)
                if continues and self._cacheable:
                    # Dispatched before the tokens are read, so that devices never wait.
                    logits, cache = self._step(
                        loaded_model.params, loaded_model.rule, cache, tokens
                    )
            sampled = np.asarray(tokens)
            ended = [e or t in stop for e, t in zip(ended, sampled.tolist(), strict=False)]
            if all(ended):
                return
            yield [None if e else t for e, t in zip(ended, sampled.tolist(), strict=False)]
            if continues and not self._cacheable:
                padded = [np.append(p, t) for p, t in zip(padded, sampled, strict=True)]
                marks = [np.append(s, np.int32(0)) for s in marks]
                with jax.set_mesh(loaded_model.mesh):
                    logits, cache = self._prefill(padded, marks)

    def _check(self, prompts, max_new_tokens: int) -> None:
        if not prompts:
            raise UserError("there is no prompt: give at least one")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        vocab_size = self._model.config.model.vocab_size
        for number, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(f"prompt {number} is empty: the model needs at least one token")
            if len(prompt) + max_new_tokens > self._longest:
                raise UserError(
                    f"prompt {number} has {len(prompt):,} tokens, and with max_new_tokens="
                    f"{max_new_tokens:,} it does not fit into a cache of {self._longest:,}: shorten it, "
                    "or make the cache longer"
                )
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise UserError(f"prompt {number} has token ids outside of 0 … {vocab_size - 1}")

    def _prefill(self, prompts: list[np.ndarray], starts: Sequence[np.ndarray] = ()):
        """Logits (B, V) after each prompt, and a new cache with the prompts."""
        loaded_model = self._model
        longest = max(map(len, prompts))
        piece = min(PIECE, 1 << (longest - 1).bit_length()) if self._cacheable else self.size
        rows, width = len(prompts), -(-longest // piece) * piece
        lengths = np.array([len(p) for p in prompts], np.int32)
        inputs = loaded.padded(prompts, width, loaded_model.rule, starts)
        if not self._cacheable:
            return self._whole(loaded_model.params, loaded_model.shard(inputs), lengths), None
        cache = self._empty(rows, self.size)
        logits = None
        for start in range(0, width, piece):
            part = {name: array[:, start : start + piece] for name, array in inputs.items()}
            counts = np.clip(lengths - start, 0, piece)
            of_part, cache = self._extend(
                loaded_model.params, cache, loaded_model.shard(part), counts
            )
            logits = (
                of_part if logits is None else jnp.where((counts > 0)[:, None], of_part, logits)
            )
        of_last = {
            name: sharding.place(array[:, -1], self._sharding(0)) for name, array in inputs.items()
        }
        tokens = of_last.pop("tokens")
        return logits, cache | {"next": segments.advance(of_last, tokens, loaded_model.rule)}

    def _sharding(self, leading: int) -> NamedSharding:
        """Rows sharded as a batch's are, after `leading` dimensions that are not."""
        return NamedSharding(self._model.mesh, P(*[None] * leading, sharding.BATCH))


def _whole(config, params, inputs, counts):
    """Logits (B, V) after the last of each row's `counts` tokens, without a cache."""
    return after_last(*model.hidden(config, params, inputs), counts)
