# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""xPos: rotary encodings whose pairs decay with the distance."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.kind import Relative, run_on
from bipe_jax.positions.rope import Rope

_LARGEST_EXPONENT = 80.0  # e^80 is a number of float32 and of bfloat16; e^89 is none


class XPos(Relative):
    """xPos (Sun et al. 2022, equation 9): RoPE, and the pair i decays by zeta_i^(distance / base).

    zeta_i = (2i + 0.4 H) / (1.4 H). Queries and keys are turned as by RoPE. Where they meet, both are
    multiplied by powers of zeta that are relative to the middle of the queries, so that chunks of queries
    may lie at any coordinate. `base` is in units of the coordinate; 512 is meant for tokens.
    """

    offsets_refused = "would grow with the distance"
    options = {"theta": float, "base": float}

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        theta: float = 10000.0,
        base: float = 512.0,
    ):
        H = config.model.width // config.model.heads
        self.rope = Rope(config, coordinate, key, theta=theta)
        zeta = (np.arange(0, H, 2) + 0.4 * H) / (1.4 * H)
        self.exponents = tuple((np.tile(np.log(zeta), 2) / base).tolist())
        # Half of the row on each side of its middle must not overflow; drawn rows run further.
        drawn = any(coordinate == name for _, name, *_ in config.position.draws)
        longest = math.floor(2 * _LARGEST_EXPONENT / -min(self.exponents))
        self.longest_in_kernels = 0 if drawn else longest

    @staticmethod
    def check(
        config: Config, coordinate: str, *, theta: float = 10000.0, base: float = 512.0
    ) -> None:
        if base <= 0:
            raise UserError(f"position.relative: xpos base={base:g} must be above 0")
        Rope.check(config, coordinate, theta=theta)

    @staticmethod
    def turns(config: Config, **options: Any) -> frozenset[int]:
        return frozenset(range(config.model.width // config.model.heads))

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: Any = None
    ) -> dict[str, Any]:
        """(B, L) integers -> "angles", as RoPE's features, and "coordinate"."""
        return {"angles": self.rope.features(coordinate), "coordinate": coordinate}

    def queries(self, q: jax.Array, features: Any) -> jax.Array:
        return self.rope.queries(q, features["angles"])

    def keys(self, k: jax.Array, features: Any) -> jax.Array:
        return self.rope.keys(k, features["angles"])

    def factors(self, query: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        """(B, L, 1, H) and (B, S, 1, H) float32."""
        m, n = query["coordinate"], key["coordinate"]
        first, last = m.min(axis=1, keepdims=True), m.max(axis=1, keepdims=True)
        middle = first + (last - first) // 2
        # Keys after all queries are masked, and their powers could be too large.
        n = jnp.minimum(n, last)

        def power(distance: jax.Array) -> jax.Array:
            exponents = jnp.asarray(self.exponents, float)
            return jnp.exp(distance[..., None, None].astype(float) * exponents)

        return power(m - middle), power(middle - n)

    def across_documents(self, features: Any, starts: jax.Array) -> Any:
        return features | {"coordinate": run_on(features["coordinate"], starts)}
