# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Encodings with a name: BiPE's and those that it is compared with."""

from typing import Any

# Name -> (position.absolute, position.relative).
NAMED: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "bipe_rope": ((("learned", "offset"),), (("rope", "segment"),)),
    "bipe_alibi": ((("learned", "offset"),), (("alibi", "segment", ("slope_scale", 96.0)),)),
    "rope": ((), (("rope", "position"),)),
    "alibi": ((), (("alibi", "position"),)),
    "sinusoidal": ((("sinusoidal", "position"),), ()),
    "nope": ((), ()),
    "t5": ((), (("t5", "position"),)),
    "bipe_t5": ((("learned", "offset"),), (("t5", "segment"),)),
    "kerple_log": ((), (("kerple-log", "position"),)),
    "bipe_kerple_log": ((("learned", "offset"),), (("kerple-log", "segment"),)),
}
