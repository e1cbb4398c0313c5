"""Where the other configs start from: the defaults of all fields, which docs/config.md lists."""

from bipe_jax.config import defaults as get_config

__all__ = ["get_config"]
