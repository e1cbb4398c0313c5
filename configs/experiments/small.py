"""What the configs of synthetic tasks have in common, at each size of an experiment."""

from bipe_jax.config import defaults
from bipe_jax.errors import UserError

SIZES = ("quick", "laptop", "paper")


def get_config(size: str, steps: int):
    """A small model for a task of words.

    Args:
      size: of the experiment. steps: at the size "laptop"; "quick" has 30, "paper" 40 times as many.
    """
    if size not in SIZES:
        raise UserError(f"--config=...:{size} is unknown: use one of {', '.join(SIZES)}")
    c = defaults()
    c.steps = {"quick": 30, "laptop": steps, "paper": 40 * steps}[size]
    c.batch_size = {"quick": 16, "laptop": 16, "paper": 512}[size]
    c.loss_chunk = 16 if size == "quick" else 128
    c.model.layers = 3 if size == "paper" else 2
    c.model.heads = c.model.kv_heads = 4
    c.model.width = 32 if size == "quick" else 64
    c.model.feed_forward = 4 * c.model.width
    c.model.dtype = "bfloat16" if size == "paper" else "float32"
    c.data.packing = "document"
    c.data.separate_documents = True
    c.data.shuffle_blocks = 1024
    c.optimizer.learning_rate = 1e-3
    c.optimizer.beta2 = 0.98
    c.schedule.name = "cosine"
    c.schedule.warmup_steps = c.steps // 20
    c.schedule.final_fraction = 0.05
    c.checkpoint.every = max(c.steps // 2, 10)
    c.checkpoint.keep = 1
    c.log.every = max(c.steps // 100, 5)
    return c
