"""The rows of the table: every encoding, the halves of BiPE, and candidates for one that extrapolates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bipe_jax.experiments.experiment import Arm, encodings
from bipe_jax.positions import NAMED

_OFFSET = (("learned", "offset"),)
_ROPE = ("rope", "segment")
_EVEN = ("layers", "0/2")
# What draws and tables reach: about 16 times (quick: 4 times) what a block of training has.
_POSITIONS = {"quick": 1024, "laptop": 2048, "paper": 16384}
_SEGMENTS = {"quick": 64, "laptop": 256, "paper": 2048}
_WINDOW = 4  # segments
_TUNED = 10  # of that many parts of the training, one is done again without the rotation


class Base(NamedTuple):
    """What rows depend on, of the config of a test.

    Attributes:
      pairs: of features of a head. steps: of a training.
    """

    pairs: int
    steps: int


def rows(size: str, base: Base) -> list[Arm]:
    """All rows, as arms; the first is the baseline of differences.

    At the size quick they are few, one of each form.
    """
    if size == "quick":
        few = _others(size, base)
        return [*encodings("bipe_rope"), few["bipe_rope_randomized"], _dropped(base)]
    return [*encodings(*NAMED), *_others(size, base).values(), _dropped(base)]


def _others(size: str, base: Base) -> dict[str, Arm]:
    half, quarter = base.pairs // 2, max(base.pairs // 4, 1)
    entries: dict[str, tuple[Any, Any]] = {
        "learned": ((("learned", "position", ("size", _POSITIONS[size])),), ()),
        "randomized_rope": ((), (("rope", "position"),)),
        "rope_nope_layers": ((), (("rope", "position", _EVEN),)),
        "rope_two_levels": (
            (),
            (("rope", "offset", ("pairs", (0, half))), (*_ROPE, ("pairs", (half, base.pairs)))),
        ),
        "offset_alone": (_OFFSET, ()),
        "segment_rope_alone": ((), (_ROPE,)),
        "segment_alibi_alone": ((), NAMED["bipe_alibi"][1]),
        # Candidates, which nobody has tried.
        "bipe_rope_randomized": (_OFFSET, (_ROPE,)),
        "bipe_rope_partial": (_OFFSET, ((*_ROPE, ("pairs", (0, quarter)), _EVEN),)),
        "bipe_window": (_OFFSET, (("window", "segment", ("size", _WINDOW), _EVEN),)),
        "bipe_rope_window": (
            _OFFSET,
            ((*_ROPE, _EVEN), ("window", "segment", ("size", _WINDOW), _EVEN)),
        ),
        "bipe_fox_nope_layers": (_OFFSET, (("fox", "segment", _EVEN),)),
    }
    draws: Mapping[str, Any] = {
        "randomized_rope": (("randomized", "position", ("maximum", _POSITIONS[size])),),
        "bipe_rope_randomized": (("randomized", "segment", ("maximum", _SEGMENTS[size])),),
    }
    return {
        name: Arm(name, _positions(*of_name) | _draws(draws.get(name)))
        for name, of_name in entries.items()
    }


def _positions(absolute: Any, relative: Any) -> dict[str, Any]:
    return {"position.absolute": absolute, "position.relative": relative}


def _draws(draws: Any) -> dict[str, Any]:
    return {"position.draws": draws} if draws else {}


def _dropped(base: Base) -> Arm:
    """BiPE-RoPE, trained further without the rotation of the segment (DroPE, Gelberg et al. 2025)."""
    steps = max(base.steps // _TUNED, 10)
    changes = {"steps": steps, "schedule.warmup_steps": steps // 10, "checkpoint.every": steps}
    return Arm("bipe_rope_dropped", {**_positions(_OFFSET, ()), **changes}, after="bipe_rope")
