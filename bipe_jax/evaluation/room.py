"""Whether the memory has room for texts of a length, before anything of that size is made."""

import contextlib
import os

import jax

from bipe_jax.errors import UserError
from bipe_jax.evaluation import dropping, loaded
from bipe_jax.plan import Plan

_OF_CONTAINER = "/sys/fs/cgroup/memory.max"
_MOST_TOKENS = 2**30  # of a text; positions, and sizes of a padded text, have 32 bits


def bytes_per_token(config: Plan) -> int:
    """The bytes of the keys and values of one token in all layers, as a cache has them."""
    m = config.model
    width = config.encodings.key_width + m.width // m.heads
    return m.layers * m.kv_heads * width * jax.numpy.dtype(m.dtype).itemsize


def check(loaded_model: loaded.LoadedModel, length: int, kept: int = 0) -> None:
    """Raises UserError if a device cannot hold the keys and values that a text of `length` tokens needs.

    Args:
      kept: the tokens that are not dropped; 0: as many as at first.
    """
    config, memory = loaded_model.config, _device_bytes()
    needed = (kept or dropping.kept_at_first(config, length)) * bytes_per_token(config)
    if length > _MOST_TOKENS or needed > memory:
        raise UserError(
            f"a text of {length:,} tokens needs {needed / 2**30:,.1f} GiB for its keys and values, and "
            f"there are {memory / 2**30:,.1f} GiB: use fewer tokens"
        )


def _device_bytes() -> int:
    """The memory of one device: its own, or the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return limit
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError), open(_OF_CONTAINER, encoding="ascii") as file:
        memory = min(memory, int(file.read()))  # "max" without a limit
    return memory
