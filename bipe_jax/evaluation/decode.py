"""Decoding with a cache that carries the segment state (`caching`).

Prompts of different lengths are added from the left, in pieces of a fixed size, so that one program serves
all prompts up to a length.

Shape letters: B rows, V vocabulary.
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
from bipe_jax.errors import UserError
from bipe_jax.evaluation import caching, dropping, loaded, room
from bipe_jax.evaluation.sampling import Sampling, check_sampling, sample

PIECE = 256  # tokens of a prompt that are computed at a time


class Generator:
    """Continues texts with one model, on all devices.

    For each number of rows (a power of two) it compiles one program for prompts of more than PIECE / 2
    tokens, one for each power of two below that, and one for a token at a time.

    Where the encodings can prove that distant keys add nothing, the cache begins with few
    tokens and drops those before them. Where the proof fails, it doubles, and the text is read again.

    Args:
      longest: the largest number of tokens of a prompt with its answer.

    Raises:
      UserError: a learned table of position has fewer rows, or the memory has no room for the cache.
    """

    def __init__(self, loaded_model: loaded.LoadedModel, longest: int):
        config = loaded_model.config
        config.encodings.check_length(longest)
        room.check(loaded_model, longest)
        kept = dropping.kept_at_first(config, longest)
        self._model, self._longest = loaded_model, longest
        self.size = caching.bucket(kept)  # of the cache, in tokens
        self._drops = kept < longest
        # Otherwise the whole text is recomputed for each token.
        self._cacheable = config.encodings.cacheable
        shapes = jax.eval_shape(lambda: caching.empty_cache(config, 1, self.size, self._drops))
        cache = {
            name: jax.tree.map(
                lambda _, leading=int(name == "layers"): self._sharding(leading), part
            )
            for name, part in shapes.items()
        }
        # Fixed, so that each call's outputs have the shardings that the next call was compiled for.
        both = (self._sharding(0), cache)
        self._empty = jax.jit(
            functools.partial(caching.empty_cache, config),
            static_argnums=(0, 1, 2),
            out_shardings=cache,
        )
        self._extend = jax.jit(
            functools.partial(caching.extend, config), donate_argnums=1, out_shardings=both
        )
        self._whole = jax.jit(functools.partial(_whole, config))
        self._step = jax.jit(
            functools.partial(caching.step, config),
            static_argnums=1,
            donate_argnums=2,
            out_shardings=both,
        )
        replicated = sharding.replicated(loaded_model.mesh)
        self._sample = jax.jit(sample, static_argnums=0, out_shardings=replicated)
        self._all = jax.jit(jnp.all, out_shardings=replicated)

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
        answers: list[np.ndarray] = []  # (rows,) each
        logits, cache = self._read(padded, marks, answers)
        while (number := len(answers)) < max_new_tokens:
            continues = number + 1 < max_new_tokens
            with jax.set_mesh(loaded_model.mesh):
                tokens = self._sample(sampling, logits, np.uint32(seed), number)
                exact = self._all(cache["exact"]) if self._drops else True
                if continues and self._cacheable:
                    # Dispatched before the tokens are read, so that devices never wait.
                    logits, cache = self._step(
                        loaded_model.params, loaded_model.rule, cache, tokens
                    )
            if not exact:
                self._grow()
                logits, cache = self._read(padded, marks, answers)
                continue
            answers.append(sampled := np.asarray(tokens))
            ended = [e or t in stop for e, t in zip(ended, sampled.tolist(), strict=False)]
            if all(ended):
                return
            yield [None if e else t for e, t in zip(ended, sampled.tolist(), strict=False)]
            if continues and not self._cacheable:
                logits, cache = self._read(padded, marks, answers)

    def _read(self, prompts: list[np.ndarray], starts: list[np.ndarray], answers: list[np.ndarray]):
        """Logits (B, V) after prompts and the answers so far, and a cache with them."""
        added = np.array(answers, np.int32).reshape(len(answers), len(prompts))
        texts = [np.append(p, a) for p, a in zip(prompts, added.T, strict=True)]
        marks = [np.append(s, np.zeros(len(added), np.int32)) for s in starts]
        with jax.set_mesh(self._model.mesh):
            return self._prefill(texts, marks)

    def _grow(self) -> None:
        """Doubles the cache, or makes it whole. Raises UserError: the memory has no room for it."""
        self.size = min(2 * self.size, caching.bucket(self._longest))
        room.check(self._model, self._longest, self.size)

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
        """Logits (B, V) after each prompt, and a new cache with the prompts; {} without one."""
        loaded_model = self._model
        longest = max(map(len, prompts))
        piece = min(PIECE, 1 << (longest - 1).bit_length()) if self._cacheable else self.size
        width = -(-longest // piece) * piece
        lengths = np.array([len(p) for p in prompts], np.int32)
        inputs = loaded.padded(prompts, width, loaded_model.rule, starts)
        if not self._cacheable:
            return self._whole(loaded_model.params, loaded_model.shard(inputs), lengths), {}
        logits, cache = self._fill(inputs, lengths, piece)
        while self._drops and not self._all(cache["exact"]):
            self._grow()
            logits, cache = self._fill(inputs, lengths, piece)
        of_last = {
            name: sharding.place(array[:, -1], self._sharding(0)) for name, array in inputs.items()
        }
        tokens = of_last.pop("tokens")
        return logits, cache | {"next": segments.advance(of_last, tokens, loaded_model.rule)}

    def _fill(self, inputs: dict, lengths: np.ndarray, piece: int):
        """Logits (B, V) after the last of each row's `lengths` tokens, and a new cache with them."""
        cache = self._empty(len(lengths), self.size, self._drops)
        logits = jnp.zeros(())
        for start in range(0, inputs["tokens"].shape[1], piece):
            part = {name: array[:, start : start + piece] for name, array in inputs.items()}
            counts = np.clip(lengths - start, 0, piece)
            of_part, cache = self._extend(
                self._model.params, cache, self._model.shard(part), counts
            )
            logits = jnp.where((counts > 0)[:, None], of_part, logits)
        return logits, cache

    def _sharding(self, leading: int) -> NamedSharding:
        """Rows sharded as a batch's are, after `leading` dimensions that are not."""
        return NamedSharding(self._model.mesh, P(*[None] * leading, sharding.BATCH))


def _whole(config, params, inputs, counts):
    """Logits (B, V) after the last of each row's `counts` tokens, without a cache."""
    return caching.after_last(*model.hidden(config, params, inputs), counts)
