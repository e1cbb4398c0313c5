# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Scalings of rotary frequencies, by which a trained model reaches coordinates beyond its training.

`factor` (s) says how many times further the coordinate is to run than it did in training, `original`
how far it ran there (a number of values: tokens for `position`, segments for `segment`). Each scaling
is a function (frequencies, seen, options) -> (frequencies, magnitude):

- frequencies: (F,) float64, theta^(-2i/H) for i = 0 … F - 1, in radians a unit of the coordinate.
- seen: (B, 1, 1, 1) float32, how far the coordinate runs in each row.
- magnitude: what queries and keys are multiplied with.

The scalings of `WITHIN` hold for rows that run beyond the original length; it has the frequencies of the
others.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.errors import UserError
from bipe_jax.positions.angles import angles

# The ramp of YaRN (Peng et al. 2023, section 3.2): pairs that turn less than ALPHA times over the
# training length are interpolated, those that turn more than BETA times are left alone.
ALPHA, BETA = 1.0, 32.0
# The ramp of Llama 3.1, in the same unit.
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A scaling with its options, as an entry of 'rope' has them.

    Attributes:
      scaling: one of SCALINGS, or "" for none.
      factor, original: see above.
      long, short: of "longrope", what divides the frequencies of texts beyond the original length, and
        of the others (default: 1).
    """

    scaling: str = ""
    factor: float | None = None
    original: float | None = None
    long: tuple[float, ...] | None = None
    short: tuple[float, ...] | None = None

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change as a text grows."""
        return self.scaling in WITHIN

    def angles(self, coordinate: jax.Array, frequencies: Any, pairs: slice) -> tuple[Any, float]:
        """How far pairs are turned, and the magnitude.

        Args:
          coordinate: (B, L) integers. frequencies: (F,) float64. pairs: those that are wanted.

        Returns:
          (B, L, 1, pairs) float32, see `angles.angles`.
        """
        each, magnitude = coordinate[..., None], 1.0
        seen = coordinate.max(axis=1).astype(float)[:, None, None, None] + 1
        scaled = frequencies
        if self.scaling:
            scaled, magnitude = SCALINGS[self.scaling](frequencies, seen, self)
        turned = angles(each, scaled[..., pairs])
        if self.depends_on_length and self.original is not None:
            within = WITHIN[self.scaling](frequencies, self)
            turned = jnp.where(seen > self.original, turned, angles(each, within[pairs]))
        return turned, magnitude


def linear(frequencies: Any, seen: Any, options: Any) -> tuple[Any, Any]:
    """Position interpolation (Chen et al. 2023, section 2.3; YaRN's equation 10): coordinate / s."""
    return frequencies / options.factor, 1.0


def ntk(frequencies: Any, seen: Any, options: Any) -> tuple[Any, Any]:
    """NTK-aware (bloc97 2023; Peng et al. 2023, definition 1): theta * s^(H/(H-2)) for theta.

    That multiplies frequency i by s^(-2i/(H-2)): the first stays, the last is divided by s.
    """
    return _ntk(frequencies, options.factor), 1.0


def _ntk(frequencies: Any, factor: Any) -> Any:
    half = len(frequencies)
    return frequencies * factor ** (-np.arange(half) / (half - 1))


def dynamic_ntk(frequencies: Any, seen: Any, options: Any) -> tuple[Any, Any]:
    """Dynamic NTK (emozilla 2023): NTK-aware with s = factor * seen / original - (factor - 1).

    Each row has its own s, which is 1 up to the original length.
    """
    beyond = jnp.maximum(seen - options.original, 0) / options.original
    return _ntk(frequencies, 1 + options.factor * beyond), 1.0


def yarn(frequencies: Any, seen: Any, options: Any) -> tuple[Any, Any]:
    """YaRN (Peng et al. 2023): NTK by parts (definition 2) and a temperature (equation 22).

    h = (1 - gamma) frequency / s + gamma * frequency, where gamma goes from 0 to 1 as the turns over
    the training length, r = original * frequency / (2 pi), go from ALPHA to BETA. The logits are
    multiplied by (0.1 ln s + 1)^2: queries and keys by the root.
    """
    turns = options.original * frequencies / (2 * math.pi)
    gamma = np.clip((turns - ALPHA) / (BETA - ALPHA), 0, 1)
    return _yarn(frequencies, gamma, options.factor)


def yarn_released(frequencies: Any, seen: Any, options: Any) -> tuple[Any, Any]:
    """YaRN as its authors' code and transformers compute it, which published numbers are of.

    gamma goes from 1 to 0 linearly in the number of the pair, from the pair that turns BETA times over the
    training length, rounded down, to the one that turns once, rounded up.
    """
    half = len(frequencies)
    ratio = np.log(frequencies[0] / frequencies[1]) if half > 1 else 1.0

    def pair(turns: float) -> float:  # as a real number
        return math.log(options.original / (turns * 2 * math.pi)) / ratio

    low = max(math.floor(pair(BETA)), 0)
    high = min(math.ceil(pair(ALPHA)), 2 * half - 1)
    ramp = (np.arange(half) - low) / (high - low if high > low else 0.001)
    return _yarn(frequencies, 1 - np.clip(ramp, 0, 1), options.factor)


def _yarn(frequencies: Any, gamma: Any, factor: float) -> tuple[Any, Any]:
    return (1 - gamma) * frequencies / factor + gamma * frequencies, 0.1 * math.log(factor) + 1


def llama3(frequencies: Any, seen: Any, options: Any) -> tuple[Any, Any]:
    """The scaling of Llama 3.1 (the released code).

    A frequency that turns at most once over the original length is divided by s, one that turns 4 times or
    more stays, and between them the two are mixed linearly in the number of turns.
    """
    turns = options.original * frequencies / (2 * math.pi)
    kept = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
    return (1 - kept) * frequencies / options.factor + kept * frequencies, 1.0


def longrope(frequencies: Any, seen: Any, options: Any) -> tuple[Any, Any]:
    """LongRoPE (Ding et al. 2024, equation 3, as released with Phi-3): frequencies over searched factors.

    Rows beyond the original length have the factors `long`, the others `short`. All queries and keys are
    multiplied by sqrt(1 + ln s / ln original).
    """
    magnitude = math.sqrt(1 + math.log(options.factor) / math.log(options.original))
    return frequencies / np.asarray(options.long), magnitude


SCALINGS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "linear": linear,
    "ntk": ntk,
    "dynamic-ntk": dynamic_ntk,
    "yarn": yarn,
    "yarn-released": yarn_released,
    "llama3": llama3,
    "longrope": longrope,
}
WITHIN: dict[str, Callable[..., Any]] = {
    "dynamic-ntk": lambda frequencies, options: frequencies,
    "longrope": lambda frequencies, options: frequencies / np.asarray(options.short or 1.0),
}
NEED_ORIGINAL = ("dynamic-ntk", "yarn", "yarn-released", "llama3", "longrope")
# What a factor and an original length do not suffice for.
NEED_FACTORS = ("longrope",)


def check(options: Scaling, width: int) -> None:
    """Raises UserError for options of 'rope' that make no sense together; `width`: features turned."""
    key = "position.relative: rope"
    scaling, factor, original = options.scaling, options.factor, options.original
    if not scaling:
        for name in ("factor", "original", "long", "short"):
            if (value := getattr(options, name)) is not None:
                shown = f"{value:g}" if isinstance(value, float) else value
                raise UserError(f"{key} {name}={shown} needs a scaling: {', '.join(SCALINGS)}")
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
            f"{', '.join(NEED_ORIGINAL)}"
        )
    least = 1 if scaling == "longrope" else 0  # by whose logarithm it divides
    if original is not None and original <= least:
        raise UserError(f"{key} original={original:g} must be above {least}")
    if scaling in ("ntk", "dynamic-ntk") and width < 4:
        raise UserError(
            f"{key} scaling={scaling!r} stretches pairs unequally, and {width} features have only one"
        )
    for name in ("long", "short"):
        factors = getattr(options, name)
        if scaling not in NEED_FACTORS:
            if factors is not None:
                raise UserError(f"{key} {name}={factors} is for scaling='longrope'")
        elif factors is None:
            if name == "long":
                raise UserError(f"{key} scaling='longrope' needs 'long', a factor for each pair")
        elif len(factors) != width // 2 or min(factors) <= 0:
            raise UserError(
                f"{key} {name}={factors} must be {width // 2} numbers above 0, one for each pair"
            )
