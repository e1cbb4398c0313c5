"""A config so small that a test can build it many times, its plan, and a measure of memory."""

import dataclasses
import math
import re

import jax

from bipe_jax import plan
from bipe_jax.positions import NAMED
from bipe_jax.segments import Rule
from configs import base

# The paper's encodings, which tests of whole models run with; positions/test_kinds.py is about all kinds.
ENCODINGS = {
    name: NAMED[name] for name in ("bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope")
}


def tiny(**overrides):
    """A valid config; `tiny(model__heads=2)` sets config.model.heads."""
    c = base.get_config()
    c.steps = 4
    c.batch_size = 4
    c.sequence_length = 16
    c.loss_chunk = 8
    c.model.layers = 2
    c.model.width = 32
    c.model.heads = c.model.kv_heads = 4
    c.model.feed_forward = 48
    c.model.vocab_size = 64
    c.model.dtype = "float32"
    c.schedule.warmup_steps = 1
    c.data.shuffle_blocks = 8
    c.checkpoint.every = 2
    c.log.every = 1
    c.evaluation.lengths = (16, 32)
    c.evaluation.tokens = 256
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return c


def tiny_plan(separators=(1, 2), **overrides) -> plan.Plan:
    """The plan of `tiny(**overrides)`, with these separators unless the rule needs none."""
    made = plan.make(tiny(**overrides))
    return made if made.rule else made.with_rule(Rule(separators))


def overrides(config) -> list[str]:
    """Arguments of a command: the tokenizer and the data of a config, and a short evaluation."""
    values = {
        "tokenizer.path": config.tokenizer.path,
        "data.train": config.data.train,
        "data.evaluation": config.data.evaluation,
        "data.shuffle_blocks": 16,
        "evaluation.lengths": "(32,)",
    }
    return [f"--config.{name}={value}" for name, value in values.items()]


def changed(loaded_model, changes):
    """The loaded model with other values of its config: `changed(model, {"model.dtype": "float32"})`."""
    return dataclasses.replace(loaded_model, config=loaded_model.config.replace(changes))


def largest_array(function, *args) -> int:
    """Number of elements of the largest array that the (differentiated) function computes with."""
    shapes = re.findall(r":[a-z]+\d*\[([\d,]+)\]", str(jax.make_jaxpr(function)(*args)))
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)
