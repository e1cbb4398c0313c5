"""The registry of positional encodings. An encoding is a *kind* applied to a *coordinate*.

A config names encodings in two lists of entries (kind, coordinate, (option, value), ...):

    config.position.absolute = (("learned", "offset"),)
    config.position.relative = (("alibi", "segment", ("slope_scale", 96.0)),)

To add a kind, write one class and enter it in ABSOLUTE or RELATIVE. A class has `options` (name ->
type of its keyword arguments) and a static `check(config, coordinate, **options)` that raises
UserError for what does not make sense. Beyond that:

- an absolute kind is an `nnx.Module`, built as `kind(config, coordinate, key, **options)`; called
  with the coordinate (B, L) it returns (B, L, D), which is added to the token embedding;
- a relative kind is built as `kind(config, coordinate, **options)`; `prepare(coordinate)` is run
  once for all layers and returns a tree of arrays (B, L, ...). If `rotates`, it has
  `rotate(x, prepared)` for queries and keys (B, L, N, H); otherwise it has
  `bias(query_prepared, key_prepared, heads)`, which returns (B, N, L, S) in float32 for those of
  the model's query heads, and `linear`: if true, it has `columns` too (see `bias.linear_columns`)
  and runs on flash kernels. `steady`: what `prepare` gives for a token does not depend on the other
  tokens of its row, so that decoding may keep it.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from bipe_jax.errors import UserError
from bipe_jax.positions.absolute import Learned, Sinusoidal
from bipe_jax.positions.alibi import Alibi
from bipe_jax.positions.rope import Rope
from bipe_jax.positions.scaling import NEED_ORIGINAL, SCALINGS
from bipe_jax.segments import COORDINATES

ABSOLUTE = {"learned": Learned, "sinusoidal": Sinusoidal}
RELATIVE = {"rope": Rope, "alibi": Alibi}


class Entry(NamedTuple):
    """One parsed entry of `position.absolute` or `position.relative`."""

    kind: str
    coordinate: str
    options: dict

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.coordinate}"


def _parse(key: str, entry, registry: dict, elsewhere: dict) -> Entry:
    shape = "(kind, coordinate) or (kind, coordinate, (option, value), ...)"
    if not isinstance(entry, (tuple, list)) or len(entry) < 2:
        raise UserError(f"{key}: {entry!r} must be {shape}")
    kind, coordinate, *options = entry
    if not isinstance(kind, str) or not isinstance(coordinate, str):
        raise UserError(f"{key}: {entry!r} must be {shape}")
    if kind not in registry:
        hint = "belongs to the other list" if kind in elsewhere else "is unknown"
        raise UserError(f"{key}: kind {kind!r} {hint}: use one of {', '.join(registry)}")
    if coordinate not in COORDINATES:
        raise UserError(
            f"{key}: coordinate {coordinate!r} is unknown: use one of {', '.join(COORDINATES)}"
        )
    parsed = {}
    for option in options:
        pair = isinstance(option, (tuple, list)) and len(option) == 2
        if not pair or not isinstance(option[0], str):
            raise UserError(f"{key}: option {option!r} of {kind!r} must be (name, value)")
        name, value = option
        if name in parsed:
            raise UserError(f"{key}: {kind!r} has the option {name!r} twice")
        wanted = registry[kind].options.get(name)
        if wanted is None:
            known = ", ".join(registry[kind].options)
            raise UserError(f"{key}: {kind!r} has no option {name!r}: use one of {known}")
        if complaint := _complaint(value, wanted):
            raise UserError(f"{key}: {kind} {name}={value!r} must be {complaint}")
        parsed[name] = wanted(value)
    return Entry(kind, coordinate, parsed)


def _complaint(value, wanted: type) -> str | None:
    """What an option's value must be, if it is not."""
    if wanted is str:
        return None if isinstance(value, str) else "a string"
    number = (int, float) if wanted is float else wanted
    if isinstance(value, bool) or not isinstance(value, number) or not math.isfinite(value):
        return f"a finite {wanted.__name__}"
    return None


def _entries(key: str, entries, registry: dict, elsewhere: dict) -> list[Entry]:
    if not isinstance(entries, (tuple, list)):
        raise UserError(f"{key}={entries!r} must be a tuple of entries (kind, coordinate)")
    parsed = [_parse(key, entry, registry, elsewhere) for entry in entries]
    names = [entry.name for entry in parsed]
    if len(set(names)) < len(names):
        raise UserError(f"{key} names the same kind and coordinate twice: {', '.join(names)}")
    return parsed


def absolute(config) -> list[Entry]:
    """The parsed `position.absolute`. Raises UserError where it is malformed."""
    return _entries("position.absolute", config.position.absolute, ABSOLUTE, RELATIVE)


def relative(config) -> list[Entry]:
    """The parsed `position.relative`. Raises UserError where it is malformed."""
    return _entries("position.relative", config.position.relative, RELATIVE, ABSOLUTE)


def relative_encodings(config) -> list:
    """The relative encodings of a config, built: pairs of a coordinate's name and the encoding."""
    return [
        (entry.coordinate, RELATIVE[entry.kind](config, entry.coordinate, **entry.options))
        for entry in relative(config)
    ]


def check(config) -> None:
    """Raises UserError for an unknown encoding, or for encodings that cannot be combined."""
    for entry in absolute(config):
        ABSOLUTE[entry.kind].check(config, entry.coordinate, **entry.options)
    for entry in relative(config):
        RELATIVE[entry.kind].check(config, entry.coordinate, **entry.options)
    rotary = [entry.name for entry in relative(config) if RELATIVE[entry.kind].rotates]
    if len(rotary) > 1:
        raise UserError(
            f"position.relative: {' and '.join(rotary)} would turn the same pairs of each head, and "
            "their angles could not be told apart: keep one of them"
        )


def check_length(config, length: int) -> None:
    """Raises UserError if the model cannot be run on so many tokens."""
    for entry in absolute(config):
        size = entry.options.get("size", config.sequence_length)
        if entry.kind == "learned" and entry.coordinate == "position" and length > size:
            raise UserError(
                f"the learned table of position ends at {size:,} tokens: the model has nothing for "
                f"length {length:,}"
            )


def extend(config, spec: str, ran: Mapping[str, float] = MappingProxyType({})):
    """A copy of a trained model's config, whose rotary encoding is scaled, whatever its coordinate.

    A scaling that the encoding has already is replaced: the new factor too counts from the training
    without one.

    Args:
      spec: SCALING:FACTOR or SCALING:FACTOR:ORIGINAL, such as "ntk:4", "yarn:8" or "yarn:8:80"; see
        `scaling`.
      ran: how far coordinates ran in training, where `spec` does not say it. `position` is known: it
        ran to `sequence_length`.

    Raises:
      UserError: the spec is malformed, there is no rotary encoding, or it is not known how far the
        coordinate ran in training.
    """
    scaling, factor, original = _parse_extension(spec)
    encodings = relative(config)
    rotary = next((entry for entry in encodings if RELATIVE[entry.kind].rotates), None)
    if rotary is None:
        shown = ", ".join(entry.name for entry in encodings) or "nothing"
        raise UserError(
            f"extension {spec!r} scales a rotary encoding, and this model has none: its "
            f"position.relative has {shown}"
        )
    if original is None and scaling in NEED_ORIGINAL:
        if rotary.options.get("scaling"):  # the config's lengths are no longer those before it
            original = rotary.options.get("original")
        else:
            original = {"position": config.sequence_length, **ran}.get(rotary.coordinate)
        if original is None:
            raise UserError(
                f"extension {spec!r}: how far {rotary.coordinate!r} ran before the model was extended "
                f"is not known: add it, as in {scaling}:{factor:g}:80"
            )
    new = {"scaling": scaling, "factor": factor, "original": original}
    options = {name: v for name, v in (rotary.options | new).items() if v is not None}
    extended = config.copy_and_resolve_references()
    extended.position.relative = tuple(
        (entry.kind, entry.coordinate, *(options if entry is rotary else entry.options).items())
        for entry in encodings
    )
    check(extended)
    return extended


def _parse_extension(spec: str) -> tuple[str, float, float | None]:
    scaling, *numbers = spec.split(":")
    try:
        factor, *original = map(float, numbers)
        if (
            scaling not in SCALINGS
            or len(original) > 1
            or not all(map(math.isfinite, [factor, *original]))
        ):
            raise ValueError
    except ValueError:
        raise UserError(
            f"extension {spec!r} must be SCALING:FACTOR or SCALING:FACTOR:ORIGINAL, such as yarn:8 or "
            f"yarn:8:80, with SCALING one of {', '.join(SCALINGS)}"
        ) from None
    return scaling, factor, original[0] if original else None
