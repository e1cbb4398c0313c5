# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Rotary encodings: queries and keys are turned by angles that grow with a coordinate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions import scaling as scalings
from bipe_jax.positions.kind import Relative

SPECTRA = ("head", "own")


class Rope(Relative):
    """Rotary position embedding (Su et al. 2021, equation 34), rotate-half convention of Llama.

    The pair i of a head is turned by coordinate * frequency i. Angles are exact (see `angles`), sines and
    cosines are float32 whatever the model computes in. With `scaling` the frequencies are those of
    one of `scaling.SCALINGS`; `factor`, `original`, `long` and `short` are explained there.

    `pairs` (from, to) turns only those pairs of the head's H/2, from the first to the one before the last:

    - spectrum "head": pair i are the features (i, i + H/2), at theta^(-2i/H), as without `pairs`.
    - spectrum "own": `pairs` is (0, R/2), and only the first R features are turned, as a head of R of them
      would be (GPT-NeoX): pair i are the features (i, i + R/2), at theta^(-2i/R).
    """

    options = {
        "theta": float,
        "pairs": tuple,
        "spectrum": str,
        "scaling": str,
        "factor": float,
        "original": float,
        "long": tuple,
        "short": tuple,
    }

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        theta: float = 10000.0,
        pairs: tuple[float, ...] | None = None,
        spectrum: str = "head",
        **scaling: Any,
    ):
        H = config.model.width // config.model.heads
        first, last = map(int, pairs or (0, H // 2))
        self.width_turned = 2 * last if spectrum == "own" else H
        self.turned = first, last
        exponents = -np.arange(0, self.width_turned, 2) / self.width_turned
        self.frequencies = tuple((np.float64(theta) ** exponents).tolist())
        self.scaling = scalings.Scaling(**scaling)

    @staticmethod
    def check(
        config: Config,
        coordinate: str,
        *,
        theta: float = 10000.0,
        pairs: tuple[float, ...] | None = None,
        spectrum: str = "head",
        **scaling: Any,
    ) -> None:
        if theta <= 1:
            raise UserError(f"position.relative: rope theta={theta} must be above 1")
        H = config.model.width // config.model.heads
        if H % 2:
            raise UserError(
                f"position.relative: rope turns pairs, but model.width / model.heads = {H} is odd"
            )
        if spectrum not in SPECTRA:
            raise UserError(
                f"position.relative: rope spectrum={spectrum!r} is unknown: use one of "
                f"{', '.join(SPECTRA)}"
            )
        if pairs is not None:
            whole = len(pairs) == 2 and all(x == int(x) for x in pairs)
            if not whole or not 0 <= pairs[0] < pairs[1] <= H // 2:
                raise UserError(
                    f"position.relative: rope pairs={pairs} must be (from, to) with 0 <= from < to <= "
                    f"{H // 2}, the pairs of a head"
                )
            if spectrum == "own" and pairs[0]:
                raise UserError(
                    f"position.relative: rope pairs={pairs} must begin at 0 with spectrum='own', which "
                    "turns the first features of a head"
                )
        width = 2 * int(pairs[1]) if pairs and spectrum == "own" else H
        scalings.check(scalings.Scaling(**scaling), width)

    @staticmethod
    def turns(
        config: Config,
        *,
        pairs: tuple[float, ...] | None = None,
        spectrum: str = "head",
        **others: Any,
    ) -> frozenset[int]:
        half = config.model.width // config.model.heads // 2
        first, last = map(int, pairs or (0, half))
        distance = last if spectrum == "own" else half
        return frozenset(i + d for i in range(first, last) for d in (0, distance))

    @property
    def cacheable(self) -> bool:
        """Not with a scaling that depends on how far the text runs."""
        return not self.scaling.depends_on_length

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """(B, L) integers -> cosines and sines, times the magnitude: (B, L, 1, pairs) float32."""
        frequencies, pairs = np.array(self.frequencies), slice(*self.turned)
        turned, magnitude = self.scaling.angles(coordinate, frequencies, pairs)
        return magnitude * jnp.cos(turned), magnitude * jnp.sin(turned)

    def queries(self, q: jax.Array, features: tuple[jax.Array, jax.Array]) -> jax.Array:
        return self._turn(q, *features)

    def keys(self, k: jax.Array, features: tuple[jax.Array, jax.Array]) -> jax.Array:
        return self._turn(k, *features)

    def _turn(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Turns pairs of (B, L, N, H); computed in float32, returned in x's dtype."""
        (start, stop), half = self.turned, self.width_turned // 2
        cuts = [start, stop, half, half + start, half + stop]
        between = jnp.split(x, cuts, axis=-1)
        first, second = between[1].astype(cos.dtype), between[4].astype(cos.dtype)
        between[1] = (first * cos - second * sin).astype(x.dtype)
        between[4] = (second * cos + first * sin).astype(x.dtype)
        return jnp.concatenate([part for part in between if part.shape[-1]], axis=-1)
