"""BiPE-RoPE at 1.6 B parameters on 300 B tokens, a batch of 1024 blocks of 1024 tokens.

The authors trained a model of this size and batch, whose layers and width are not known here; 24 layers
of width 2304 are this project's choice.
"""

from . import bipe_rope_151m


def get_config():
    c = bipe_rope_151m.get_config()
    c.steps = 286_102  # 300e9 / (1024 * 1024)
    c.batch_size = 1024
    c.model.layers = 24
    c.model.width = 2304
    c.model.heads = c.model.kv_heads = 18
    c.model.feed_forward = 5632
    c.model.remat = "dots"
    c.mesh.fsdp = 8
    c.mesh.topology = "v5e:16x16"
    c.checkpoint.every = 2000
    return c
