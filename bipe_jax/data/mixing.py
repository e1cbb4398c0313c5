"""The order of prepared blocks: pure functions of block numbers, without state.

Block n of a mixture comes from the source whose `source_counts` grows from n to n + 1. It is the
`permuted` block of that source.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from bipe_jax.errors import UserError

_WEIGHTS_SUM = 1 << 24  # times 2^38 blocks fits into 64 bits
_FEW_BLOCKS = 1 << 16
_32_BITS = (1 << 32) - 1


def integer_weights(shares: Sequence[float]) -> np.ndarray:
    """Shares (S,) as int64 weights that sum to 2^24, so that counts of blocks are exact.

    Raises:
      UserError: a share is so small that its weight is 0.
    """
    ends = np.round(np.cumsum(shares) / np.sum(shares) * _WEIGHTS_SUM).astype(np.int64)
    weights = np.diff(ends, prepend=0)
    if not weights.all():
        raise UserError("config.data.train: a weight is less than a 16-millionth of all weights")
    return weights


def source_counts(count: np.ndarray | int, weights: np.ndarray) -> np.ndarray:
    """The number of blocks of each source among the first `count` blocks of a mixture.

    Each source in turn takes its part, rounded up, of the blocks that the sources before it leave. From
    one count to the next exactly one source therefore has one block more.

    Args:
      count: integers (...,). weights: (S,) from `integer_weights`.

    Returns:
      (..., S) int64, which sum to `count`.
    """
    blocks, rest = np.asarray(count, np.int64), int(weights.sum())
    counts = []
    for weight in weights.tolist():
        left = blocks * (rest - weight) // rest
        counts.append(blocks - left)
        blocks, rest = left, rest - weight
    return np.stack(counts, axis=-1)


@functools.lru_cache(maxsize=64)
def _permutation(blocks: int, key: int) -> np.ndarray:
    return np.random.RandomState(key).permutation(blocks)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int) -> tuple[int, ...]:
    """Four 32-bit numbers: `std::seed_seq{seed}.generate` of the C++ standard, [rand.util.seedseq]."""
    keys = [0x8B8B8B8B] * 4
    for k, constant in enumerate((1, 1 + seed, 2, 3)):
        x = keys[k] ^ keys[(k + 1) % 4] ^ keys[k - 1]
        x = 1664525 * (x ^ x >> 27)
        keys[k] = x + constant
        keys[(k + 1) % 4] += x
        keys[(k + 2) % 4] += x + constant
        keys = [key & _32_BITS for key in keys]
    for k in range(4):
        x = keys[k] + keys[(k + 1) % 4] + keys[k - 1] & _32_BITS
        x = 1566083941 * (x ^ x >> 27)
        keys[k] = x - k & _32_BITS
        keys[(k + 1) % 4] ^= x & _32_BITS
        keys[(k + 2) % 4] ^= x - k & _32_BITS
    return tuple(keys)


def _index_shuffle(index: int, count: int, seed: int) -> int:
    """The image of an index in a pseudorandom permutation of 0 … count - 1, for counts above 2^16.

    Four rounds of the block cipher Simon (Beaulieu et al. 2013, eprint 2013/404) over the smallest even
    number of bits, repeated until the value is in the range (cycle walking; Black and Rogaway 2002).
    Equals `grain.experimental.index_shuffle(index, max_index=count - 1, seed=seed, rounds=4)`, except
    where count - 1 is a power of 4: Grain 0.2.18 returns no permutation there.
    """
    width = ((count - 1).bit_length() + 1) // 2  # bits of half a value
    mask = (1 << width) - 1
    keys = _round_keys(seed)

    def mixed(x: int) -> int:
        xx = x << width | x  # a rotation to the left by n is the upper half of xx << n
        return ((xx << 1 & xx << 8 ^ xx << 2) >> width) & mask

    while True:
        left, right = index >> width, index & mask
        for even, odd in (keys[:2], keys[2:]):
            left ^= mixed(right) ^ even & mask
            right ^= mixed(left) ^ odd & mask
        index = left << width | right
        if index < count:
            return index


def permuted(number: int, blocks: int, seed: int, source: int) -> int:
    """The block that is read at position `number` of a source, counted over all epochs.

    Every epoch contains each of 0 … blocks - 1 once, in its own order. The order is part of the format:
    a run that resumes depends on it. Up to 2^16 blocks it is NumPy's legacy permutation.
    """
    epoch, index = divmod(number, blocks)
    name = f"{seed} {source} {epoch}"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    if blocks <= _FEW_BLOCKS:
        return int(_permutation(blocks, key)[index])
    return _index_shuffle(index, blocks, key)
