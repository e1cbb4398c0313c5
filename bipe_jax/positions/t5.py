# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""T5's relative bias: a learned table of distance buckets."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter


def bucket_bounds(buckets: int, distance: int) -> tuple[int, ...]:
    """The first distance of each bucket but the first, in increasing order: (buckets - 1,).

    With B = buckets and M = distance, a distance d is in the bucket d below B/2, and above in
    min(B - 1, B/2 + floor(ln(2d/B) / ln(2M/B) * B/2)) (Raffel et al. 2020, section 2.1, and the
    released code). The bounds are integers, so that a bucket is found by comparisons alone.
    """
    exact = buckets // 2
    # ln(2d/B) / ln(2M/B) * B/2 >= n where d >= B/2 * (2M/B)^(2n/B); computed in integers, since a float
    # may fall on the wrong side: d^(B/2) >= (B/2)^(B/2 - n) * M^n.
    bounds = list(range(1, exact + 1))
    for n in range(1, buckets - exact):
        wanted = exact ** (exact - n) * distance**n
        d = math.floor(exact * (distance / exact) ** (n / exact)) - 1
        while d**exact < wanted:
            d += 1
        bounds.append(d)
    return tuple(bounds)


class T5(Relative):
    """T5's relative bias (Raffel et al. 2020, section 2.1): table[bucket(distance), head].

    Distances up to `buckets` / 2 have a bucket each, larger ones share buckets that grow by a constant
    ratio up to `distance`; what lies further is in the last one. The logits are scaled by 1/sqrt(H),
    which T5's own are not, so the table starts at N(0, init_std).
    """

    offsets_refused = "would put all that lies ahead into one bucket"
    options = {"buckets": int, "distance": int}

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        buckets: int = 32,
        distance: int = 128,
    ):
        shape = (buckets, config.model.heads)
        self.table = parameter(
            config.model.init_std * jax.random.normal(key, shape), P(None, "tensor")
        )
        self.bounds = bucket_bounds(buckets, distance)

    @staticmethod
    def check(config: Config, coordinate: str, *, buckets: int = 32, distance: int = 128) -> None:
        if buckets < 4 or buckets % 2:
            raise UserError(
                f"position.relative: t5 buckets={buckets} must be an even number of at least 4"
            )
        if distance <= buckets // 2:
            raise UserError(
                f"position.relative: t5 distance={distance} must be above buckets / 2 = {buckets // 2}"
            )

    def bias(self, query: jax.Array, key: jax.Array, heads: jax.Array) -> jax.Array:
        """Coordinates (B, L) and (B, S) -> (B, N, L, S) float32."""
        distance = query[:, :, None] - key[:, None, :]
        bounds = jnp.asarray(self.bounds)
        bucket = jnp.searchsorted(bounds, distance, side="right", method="compare_all")
        return jnp.moveaxis(self.table[...][bucket], -1, 1)
