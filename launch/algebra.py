"""The algebra of sweeps: each function gives a list of points, and takes such lists.

A point is a dict from keys of the config to values: {"optimizer.learning_rate": 1e-3, "seed": 0}.
A sweep file has a function `get_sweep()` that returns a list of points; see configs/sweeps/.
"""

from collections.abc import Iterable, Sequence
from itertools import product as _tuples

from bipe_jax.errors import UserError

Point = dict[str, object]


def sweep(key: str, values: Iterable) -> list[Point]:
    """A point for each value of one key."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"sweep({key!r}, {values!r}): the values must be a list")
    points = [{key: value} for value in values]
    if not points:
        raise UserError(f"sweep({key!r}, ...) has no values")
    return points


def product(*sweeps: Sequence[Point]) -> list[Point]:
    """Each point of the first with each of the second, and so on; the last varies quickest."""
    return [_joined("product", points) for points in _tuples(*sweeps)]


def zipit(*sweeps: Sequence[Point]) -> list[Point]:
    """The first points of all together, then the second points, and so on."""
    lengths = [len(points) for points in sweeps]
    if len(set(lengths)) > 1:
        raise UserError(
            f"zipit: the sweeps have {', '.join(map(str, lengths))} points, not equally many"
        )
    return [_joined("zipit", points) for points in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Point]) -> list[Point]:
    """The points of the first, then those of the second, and so on."""
    return [point for points in sweeps for point in points]


def _joined(name: str, points: Iterable[Point]) -> Point:
    joined: Point = {}
    for point in points:
        for key in point:
            if key in joined:
                raise UserError(f"{name}: two of the sweeps set {key!r}: vary it in one of them")
        joined |= point
    return joined
