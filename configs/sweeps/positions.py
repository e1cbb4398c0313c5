"""All encodings with a name (bipe_jax/positions/named.py)."""

from bipe_jax.positions import NAMED
from launch.algebra import sweep, zipit


def get_sweep():
    absolute, relative = zip(*NAMED.values(), strict=True)
    return zipit(sweep("position.absolute", absolute), sweep("position.relative", relative))
