"""BiPE-ALiBi: alibi of the segment index, slopes times 96; the rest as in bipe_rope_151m.py."""

from . import bipe_rope_151m


def get_config():
    c = bipe_rope_151m.get_config()
    c.position.absolute = (("learned", "offset", ("size", 1024)),)
    c.position.relative = (("alibi", "segment", ("slope_scale", 96.0)),)
    return c
