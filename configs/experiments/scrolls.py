"""The base of bipe_jax.experiments scrolls: fine-tuning on its data sets, after training on text.

The size "paper" is the authors' recipe, but that all data sets are learned at once.
"""

from typing import Any

from bipe_jax.config import file
from bipe_jax.errors import UserError

SIZES = {"quick": "smoke", "laptop": "quickstart", "paper": "scrolls_151m"}


def get_config(size: str = "quick"):
    if size not in SIZES:
        raise UserError(f"--config=...:{size} is unknown: use one of {', '.join(SIZES)}")
    c: Any = file.load(SIZES[size])
    if size == "paper":
        c.steps = 35_000  # 5000 for each of 7 data sets
        return c
    c.steps = 20 if size == "quick" else 4000
    c.batch_size = 4 if size == "quick" else 8
    c.sequence_length = 256 if size == "quick" else 640
    c.segments.rule = "newline"
    c.data.packing = "document"
    c.data.separate_documents = True
    c.optimizer.learning_rate = 1e-3
    c.schedule.warmup_steps = c.steps // 20
    c.checkpoint.every = max(c.steps // 2, 10)
    c.checkpoint.keep = 1
    c.log.every = max(c.steps // 100, 5)
    c.evaluation.lengths = (c.sequence_length,)
    return c
