"""The config.json of BiPE's authors (github.com/zhenyuhe00/BiPE) -> our config.

Facts from their code: the separators are the ids 13 and 869 for any tokenizer; blocks have `train_scale`
tokens; the intra table has `train_scale` rows, of which offsets use the first 1024; RoPE's base is 10000
for any config; ALiBi's slopes are multiplied by 96 for segments.
"""

from bipe_jax.convert import llama, scalings
from bipe_jax.convert.values import value
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan
from bipe_jax.segments import Rule

# Buffers: ALiBi's biases of their training length, and older rotary frequencies.
IGNORED = rf"model\.layers\.\d+\.self_attn\.alibi|{llama.IGNORED}"
MOST_ROWS = {"model.embeds.0.weight": 1024}

_SEPARATORS = (13, 869)  # "<0x0A>" and "▁." of Llama's tokenizer
_ENCODINGS = {
    "rope": (False, ("rope", "position")),
    "alibi": (False, ("alibi", "position")),
    "bipe_rope": (True, ("rope", "segment")),
    "bipe_alibi": (True, ("alibi", "segment", ("slope_scale", 96.0))),
}


def config_of(theirs: dict, where: str) -> Plan:
    """Our config of one of their models.

    Args:
      theirs: the contents of config.json.
      where: its path, for errors.

    Raises:
      UserError: rpe_type is unknown, or our decoder lacks a feature.
    """
    if "rpe_type" not in theirs:
        raise UserError(
            f"{where} has no rpe_type, so it is not BiPE's authors': for a plain Llama model use "
            "the command from-llama"
        )
    kind = theirs["rpe_type"]
    if not isinstance(kind, str) or kind not in _ENCODINGS:
        raise UserError(
            f"{where}: rpe_type={kind!r} is unknown: use one of {', '.join(_ENCODINGS)}"
        )
    if theirs.get("log_scale"):
        raise UserError(
            f"{where}: log_scale={theirs['log_scale']!r} is not supported: only False is"
        )
    c = llama.decoder(theirs, where)
    if (scaling := scalings.kind_of(theirs, where)) != "default":
        raise UserError(
            f"{where}: rope scaling of the kind {scaling!r} is not supported: only 'default' is"
        )
    c.sequence_length = value(theirs, "train_scale", where)
    bilevel, relative = _ENCODINGS[kind]
    size = min(c.sequence_length, MOST_ROWS["model.embeds.0.weight"])
    c.position.absolute = (("learned", "offset", ("size", size)),) if bilevel else ()
    c.position.relative = (relative,)
    c.segments.rule = "newline-and-spaced-period"
    return llama.complete(c, where, Rule(_SEPARATORS))
