"""RoPE: rope of the position; everything else as in bipe_rope_151m.py."""

from . import bipe_rope_151m


def get_config():
    c = bipe_rope_151m.get_config()
    c.position.absolute = ()
    c.position.relative = (("rope", "position"),)
    return c
