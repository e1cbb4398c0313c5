# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Scalings of rotary frequencies, by which a trained model reaches coordinates beyond its training.

`factor` (s) says how many times further the coordinate is to run than it did in training, `original`
how far it ran there (a number of values: tokens for `position`, segments for `segment`). Each scaling
is a function (frequencies, seen, factor, original) -> (frequencies, magnitude):

- frequencies: (H/2,) float64, theta^(-2i/H) for i = 0 … H/2 - 1, in radians a unit of the coordinate.
- seen: (B, 1, 1, 1) float32, how far the coordinate runs in each row.
- magnitude: what queries and keys are multiplied with.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from bipe_jax.errors import UserError

# The ramp of YaRN (Peng et al. 2023, section 3.2): pairs that turn less than ALPHA times over the
# training length are interpolated, those that turn more than BETA times are left alone.
ALPHA, BETA = 1.0, 32.0


def linear(frequencies: Any, seen: Any, factor: Any, original: Any) -> tuple[Any, float]:
    """Position interpolation (Chen et al. 2023, section 2.3; YaRN's equation 10): coordinate / s."""
    return frequencies / factor, 1.0


def ntk(frequencies: Any, seen: Any, factor: Any, original: Any) -> tuple[Any, float]:
    """NTK-aware (bloc97 2023; Peng et al. 2023, definition 1): theta * s^(H/(H-2)) for theta.

    That multiplies frequency i by s^(-2i/(H-2)): the first stays, the last is divided by s.
    """
    half = len(frequencies)
    return frequencies * factor ** (-np.arange(half) / (half - 1)), 1.0


def dynamic_ntk(frequencies: Any, seen: Any, factor: Any, original: Any) -> tuple[Any, float]:
    """Dynamic NTK (emozilla 2023): NTK-aware with s = factor * seen / original - (factor - 1).

    Each row has its own s, which is 1 up to the original length.
    """
    beyond = jnp.maximum(seen - original, 0) / original  # written so that it is exact up to there
    return ntk(frequencies, seen, 1 + factor * beyond, original)


def yarn(frequencies: Any, seen: Any, factor: Any, original: Any) -> tuple[Any, float]:
    """YaRN (Peng et al. 2023): NTK by parts (definition 2) and a temperature (equation 22).

    h = (1 - gamma) frequency / s + gamma * frequency, where gamma goes from 0 to 1 as the turns over
    the training length, r = original * frequency / (2 pi), go from ALPHA to BETA. The logits are
    multiplied by (0.1 ln s + 1)^2: queries and keys by the root.
    """
    turns = original * frequencies / (2 * math.pi)
    gamma = np.clip((turns - ALPHA) / (BETA - ALPHA), 0, 1)
    return (1 - gamma) * frequencies / factor + gamma * frequencies, 0.1 * math.log(factor) + 1


SCALINGS: dict[str, Callable[..., tuple[Any, float]]] = {
    "linear": linear,
    "ntk": ntk,
    "dynamic-ntk": dynamic_ntk,
    "yarn": yarn,
}
NEED_ORIGINAL = ("dynamic-ntk", "yarn")


def check(scaling: str, factor: float | None, original: float | None, head_width: int) -> None:
    """Raises UserError for options of 'rope' that make no sense together."""
    key = "position.relative: rope"
    if not scaling:
        for name, value in (("factor", factor), ("original", original)):
            if value is not None:
                raise UserError(f"{key} {name}={value:g} needs a scaling: {', '.join(SCALINGS)}")
        return
    if scaling not in SCALINGS:
        raise UserError(f"{key} scaling={scaling!r} is unknown: use one of {', '.join(SCALINGS)}")
    if factor is None:
        raise UserError(f"{key} scaling={scaling!r} needs a factor, such as ('factor', 8.0)")
    if factor < 1:
        raise UserError(f"{key} factor={factor:g} must be at least 1 (1: as in training)")
    if scaling in NEED_ORIGINAL and original is None:
        raise UserError(
            f"{key} scaling={scaling!r} needs 'original', how far the coordinate ran in training"
        )
    if scaling not in NEED_ORIGINAL and original is not None:
        raise UserError(
            f"{key} original={original:g} has no meaning for scaling={scaling!r}: it is for "
            f"{' and '.join(NEED_ORIGINAL)}"
        )
    if original is not None and original <= 0:
        raise UserError(f"{key} original={original:g} must be above 0")
    if scaling in ("ntk", "dynamic-ntk") and head_width < 4:
        raise UserError(
            f"{key} scaling={scaling!r} stretches the pairs of a head unequally, but model.width / "
            f"model.heads = {head_width} has only one"
        )
