"""The base of bipe_jax.experiments retrieval-text and passkey: questions about text, after training on text.

The files of questions are made and set by the experiment.
"""

from typing import Any

from bipe_jax.config import file
from bipe_jax.errors import UserError

SIZES = {"quick": "smoke", "laptop": "quickstart", "paper": "bipe_rope_151m"}


def get_config(size: str = "quick"):
    if size not in SIZES:
        raise UserError(f"--config=...:{size} is unknown: use one of {', '.join(SIZES)}")
    c: Any = file.load(SIZES[size])
    c.steps = {"quick": 20, "laptop": 4000, "paper": 20_000}[size]
    c.batch_size = {"quick": 4, "laptop": 8, "paper": 256}[size]
    # The longest of some thousand questions about 16 lines of the quickstart's text has 520 tokens.
    c.sequence_length = {"quick": 512, "laptop": 640, "paper": 1024}[size]
    c.segments.rule = "newline"  # the number of a line is that of its segment
    c.data.packing = "document"
    c.data.separate_documents = True
    c.optimizer.learning_rate = 1e-4 if size == "paper" else 1e-3
    c.schedule.warmup_steps = c.steps // 20
    c.checkpoint.every = max(c.steps // 2, 10)
    c.checkpoint.keep = 1
    c.log.every = max(c.steps // 100, 5)
    c.evaluation.lengths = (c.sequence_length,)
    return c
