"""A tiny model on the quickstart's text, seconds on a CPU: a check that everything works."""

from . import quickstart


def get_config(encoding: str = "bipe_rope"):
    c = quickstart.get_config(encoding)
    c.steps = 20
    c.batch_size = 8
    c.sequence_length = 32
    c.model.layers = 2
    c.model.width = 32
    c.model.heads = c.model.kv_heads = 2
    c.model.feed_forward = 64
    c.model.vocab_size = 512
    c.tokenizer.train_bytes = 200_000
    c.data.shuffle_blocks = 256
    c.schedule.warmup_steps = 5
    c.checkpoint.every = 10
    c.log.every = 5
    c.evaluation.tokens = 256
    return c
