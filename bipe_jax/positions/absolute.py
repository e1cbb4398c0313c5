# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Absolute encodings: vectors of the model's width that are added to the token embedding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bipe_jax import segments
from bipe_jax.collectives import look_up
from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.kind import Absolute
from bipe_jax.sharding import parameter


class Learned(Absolute):
    """A learned table with one row for each value of a bounded coordinate.

    Values past the last row use the last row (BiPE's intra-segment table, He et al. 2024: 1024 rows).
    `size` is the number of rows, by default the training length.
    """

    options = {"size": int}

    def __init__(self, config: Config, coordinate: str, key: jax.Array, *, size: int | None = None):
        shape = (size or config.sequence_length, config.model.width)
        self.table = parameter(
            config.model.init_std * jax.random.normal(key, shape), P(None, "fsdp")
        )
        self.dtype = config.model.dtype

    @staticmethod
    def check(config: Config, coordinate: str, *, size: int | None = None) -> None:
        if coordinate != "position" and not segments.restarts(coordinate):
            raise UserError(
                f"position.absolute: ('learned', {coordinate!r}) needs a table as long as the number of "
                f"segments, which has no bound: use 'sinusoidal', or a relative encoding of {coordinate!r}"
            )
        if size is not None and size < 1:
            raise UserError(f"position.absolute: learned size={size} must be at least 1")
        if coordinate == "position" and size is not None and size < config.sequence_length:
            raise UserError(
                f"position.absolute: the learned table of position has size={size} rows, fewer than "
                f"sequence_length={config.sequence_length}"
            )

    def __call__(self, coordinate: jax.Array) -> jax.Array:
        """(B, L) integers -> (B, L, D) float32."""
        rows = jnp.minimum(coordinate, self.table.shape[0] - 1)
        return look_up(self.table, rows, self.dtype)

    @staticmethod
    def longest(config: Config, coordinate: str, *, size: int | None = None) -> int | None:
        return (size or config.sequence_length) if coordinate == "position" else None


class Sinusoidal(Absolute):
    """Sines in the first half, cosines in the second (Vaswani et al. 2017, section 3.5).

    Angles are coordinate * theta^(-2i/D), in float32. The vectors are scaled by `scale` (default:
    the standard deviation of the token embeddings at the start), so that they do not drown those.
    """

    options = {"theta": float, "scale": float}

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        theta: float = 10000.0,
        scale: float | None = None,
    ):
        self.width = config.model.width
        self.theta = theta
        self.scale = config.model.init_std if scale is None else scale

    @staticmethod
    def check(
        config: Config, coordinate: str, *, theta: float = 10000.0, scale: float | None = None
    ) -> None:
        if theta <= 1:
            raise UserError(f"position.absolute: sinusoidal theta={theta} must be above 1")
        if config.model.width % 2:
            raise UserError(f"model.width={config.model.width} must be even for 'sinusoidal'")

    def __call__(self, coordinate: jax.Array) -> jax.Array:
        """(B, L) integers -> (B, L, D) float32."""
        exponents = -np.arange(0, self.width, 2) / self.width
        frequencies = jnp.asarray(np.float64(self.theta) ** exponents, jnp.float32)
        angles = coordinate[..., None].astype(jnp.float32) * frequencies
        return self.scale * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
