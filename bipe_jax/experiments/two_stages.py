"""Arms of two stages: a model is trained on text, and then on a task."""

from collections.abc import Mapping
from typing import Any

from bipe_jax.experiments.experiment import Arm, Evaluation
from bipe_jax.experiments.outcomes import Outcomes
from bipe_jax.positions import NAMED

TEXT = "text"  # the option of arms of the first stage


def arms(
    names: tuple[str, ...],
    table: int,
    text: Mapping[str, Any],
    evaluations: tuple[Evaluation, ...] = (),
) -> list[Arm]:
    """For each encoding an arm that is trained on the task, and after all of them those that they start from.

    Args:
      names: of encodings in `positions.NAMED`, that of the baseline first.
      table: rows of learned tables of offsets, which both stages have.
      text: the changes of the first stage. evaluations: of the second one.
    """
    tuned, bases = [], []
    for name in names:
        absolute, relative = NAMED[name]
        sized = tuple(
            (*entry, ("size", table)) if entry == ("learned", "offset") else entry
            for entry in absolute
        )
        changes = {"position.absolute": sized, "position.relative": relative}
        base = f"{name}, text"
        tuned.append(Arm(name, changes, after=base, evaluations=evaluations))
        bases.append(Arm(base, {**changes, **text}, {TEXT: True}))
    return tuned + bases


def tuned(outcomes: Outcomes) -> list[str]:
    """The names of the arms that are trained on the task."""
    return [arm for arm in outcomes.arms if not arm.endswith(", text")]
