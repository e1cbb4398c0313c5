"""Which block comes when: pure functions of the numbers of blocks, so that there is no state.

The n-th block of a mixture is from the source that `drawn` has more of at n + 1 than at n; and it is
the `permuted` block of that source.
"""

import functools
import hashlib

import numpy as np
from grain.experimental import index_shuffle

from bipe_jax.errors import UserError

_WEIGHTS_SUM = 1 << 24  # times 2^38 blocks fits into 64 bits
_FEW_BLOCKS = 1 << 16


def integer_weights(shares) -> np.ndarray:
    """Shares (S,) of 1 as int64 that sum to 2^24, so that blocks are counted without rounding.

    Raises:
      UserError: a share is too small to be kept.
    """
    ends = np.round(np.cumsum(shares) / np.sum(shares) * _WEIGHTS_SUM).astype(np.int64)
    weights = np.diff(ends, prepend=0)
    if not weights.all():
        raise UserError("config.data.train: a weight is less than a 16-millionth of all weights")
    return weights


def drawn(count, weights: np.ndarray) -> np.ndarray:
    """How many of the first `count` blocks of a mixture are from each source.

    Each source in turn takes its part of what the ones before it have left, rounded up, so that from
    one count to the next exactly one source has one block more.

    Args:
      count: integers (...,). weights: (S,) from `integer_weights`.

    Returns:
      (..., S) int64, which sum to `count`.
    """
    left, rest = np.asarray(count, np.int64), int(weights.sum())
    counts = []
    for weight in weights.tolist():
        less = left * (rest - weight) // rest
        counts.append(left - less)
        left, rest = less, rest - weight
    return np.stack(counts, axis=-1)


@functools.lru_cache(maxsize=64)
def _permutation(blocks: int, key: int) -> np.ndarray:
    return np.random.RandomState(key).permutation(blocks)


def permuted(number: int, blocks: int, seed: int, source: int) -> int:
    """The block that is the `number`-th to be read of a source, over all epochs.

    Every epoch has each of 0 … blocks - 1 once, in another order. The same in all versions: by NumPy's
    legacy generator for few blocks, for which Grain's stateless shuffle would be slow.
    """
    epoch, index = divmod(number, blocks)
    name = f"{seed} {source} {epoch}"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    if blocks <= _FEW_BLOCKS:
        return int(_permutation(blocks, key)[index])
    # Where the largest index is a power of 4, Grain 0.2.18 gives one index twice and another one never.
    # Of one index more, the one too many is passed over by shuffling it again.
    largest = blocks - 1
    largest += largest & (largest - 1) == 0
    while True:
        index = index_shuffle(index, max_index=largest, seed=key, rounds=4)
        if index < blocks:
            return index
