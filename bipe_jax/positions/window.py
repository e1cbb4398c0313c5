# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""A window of a coordinate: keys outside of it are not visible."""

import jax

from bipe_jax.attention.scoring import Extent
from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.kind import Relative


class Window(Relative):
    """A query sees the keys less than `size` back, in units of the coordinate; itself is 0 back.

    Of `position` it is the sliding window of Gemma and Mistral (Child et al. 2019, section 4.2); of
    `segment` a query sees its own segment and the `size` - 1 before it. With `chunked` the coordinate is cut
    at the multiples of `size`, and a query sees the keys of its own chunk (Llama 4, released code).
    """

    offsets_refused = "would hide keys by their place in other segments"
    options = {"size": int, "chunked": bool}

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        size: int = 0,
        chunked: bool = False,
    ):
        self.size, self.chunked = size, chunked

    @staticmethod
    def check(config: Config, coordinate: str, *, size: int = 0, chunked: bool = False) -> None:
        if size < 1:
            raise UserError(
                f"position.relative: window size={size} must be at least 1, as in ('size', 1024)"
            )

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Coordinates (B, L) and (B, S) -> (B, 1, L, S)."""
        if self.chunked:
            query, key = query // self.size, key // self.size
            return query[:, None, :, None] == key[:, None, None, :]
        return query[:, None, :, None] - key[:, None, None, :] < self.size

    def visible_bound(self, query: Extent, key: Extent) -> jax.Array:
        if not self.chunked:
            return self.visible(query.least, key.greatest)
        (first, last), (first_of_keys, last_of_keys) = (
            (side.least // self.size, side.greatest // self.size) for side in (query, key)
        )
        return (first[:, None, :, None] <= last_of_keys[:, None, None, :]) & (
            first_of_keys[:, None, None, :] <= last[:, None, :, None]
        )
