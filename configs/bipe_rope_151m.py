"""BiPE-RoPE with the authors' model and recipe: 163.2 M parameters, 151M in their README.

A learned table of 1024 offsets, RoPE of the segment index, 1024 tokens. The tokenizer is Llama's or any
other SentencePiece model of 32000 pieces; the data are shards of the Pile:

python -m bipe_jax.train --config=configs/bipe_rope_151m.py --workdir=runs/bipe_rope_151m \\
  --config.tokenizer.path=tokenizer.model --config.data.train='pile/train/*.jsonl.zst' \\
  --config.data.evaluation='pile/test.jsonl.zst'
"""

from . import base


def get_config():
    c = base.get_config()  # the authors' model: 12 layers, width 768, SwiGLU 3072, no tying
    c.steps = 1_000_000
    c.batch_size = 256  # 32 a device on 8 devices
    c.sequence_length = 1024
    c.position.absolute = (("learned", "offset", ("size", 1024)),)
    c.position.relative = (("rope", "segment"),)
    c.model.remat = "dots"
    c.mesh.topology = "v5e:4x4"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.weight_decay = 0.01
    c.schedule.name = "linear"
    c.schedule.warmup_steps = 10_000
    c.checkpoint.every = 10_000
    c.log.every = 100
    c.data.train = "pile/train/*.jsonl.zst"
    c.data.evaluation = "pile/test.jsonl.zst"
    c.evaluation.lengths = (1024, 2048, 3072, 4096, 5120, 6144)  # the authors'
    return c
