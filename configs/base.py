"""The defaults of all fields (docs/reference/config.md), from which the other configs start."""

from bipe_jax.config import defaults as get_config

__all__ = ["get_config"]
