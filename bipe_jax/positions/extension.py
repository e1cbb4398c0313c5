# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Extension: a trained model's rotary encodings scaled, to reach beyond its training length."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bipe_jax import config as configs
from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions import encodings
from bipe_jax.positions.scaling import NEED_ORIGINAL, SCALINGS


def extend(
    config: Config, spec: str, ran: Mapping[str, float] = MappingProxyType({})
) -> tuple[Any, ...]:
    """The `position.relative` of a trained model with its rotary encodings scaled.

    A scaling that an encoding has already is replaced: the new factor too counts from the training
    without one.

    Args:
      spec: SCALING:FACTOR or SCALING:FACTOR:ORIGINAL, such as "ntk:4", "yarn:8" or "yarn:8:80"; see
        `scaling`.
      ran: how far coordinates ran in training, where `spec` does not say it. `position` is known: it
        ran to `sequence_length`.

    Raises:
      UserError: the spec is malformed, there is no rotary encoding, or it is not known how far the
        coordinate ran in training.
    """
    scaling, factor, original = _parse(spec)
    entries = encodings.parse(config).relative
    turning = encodings.rotary(entries)
    if not turning:
        shown = ", ".join(entry.name for entry in entries) or "nothing"
        raise UserError(
            f"extension {spec!r} scales a rotary encoding, and this model has none: its "
            f"position.relative has {shown}"
        )

    def scaled(entry: encodings.Entry) -> encodings.Entry:
        far = original
        if far is None and scaling in NEED_ORIGINAL:
            if entry.options.get("scaling"):  # the config's lengths are no longer those before it
                far = entry.options.get("original")
            else:
                far = {"position": config.sequence_length, **ran}.get(entry.coordinate)
            if far is None:
                raise UserError(
                    f"extension {spec!r}: how far {entry.coordinate!r} ran before the model was extended "
                    f"is not known: add it, as in {scaling}:{factor:g}:80"
                )
        new = {"scaling": scaling, "factor": factor, "original": far}
        options = {name: v for name, v in (entry.options | new).items() if v is not None}
        return entry._replace(options=options)

    extended = [scaled(entry) if entry in turning else entry for entry in entries]
    relative = encodings.written(extended, config.model.layers)
    encodings.parse(configs.replace(config, {"position.relative": relative}))  # what makes no sense
    return relative


def _parse(spec: str) -> tuple[str, float, float | None]:
    scaling, *numbers = spec.split(":")
    try:
        factor, *original = map(float, numbers)
        if (
            scaling not in SCALINGS
            or len(original) > 1
            or not all(map(math.isfinite, [factor, *original]))
        ):
            raise ValueError
    except ValueError:
        raise UserError(
            f"extension {spec!r} must be SCALING:FACTOR or SCALING:FACTOR:ORIGINAL, such as yarn:8 or "
            f"yarn:8:80, with SCALING one of {', '.join(SCALINGS)}"
        ) from None
    return scaling, factor, original[0] if original else None
