# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""Draws: coordinates that are drawn in training, so that far ones occur in short blocks.

A draw turns a coordinate into a coordinate, whatever encoding reads it. An entry is (draw, coordinate,
(option, value), ...), as in

    config.position.draws = (("randomized", "segment", ("maximum", 4096)),)

Each is a function (key, coordinate, **options) -> coordinate of one row, (L,) integers. "How far the row
runs" is the largest value in it, plus 1. Documents of a row have the same draw.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.registry import parse_options
from bipe_jax.suggest import did_you_mean

_MOST = 1 << 24  # up to which float32 has all integers


def randomized(key: jax.Array, coordinate: jax.Array, maximum: int) -> jax.Array:
    """Randomized positions (Ruoss et al. 2023, section 3.1): the value i becomes the i-th of a sorted sample.

    The sample has as many of the numbers 0 … maximum - 1 as the row runs far, without repetition. A row that
    runs beyond `maximum` stays as it is.
    """
    count = coordinate.max() + 1
    scores = jax.random.uniform(key, (maximum,))
    highest = jnp.sort(scores)[jnp.minimum(count, maximum) - 1]
    (sample,) = jnp.nonzero(scores <= highest, size=coordinate.shape[0], fill_value=maximum - 1)
    return jnp.where(count <= maximum, sample[coordinate], coordinate).astype(coordinate.dtype)


def shift(key: jax.Array, coordinate: jax.Array, maximum: int) -> jax.Array:
    """One shift of the whole row, drawn from 0 … maximum (Kiyono et al. 2021, SHAPE)."""
    return coordinate + jax.random.randint(key, (), 0, maximum + 1, coordinate.dtype)


def pose(key: jax.Array, coordinate: jax.Array, target: int) -> jax.Array:
    """PoSE (Zhu et al. 2024, section 3.2) with two chunks: values from some r on are shifted.

    With n as how far the row runs, r is drawn from 1 … (n + 1) / 2 and the shift from 0 … target - n. The
    text stays as it is, where PoSE continues from further on in the document.
    """
    cut_key, shift_key = jax.random.split(key)
    count = coordinate.max() + 1
    cut = jax.random.randint(cut_key, (), 1, (count + 1) // 2 + 1)
    moved = jax.random.randint(shift_key, (), 0, jnp.maximum(target - count, 0) + 1)
    return (coordinate + jnp.where(coordinate >= cut, moved, 0)).astype(coordinate.dtype)


DRAWS: dict[str, Callable[..., jax.Array]] = {
    "randomized": randomized,
    "shift": shift,
    "pose": pose,
}
_OPTIONS = {"randomized": "maximum", "shift": "maximum", "pose": "target"}


class Draw(NamedTuple):
    """One parsed entry of `position.draws`."""

    kind: str
    coordinate: str
    options: dict[str, int]

    def largest(self, length: int) -> int:
        """The largest value of the coordinate in blocks of `length` tokens, plus 1."""
        (value,) = self.options.values()
        return max(length + value if self.kind == "shift" else value, length)


def parse_draws(config: Config, coordinates: Sequence[str]) -> tuple[Draw, ...]:
    """The draws of a config.

    Raises:
      UserError: an entry is malformed, unknown, or drawn coordinates run beyond a learned table.
    """
    key, entries = "position.draws", config.position.draws
    parsed: list[Draw] = []
    for written in entries:
        if not isinstance(written, (tuple, list)) or len(written) < 2:
            raise UserError(f"{key}: {written!r} must be (draw, coordinate, (option, value))")
        kind, coordinate, *options = written
        if not isinstance(kind, str) or kind not in DRAWS:
            raise UserError(
                f"{key}: {kind!r} is unknown{did_you_mean(str(kind), DRAWS)}: use one of {', '.join(DRAWS)}"
            )
        if coordinate not in coordinates:
            raise UserError(
                f"{key}: coordinate {coordinate!r} is unknown: use one of {', '.join(coordinates)}"
            )
        if any(coordinate == other.coordinate for other in parsed):
            raise UserError(f"{key} draws {coordinate!r} twice: keep one of the entries")
        name = _OPTIONS[kind]
        values = parse_options(key, kind, options, {name: int})
        if not 1 <= values.get(name, 0) <= _MOST:
            raise UserError(
                f"{key}: {kind} {name}={values.get(name)} must be from 1 to {_MOST}, as in ({name!r}, 4096)"
            )
        parsed.append(draw := Draw(kind, coordinate, values))
        _check_tables(config, draw)
    return tuple(parsed)


def _check_tables(config: Config, draw: Draw) -> None:
    for kind, coordinate, *options in config.position.absolute:
        rows = dict(options).get("size") or config.sequence_length
        largest = draw.largest(config.sequence_length)
        if kind == "learned" and coordinate == draw.coordinate and rows < largest:
            raise UserError(
                f"position.draws: {draw.kind} of {coordinate!r} gives values up to {largest - 1}, and the "
                f"learned table has {rows} rows: give it ('size', {largest})"
            )


def apply(
    draws: Sequence[Draw],
    seed: int,
    step: jax.Array | int,
    inputs: Mapping[str, jax.Array],
    rows: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Inputs of the model with drawn coordinates.

    A row's draws depend on the seed, the step and the row's number in the whole batch alone, so that
    resuming, accumulation and another mesh change nothing.

    Args:
      inputs: (B, L) arrays by name.
      rows: (B,) numbers of the rows; None: 0, 1, ...
    """
    drawn = dict(inputs)
    key = jax.random.fold_in(jax.random.key(seed), step)
    for number, draw in enumerate(draws):
        coordinate = inputs[draw.coordinate]
        of_draw = jax.random.fold_in(key, number)
        keys = jax.vmap(lambda row, k=of_draw: jax.random.fold_in(k, row))(
            jnp.arange(coordinate.shape[0]) if rows is None else rows
        )

        def of_row(key: jax.Array, row: jax.Array, draw: Draw = draw) -> jax.Array:
            return DRAWS[draw.kind](key, row, **draw.options)

        drawn[draw.coordinate] = jax.vmap(of_row)(keys, coordinate)
    return drawn
