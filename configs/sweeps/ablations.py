"""A learned encoding of the offset or none, times rope, alibi or none of the segment."""

from launch.algebra import product, sweep


def get_sweep():
    intra = [(("learned", "offset"),), ()]
    inter = [(("rope", "segment"),), (("alibi", "segment", ("slope_scale", 96.0)),), ()]
    return product(sweep("position.absolute", intra), sweep("position.relative", inter))
