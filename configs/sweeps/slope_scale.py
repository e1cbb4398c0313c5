"""The factor of BiPE-ALiBi's slopes, which is 96 in the authors' code."""

from launch.algebra import product, sweep


def get_sweep():
    scales = (6.0, 12.0, 24.0, 48.0, 96.0, 192.0)
    return product(
        sweep("position.absolute", [(("learned", "offset"),)]),
        sweep("position.relative", [(("alibi", "segment", ("slope_scale", s)),) for s in scales]),
    )
