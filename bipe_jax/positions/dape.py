# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""DAPE: a bias that a perceptron adapts to the logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions import perceptron
from bipe_jax.positions.alibi import Alibi
from bipe_jax.positions.fire import Fire
from bipe_jax.positions.kerple import KerpleLog
from bipe_jax.positions.kind import Relative
from bipe_jax.sharding import parameter

BIASES: dict[str, type[Relative]] = {"alibi": Alibi, "kerple-log": KerpleLog, "fire": Fire}


class Dape(Relative):
    """Data-adaptive positional encoding (Zheng et al. 2024, equation 7): A + B + f([A; B]).

    A are the logits of all heads, B the `bias` of a kind with its default options, and f a perceptron 2N ->
    `hidden` -> N (leaky ReLU, slope 0.01) over the logits of a pair of tokens. f starts as PyTorch draws
    linear layers. It mixes the heads, which therefore must not be sharded (mesh.tensor).
    """

    offsets_refused = "has no value for distances below 0"
    options = {"bias": str, "hidden": int}
    shared = False

    def __init__(
        self,
        config: Config,
        coordinate: str,
        key: jax.Array,
        *,
        bias: str = "kerple-log",
        hidden: int = 32,
    ):
        keys, N = jax.random.split(key, 5), config.model.heads
        initial = perceptron.initial
        self.base = BIASES[bias](config, coordinate, keys[0])
        self.first_kernel = parameter(initial(keys[1], (2 * N, hidden), 2 * N), P(None, None))
        self.first_bias = parameter(initial(keys[2], (hidden,), 2 * N), P(None))
        self.second_kernel = parameter(initial(keys[3], (hidden, N), hidden), P(None, None))
        self.second_bias = parameter(initial(keys[4], (N,), hidden), P(None))

    @staticmethod
    def check(
        config: Config, coordinate: str, *, bias: str = "kerple-log", hidden: int = 32
    ) -> None:
        if bias not in BIASES:
            raise UserError(
                f"position.relative: dape bias={bias!r} is unknown: use one of {', '.join(BIASES)}"
            )
        if hidden < 1:
            raise UserError(f"position.relative: dape hidden={hidden} must be at least 1")
        if config.mesh.tensor > 1:
            raise UserError(
                f"position.relative: dape mixes the heads, which mesh.tensor={config.mesh.tensor} shards: "
                "use mesh.tensor=1"
            )

    def logits(
        self,
        logits: jax.Array,
        q: jax.Array,
        query: Any,
        key: Any,
        visible: jax.Array,
        heads: jax.Array,
    ) -> jax.Array:
        """Rows (B, N, L, S) float32 -> the same with the bias and what f makes of both."""
        bias = jnp.broadcast_to(self.base.bias(query, key, heads), logits.shape)
        both = jnp.concatenate([logits, bias.astype(logits.dtype)], axis=1)
        # What is masked may be anything: f must not make a NaN of it.
        both = jnp.where(visible, both, 0)
        first = self.first_kernel[...], self.first_bias[...]
        second = self.second_kernel[...], self.second_bias[...]
        return logits + bias + perceptron.apply(both, first, second, jax.nn.leaky_relu)
