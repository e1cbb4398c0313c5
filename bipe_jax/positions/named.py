# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Encodings with a name: BiPE's and those that it is compared with."""

from typing import Any

_OFFSET = (("learned", "offset"),)

# Values that are meant for tokens, for segments of some 13 tokens.
_SEGMENTS = 40.0

# Name -> (position.absolute, position.relative).
NAMED: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "bipe_rope": (_OFFSET, (("rope", "segment"),)),
    "bipe_alibi": (_OFFSET, (("alibi", "segment", ("slope_scale", 96.0)),)),
    "rope": ((), (("rope", "position"),)),
    "alibi": ((), (("alibi", "position"),)),
    "sinusoidal": ((("sinusoidal", "position"),), ()),
    "nope": ((), ()),
    "t5": ((), (("t5", "position"),)),
    "bipe_t5": (_OFFSET, (("t5", "segment"),)),
    "kerple_log": ((), (("kerple-log", "position"),)),
    "bipe_kerple_log": (_OFFSET, (("kerple-log", "segment"),)),
    "kerple_power": ((), (("kerple-power", "position"),)),
    "bipe_kerple_power": (_OFFSET, (("kerple-power", "segment"),)),
    "fire": ((), (("fire", "position"),)),
    "bipe_fire": (_OFFSET, (("fire", "segment", ("threshold", _SEGMENTS)),)),
    "xpos": ((), (("xpos", "position"),)),
    "bipe_xpos": (_OFFSET, (("xpos", "segment", ("base", _SEGMENTS)),)),
    "pope": ((), (("pope", "position"),)),
    "bipe_pope": (_OFFSET, (("pope", "segment"),)),
    "fox": ((), (("fox", "position"),)),
    "bipe_fox": (_OFFSET, (("fox", "segment"),)),
    "cope": ((), (("cope", "position"),)),
    "bipe_cope": (_OFFSET, (("cope", "segment"),)),
    "dape": ((), (("dape", "position"),)),
    "bipe_dape": (_OFFSET, (("dape", "segment"),)),
    "rope_ssmax": ((), (("rope", "position"), ("ssmax", "position"))),
    "bipe_rope_ssmax": (_OFFSET, (("rope", "segment"), ("ssmax", "position"))),
}
