"""The algebra of sweeps: functions that combine lists of points.

A point is a dict from keys of the config to values: {"optimizer.learning_rate": 1e-3, "seed": 0}.
With the key "name" it also has a name of its own, which its directory begins with. A sweep file has a
function `get_sweep()` that returns a list of points; see configs/sweeps/.
"""

from collections.abc import Iterable, Sequence
from itertools import product as _tuples

from bipe_jax.errors import UserError

Point = dict[str, object]
NAME = "name"  # the one key of a point that is none of the config


def sweep(key: str, values: Iterable) -> list[Point]:
    """One point for each value of a key."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"sweep({key!r}, {values!r}): the values must be a list")
    points = [{key: value} for value in values]
    if not points:
        raise UserError(f"sweep({key!r}, ...) has no values")
    return points


def product(*sweeps: Sequence[Point]) -> list[Point]:
    """All combinations of one point of each sweep; the last sweep varies fastest."""
    return [_joined("product", points) for points in _tuples(*sweeps)]


def zipit(*sweeps: Sequence[Point]) -> list[Point]:
    """The sweeps in parallel: the first points of all combined, then the second points, and so on."""
    lengths = [len(points) for points in sweeps]
    if len(set(lengths)) > 1:
        raise UserError(
            f"zipit: the sweeps have {', '.join(map(str, lengths))} points, not equally many"
        )
    return [_joined("zipit", points) for points in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Point]) -> list[Point]:
    """The sweeps one after the other."""
    return [point for points in sweeps for point in points]


def _joined(name: str, points: Iterable[Point]) -> Point:
    joined: Point = {}
    for point in points:
        for key in point:
            if key in joined and key != NAME:
                raise UserError(f"{name}: two of the sweeps set {key!r}: vary it in one of them")
        names = [str(part[NAME]) for part in (joined, point) if NAME in part]
        joined |= point
        if names:
            joined[NAME] = "-".join(names)
    return joined
