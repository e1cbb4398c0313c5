"""The quickstart's encodings: BiPE-RoPE, BiPE-ALiBi, RoPE, ALiBi, sinusoidal and none."""

from configs.quickstart import ENCODINGS
from launch.algebra import sweep, zipit


def get_sweep():
    absolute, relative = zip(*ENCODINGS.values(), strict=True)
    return zipit(sweep("position.absolute", absolute), sweep("position.relative", relative))
