"""Scalings of rope in a Llama's config.json -> options of our kind `rope`."""

from typing import Any

from bipe_jax.convert.values import value
from bipe_jax.errors import UserError

# Theirs -> (ours, whether it needs the length before scaling, what our scaling fixes).
_KINDS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "linear": ("linear", False, {}),
    "dynamic": ("dynamic-ntk", True, {}),
    "yarn": ("yarn-released", True, {
        "beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 1, "mscale_all_dim": 0,
        "attention_factor": None,
    }),
    "llama3": ("llama3", True, {"low_freq_factor": 1, "high_freq_factor": 4}),
    "longrope": ("longrope", True, {"attention_factor": None}),
}  # fmt: skip


def kind_of(theirs: dict, where: str) -> str:
    """The kind of scaling, "default" for none."""
    parameters = parameters_of(theirs, where)
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def parameters_of(theirs: dict, where: str) -> dict:
    """`rope_parameters` (transformers 5), or `rope_scaling` before it."""
    return value(theirs, "rope_parameters", where, dict, {}) or value(
        theirs, "rope_scaling", where, dict, {}
    )


def options_of(theirs: dict, where: str) -> tuple:
    """The options of ("rope", "position", ...), theta included.

    Raises:
      UserError: their scaling is unknown here, or has values that ours does not compute with.
    """
    own = parameters_of(theirs, where)
    parameters = theirs | own
    share = value(parameters, "partial_rotary_factor", where, float, 1.0)
    if share != 1:
        raise UserError(f"{where}: partial_rotary_factor={share!r} is not supported: only 1.0 is")
    theta = ("theta", float(value(parameters, "rope_theta", where, float, 10000.0)))
    kind = kind_of(theirs, where)
    if kind == "default":
        return (theta,)
    if kind not in _KINDS:
        raise UserError(
            f"{where}: rope scaling of the kind {kind!r} is not supported: only "
            f"{', '.join(map(repr, _KINDS))} are"
        )
    ours, needs_original, fixed = _KINDS[kind]
    for key, only in fixed.items():
        if own.get(key, only) not in (only, None):
            raise UserError(
                f"{where}: {key}={own[key]!r} of the rope scaling {kind!r} is not supported: only {only!r} is"
            )
    trained = float(value(theirs, "max_position_embeddings", where))
    original = float(value(parameters, "original_max_position_embeddings", where, float, trained))
    # A config of LongRoPE may leave the factor to the two lengths.
    factor = float(value(own, "factor", where, float, max(trained / original, 1.0)))
    options = [theta, ("scaling", ours), ("factor", factor)]
    if needs_original:
        options.append(("original", original))
    if kind == "longrope":
        for name in ("long", "short"):
            factors = value(own, f"{name}_factor", where, list)
            options.append((name, tuple(factors)))
    return tuple(options)
