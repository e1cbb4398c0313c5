# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Positional encodings. An encoding is a *kind* applied to a *coordinate*.

A config names encodings in two lists of entries (kind, coordinate, (option, value), ...):

    config.position.absolute = (("learned", "offset"),)
    config.position.relative = (("alibi", "segment", ("slope_scale", 96.0)),)

- `kind`: the base classes `Absolute` and `Relative`, whose methods are all that a kind can do.
- `registry`: the kinds by name, and the parsing of entries. To add a kind, write one class in one file and
  enter it there.
- `encodings`: `Encodings`, all of a model, and `LayerEncodings`, those of one layer. Model, decoding and
  analysis call these, and none of them knows a kind.
- `draws`: coordinates that are drawn in training.
- `named`: encodings with a name, such as "bipe_rope".
- `attending`: `attend`, one layer's attention under any encodings, for arrays.

A relative entry may have two more options, whatever its kind: ("layers", "3/4") for the layers whose number
(from 0) has the remainder 3 by 4, or ("layers", "0,5") for those two; and ("shared", False) for parameters
of each layer's own, where the kind's default is one set for all layers, or the other way round.
"""

from bipe_jax.positions.attending import attend
from bipe_jax.positions.encodings import Encodings, LayerEncodings, parse
from bipe_jax.positions.extension import extend
from bipe_jax.positions.named import NAMED

__all__ = ["NAMED", "Encodings", "LayerEncodings", "attend", "extend", "parse"]
