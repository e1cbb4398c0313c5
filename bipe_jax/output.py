# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""The output layer: final hidden states -> logits."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The output layer of a model, or one device's part of it. A pytree.

    Attributes:
      kernel: (D, V), in the compute dtype.
      softcap: c, if logits z become c tanh(z / c), as in Gemma 2 (Gemma Team 2024, section 2); 0: they
        stay as they are.
    """

    kernel: jax.Array
    softcap: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the kernel, which hidden states must have."""
        return self.kernel.dtype

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(B, L, D) -> (B, L, V), float32."""
        logits = jnp.einsum("bld,dv->blv", hidden, self.kernel, preferred_element_type=jnp.float32)
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits

    def slope(self, logits: jax.Array) -> jax.Array | float:
        """The derivative of `logits`, as this layer gives them, to those before the cap."""
        return 1 - (logits / self.softcap) ** 2 if self.softcap else 1.0
