"""Where the other configs start from: bipe_jax/defaults.py, which has every field and its meaning."""

from bipe_jax.defaults import get_config

__all__ = ["get_config"]
