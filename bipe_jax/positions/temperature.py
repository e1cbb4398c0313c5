# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Temperatures: logits of queries and keys that grow with how much a query sees."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter

_START = 0.168  # about 1 / mean(ln n) for n up to 1024, so that logits begin as they are without

_REFUSED = "would scale by the place in a segment, which does not say how much a query sees"


class SSMax(Relative):
    """Scalable softmax (Nakanishi 2025, equation 3): queries times s ln n, with n = coordinate + 1.

    Of `position`, n is the number of keys that the query sees. Each head of each layer has its own s, which
    starts at 0.168, and with `bias` its own b: s ln n + b. Biases of other encodings are not scaled.
    """

    offsets_refused = _REFUSED
    options = {"bias": bool}
    shared = False

    def __init__(self, config: Config, coordinate: str, key: jax.Array, *, bias: bool = False):
        heads = config.model.heads
        self.s = parameter(jnp.full(heads, _START), P("tensor"))
        self.has_bias = bias
        if bias:
            self.b = parameter(jnp.zeros(heads), P("tensor"))

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: jax.Array | None = None
    ) -> jax.Array:
        """(B, L) integers -> ln n (B, L, 1, 1) float32."""
        return jnp.log1p(coordinate.astype(float))[..., None, None]

    def queries(self, q: jax.Array, features: jax.Array) -> jax.Array:
        scale = self.s[...][:, None] * features
        if self.has_bias:
            scale += self.b[...][:, None]
        return (q * scale).astype(q.dtype)


class Temperature(Relative):
    """Queries times 1 + beta ln(1 + floor((coordinate + first) / unit)), without parameters.

    Llama 4 (the released code) has beta 0.1, unit 8192 and first 1, in its layers without RoPE. Ministral 3
    has first 0, and its original length as unit.
    """

    offsets_refused = _REFUSED
    options = {"beta": float, "unit": float, "first": int}

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        beta: float = 0.1,
        unit: float = 8192.0,
        first: int = 1,
    ):
        self.beta, self.unit, self.first = beta, unit, first

    @staticmethod
    def check(
        config: Config,
        coordinate: str,
        *,
        beta: float = 0.1,
        unit: float = 8192.0,
        first: int = 1,
    ) -> None:
        if unit <= 0:
            raise UserError(f"position.relative: temperature unit={unit:g} must be above 0")
        if first < 0:
            raise UserError(f"position.relative: temperature first={first} must be at least 0")

    def features(
        self, coordinate: jax.Array, x: jax.Array | None = None, before: jax.Array | None = None
    ) -> jax.Array:
        """(B, L) integers -> the factor (B, L, 1, 1) float32."""
        units = jnp.floor((coordinate + self.first).astype(float) / self.unit)
        return 1 + self.beta * jnp.log1p(units)[..., None, None]

    def queries(self, q: jax.Array, features: jax.Array) -> jax.Array:
        return (q * features).astype(q.dtype)
