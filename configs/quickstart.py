"""A small model, minutes on two CPU cores; --config=configs/quickstart.py:ENCODING for a baseline.

ENCODING is a name in bipe_jax/positions/named.py, such as rope, alibi, t5 or nope.
"""

from bipe_jax.errors import UserError
from bipe_jax.positions import NAMED
from bipe_jax.suggest import did_you_mean

from . import base


def get_config(encoding: str = "bipe_rope"):
    if encoding not in NAMED:
        hint = did_you_mean(encoding, NAMED)
        raise UserError(f"--config=...:{encoding} is unknown{hint}: use one of {', '.join(NAMED)}")
    c = base.get_config()
    c.position.absolute, c.position.relative = NAMED[encoding]
    c.steps = 600
    c.batch_size = 32
    c.sequence_length = 128
    c.loss_chunk = 32  # logits that stay in a CPU's cache
    c.model.layers = 4
    c.model.width = 128
    c.model.heads = c.model.kv_heads = 4
    c.model.feed_forward = 320
    c.model.vocab_size = 4096
    c.model.dtype = "float32"
    c.model.remat = "full"  # on a CPU, quicker than to store and to load
    c.data.shuffle_blocks = 16384  # 2 M tokens: plays are long, and should mix
    c.optimizer.learning_rate = 3e-3
    c.optimizer.beta2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.schedule.name = "cosine"
    c.schedule.warmup_steps = 50
    c.schedule.final_fraction = 0.1
    c.checkpoint.every = 200
    c.evaluation.tokens = 16384
    return c
