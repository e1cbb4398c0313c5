"""The config.json of a plain Llama model -> our config."""

import math
from typing import Any

from bipe_jax import config as configs
from bipe_jax import plan
from bipe_jax.convert import scalings
from bipe_jax.convert.values import value
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.segments import Rule

# Tensors that are no parameters: a buffer that older versions of transformers saved.
IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
MOST_ROWS: dict[str, int] = {}

# Key -> the values that our decoder supports; the first is the default.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
}


def config_of(theirs: dict, where: str) -> Plan:
    """Our config of a Llama model: rope of position, and the rule "sentence" for fine-tuning.

    Args:
      theirs: the contents of config.json.
      where: its path, for errors.

    Raises:
      UserError: it is of another architecture, or our decoder lacks a feature.
    """
    if "rpe_type" in theirs:
        raise UserError(
            f"{where} has an rpe_type={theirs['rpe_type']!r}, so it is BiPE's authors': "
            "use the command from-authors"
        )
    if theirs.get("model_type") != "llama":
        raise UserError(
            f"{where}: model_type={theirs.get('model_type')!r} is not supported: only 'llama' is"
        )
    c = decoder(theirs, where)
    c.sequence_length = value(theirs, "max_position_embeddings", where)
    c.position.absolute = ()
    c.position.relative = (("rope", "position", *scalings.options_of(theirs, where)),)
    c.segments.rule = "sentence"
    return complete(c, where)


def decoder(theirs: dict, where: str) -> Any:
    """Our config of a Llama-like decoder, without its encodings, length and segment rule."""
    for key, allowed in _ONLY.items():
        if theirs.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{where}: {key}={theirs[key]!r} is not supported: only {allowed[0]!r} is"
            )
    c = configs.defaults()
    m = c.model
    m.width = value(theirs, "hidden_size", where)
    m.layers = value(theirs, "num_hidden_layers", where)
    m.heads = value(theirs, "num_attention_heads", where)
    m.feed_forward = value(theirs, "intermediate_size", where)
    m.vocab_size = value(theirs, "vocab_size", where)
    # The defaults are those of transformers' LlamaConfig.
    m.kv_heads = value(theirs, "num_key_value_heads", where, default=m.heads)
    m.tied_output = value(theirs, "tie_word_embeddings", where, bool, default=False)
    m.norm_epsilon = value(theirs, "rms_norm_eps", where, float, default=1e-6)
    m.init_std = value(theirs, "initializer_range", where, float, default=0.02)
    m.dtype = "float32"  # so that the logits are theirs; a training's config may say otherwise
    head_width = value(theirs, "head_dim", where, default=m.width // max(m.heads, 1))
    if head_width * m.heads != m.width:
        raise UserError(
            f"{where}: head_dim={head_width} is not supported: only hidden_size / "
            f"num_attention_heads = {m.width} / {m.heads} is"
        )
    return c


def complete(c: Any, where: str, rule: Rule | None = None) -> Plan:
    """The plan of a config of ours, with a `loss_chunk` that divides its length.

    Args:
      c: a ConfigDict. where: the source's path, for errors.
      rule: the segment rule, if their code fixes it.

    Raises:
      UserError: a value is invalid, see `plan.of`.
    """
    if c.sequence_length > c.loss_chunk:
        c.loss_chunk = math.gcd(c.loss_chunk, c.sequence_length)
    try:
        return plan.of(configs.parse(c), rule)
    except UserError as error:
        raise UserError(f"{where} makes no config of ours: {error}") from None
