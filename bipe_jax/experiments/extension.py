"""Extending rotary encodings beyond their training: scalings with and without fine-tuning, and DroPE."""

from collections.abc import Mapping
from typing import Any

from bipe_jax.experiments import text
from bipe_jax.experiments.experiment import Arm, Cell, Evaluation, Prediction

_FACTOR = 16  # of all scalings, as in the authors' scripts
_LONGER = 4  # times the training length: of fine-tuning
_SCALINGS = ("linear", "ntk", "dynamic-ntk", "yarn", "yarn-released")
_WITHOUT_ORIGINAL = ("linear", "ntk")
_STEPS = {"quick": 10, "laptop": 60, "paper": 500}  # of fine-tuning
# Mean segments in blocks of the training length, which a scaling of the segment is relative to.
_SEGMENTS = {"quick": 4.0, "laptop": 12.0, "paper": 80.0}
_BATCHES = {"quick": 8, "laptop": 32, "paper": 256}  # of the base configs, in blocks


def _arms(size: str) -> list[Arm]:
    """For RoPE of positions and of segments: as trained, scaled, fine-tuned, and dropped."""
    scalings, bases = _SCALINGS, {"rope": "position", "bipe_rope": "segment"}
    if size == "quick":
        scalings, bases = ("yarn",), {"bipe_rope": "segment"}
    arms: list[Arm] = []
    for name, coordinate in bases.items():
        offset = (("learned", "offset", ("size", text.LENGTHS[size])),)
        absolute = offset if coordinate == "segment" else ()
        rope = ("rope", coordinate)
        arms.append(
            Arm(name, {"position.absolute": absolute, "position.relative": (rope,)})
        )  # fmt: skip
        arms += [_evaluated(name, scaling) for scaling in scalings]
        tuned: dict[str, tuple[Any, ...]] = {
            f"{name}, fine-tuned": rope,
            **{
                f"{name}, {scaling}, fine-tuned": (*rope, *_scaled(size, scaling, coordinate))
                for scaling in scalings
            },
        }
        arms += [
            Arm(of, _fine_tuning(size, absolute, (entry,), _LONGER), after=name)
            for of, entry in tuned.items()
        ]
        arms.append(Arm(f"{name}, dropped", _fine_tuning(size, absolute, (), 1), after=name))
    return arms


def _evaluated(name: str, scaling: str) -> Arm:
    evaluation = Evaluation("scaled", "bipe_jax.evaluate", (f"--extend={scaling}:{_FACTOR}",))
    return Arm(f"{name}, {scaling}", after=name, evaluations=(evaluation,), trained=False)


def _scaled(size: str, scaling: str, coordinate: str) -> tuple[tuple[str, Any], ...]:
    """The options of an entry that scales."""
    original = float(text.LENGTHS[size]) if coordinate == "position" else _SEGMENTS[size]
    options = (("scaling", scaling), ("factor", float(_FACTOR)))
    return options if scaling in _WITHOUT_ORIGINAL else (*options, ("original", original))


def _fine_tuning(
    size: str, absolute: tuple[Any, ...], relative: tuple[Any, ...], longer: int
) -> dict[str, Any]:
    """The config's changes for a short training on blocks that are so many times longer."""
    return {
        "position.absolute": absolute,
        "position.relative": relative,
        "sequence_length": longer * text.LENGTHS[size],
        "batch_size": _BATCHES[size] // longer,
        "steps": _STEPS[size],
        "schedule.warmup_steps": _STEPS[size] // 10,
        "checkpoint.every": _STEPS[size],
    }


def _cells(files: Mapping[str, Any]) -> list[Cell]:
    name = "evaluation.json" if "evaluation.json" in files else "scaled/evaluation.json"
    return text.cells(files, name)


EXTENSION = text.experiment(
    "extension",
    "Which scaling of a rotation, of positions or of segments, reads further than the training did?",
    "Models of RoPE and BiPE-RoPE are evaluated with scalings by 16, as trained, and after a short training "
    "on blocks that are 4 times longer (in the paper's scripts 500 steps); fine-tuned without a scaling, and "
    "with the rotation dropped at the first length (DroPE), are the controls. All score the same tokens.",
    arms=_arms,
    cells=_cells,
    predictions=(
        Prediction(
            "At the longest length NTK-aware scaling without fine-tuning lowers RoPE's loss.",
            "the method's own claim",
            text.lead("rope, ntk", "rope", 0.0),
        ),
        Prediction(
            "At the longest length fine-tuned YaRN is better on segments than on positions.",
            "the paper combines BiPE with YaRN",
            text.lead("bipe_rope, yarn, fine-tuned", "rope, yarn, fine-tuned", 0.0),
        ),
        Prediction(
            "At the longest length fine-tuned YaRN is better than fine-tuning without a scaling, on "
            "positions.",
            "the method's own claim",
            text.lead("rope, yarn, fine-tuned", "rope, fine-tuned", 0.0),
        ),
        Prediction(
            "RoPE that was dropped is flatter than RoPE as trained, and at most 0.05 nats worse at the first "
            "length.",
            "DroPE (Gelberg et al. 2025)",
            text.both(
                text.lead("rope, dropped", "rope", 0.0),
                text.lead("rope, dropped", "rope", -0.05, first=True),
            ),
        ),
        Prediction(
            "Without the segment's rotation BiPE-RoPE's offsets alone are better at the longest length than "
            "with it.",
            "ours",
            text.lead("bipe_rope, dropped", "bipe_rope", 0.0),
        ),
    ),
)
