"""The base of the experiments on music and code: text with the segments of the data.

--config.data.train names shards that `python -m bipe_jax.modalities` has written.
"""

from typing import Any

from bipe_jax.config import file
from bipe_jax.errors import UserError

SIZES = {"quick": "smoke", "laptop": "quickstart", "paper": "quickstart"}


def get_config(size: str = "quick") -> Any:
    if size not in SIZES:
        raise UserError(f"--config=...:{size} is unknown: use one of {', '.join(SIZES)}")
    c: Any = file.load(SIZES[size])
    c.model.vocab_size = 512
    c.segments.rule = "data"
    c.data.train = "data/music/train-*.jsonl"
    c.data.evaluation = "data/music/held-out.jsonl"
    if size == "paper":
        c.steps = 10_000
        c.batch_size = 64
        c.sequence_length = 512
        c.loss_chunk = 128
        c.model.layers = 8
        c.model.width = 512
        c.model.heads = c.model.kv_heads = 8
        c.model.feed_forward = 1408
        c.model.dropout = 0.1  # there is little music
        c.model.dtype = "bfloat16"
        c.model.remat = "none"
        c.optimizer.learning_rate = 1e-3
        c.schedule.warmup_steps = 500
        c.checkpoint.every = 1000
    set_lengths(c, 4 if size == "quick" else 16)
    return c


def set_lengths(c: Any, most: int) -> None:
    """Evaluates at 1, 2, 4, … `most` times the training length."""
    # Named in full, so that arms of other lengths score the same targets.
    c.evaluation.lengths = tuple(c.sequence_length * 2**i for i in range(most.bit_length()))
