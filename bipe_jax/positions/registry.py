# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""The registry of kinds, and the parsing of entries (kind, coordinate, (option, value), ...)."""

import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from bipe_jax import plugins
from bipe_jax.errors import UserError
from bipe_jax.positions.absolute import Learned, Sinusoidal
from bipe_jax.positions.alibi import Alibi
from bipe_jax.positions.cope import Cope
from bipe_jax.positions.dape import Dape
from bipe_jax.positions.fire import Fire
from bipe_jax.positions.fox import Fox
from bipe_jax.positions.kerple import KerpleLog, KerplePower
from bipe_jax.positions.kind import Absolute, Relative
from bipe_jax.positions.pope import Pope
from bipe_jax.positions.rope import Rope
from bipe_jax.positions.t5 import T5
from bipe_jax.positions.temperature import SSMax, Temperature
from bipe_jax.positions.window import Window
from bipe_jax.positions.xpos import XPos
from bipe_jax.suggest import did_you_mean

ABSOLUTE: dict[str, type[Absolute]] = {"learned": Learned, "sinusoidal": Sinusoidal}
RELATIVE: dict[str, type[Relative]] = {
    "rope": Rope,
    "alibi": Alibi,
    "t5": T5,
    "kerple-log": KerpleLog,
    "kerple-power": KerplePower,
    "fire": Fire,
    "xpos": XPos,
    "pope": Pope,
    "ssmax": SSMax,
    "temperature": Temperature,
    "window": Window,
    "fox": Fox,
    "cope": Cope,
    "dape": Dape,
}
OWN = frozenset({*ABSOLUTE, *RELATIVE})  # those of plug-ins are added when a config names them

# Options that every relative entry may have; the kinds do not know of them.
_COMMON = {"layers": str, "shared": bool}
_MOST = sys.float_info.max


class Entry(NamedTuple):
    """One parsed entry of `position.absolute` or `position.relative`.

    Attributes:
      name: of its parameters: the kind and the coordinate.
      options: of the kind, by name.
      layers: the layers, from 0, that have it.
      shared: whether all these layers have the same parameters.
    """

    name: str
    kind: str
    coordinate: str
    options: dict[str, Any]
    layers: tuple[int, ...]
    shared: bool

    def written(self) -> tuple[Any, ...]:
        """The kind, the coordinate and the options of the kind, as a config has them."""
        return (self.kind, self.coordinate, *self.options.items())


def parse_entries(
    key: str, entries: Any, coordinates: Sequence[str], layers: int
) -> tuple[Entry, ...]:
    """The entries of a list of a config.

    Args:
      key: "position.absolute" or "position.relative".
      coordinates: names of the coordinates that there are. layers: of the model.

    Raises:
      UserError: an entry is malformed, its kind, coordinate or an option is unknown, or two entries of
        one kind and coordinate share a layer.
    """
    if not isinstance(entries, (tuple, list)):
        raise UserError(f"{key}={entries!r} must be a tuple of entries (kind, coordinate)")
    parsed: list[Entry] = []
    for written in entries:
        entry = _parse(key, written, coordinates, layers)
        alike = [e for e in parsed if (e.kind, e.coordinate) == (entry.kind, entry.coordinate)]
        if any(set(e.layers) & set(entry.layers) for e in alike):
            names = ", ".join(e.name for e in (*parsed, entry))
            raise UserError(f"{key} names the same kind and coordinate twice: {names}")
        if alike:
            entry = entry._replace(name=f"{entry.name}_{len(alike) + 1}")
        parsed.append(entry)
    return tuple(parsed)


def _parse(key: str, entry: Any, coordinates: Sequence[str], layers: int) -> Entry:
    relative = key == "position.relative"
    registry, other = (RELATIVE, ABSOLUTE) if relative else (ABSOLUTE, RELATIVE)
    shape = "(kind, coordinate) or (kind, coordinate, (option, value), ...)"
    if not isinstance(entry, (tuple, list)) or len(entry) < 2:
        raise UserError(f"{key}: {entry!r} must be {shape}")
    kind, coordinate, *options = entry
    if not isinstance(kind, str) or not isinstance(coordinate, str):
        raise UserError(f"{key}: {entry!r} must be {shape}")
    _register(kind)
    if kind not in registry:
        known = list(dict.fromkeys((*registry, *(n for n in plugins.names(plugins.KINDS)))))
        hint = (
            "belongs to the other list"
            if kind in other
            else f"is unknown{did_you_mean(kind, known)}"
        )
        raise UserError(f"{key}: kind {kind!r} {hint}: use one of {', '.join(known)}")
    if coordinate not in coordinates:
        raise UserError(
            f"{key}: coordinate {coordinate!r} is unknown{did_you_mean(coordinate, coordinates)}: use "
            f"one of {', '.join(coordinates)}"
        )
    known = registry[kind].options | (_COMMON if relative else {})
    parsed = parse_options(key, kind, options, known)
    own_layers = _parse_layers(key, kind, parsed.pop("layers", ""), layers)
    shared = parsed.pop("shared", getattr(registry[kind], "shared", True))
    return Entry(f"{kind}_{coordinate}", kind, coordinate, parsed, own_layers, shared)


def _register(kind: str) -> None:
    """Adds the kind of this name to the registry, if a plug-in has one. Raises UserError: it is broken."""
    plugin = plugins.find(plugins.KINDS, kind, OWN)
    if plugin is None:
        return
    cls = plugin.value
    if isinstance(cls, type) and issubclass(cls, Relative):
        RELATIVE[kind] = cls
    elif isinstance(cls, type) and issubclass(cls, Absolute):
        ABSOLUTE[kind] = cls
    else:
        plugin.refuse("is no subclass of bipe_jax.positions.kind.Absolute or Relative")


def parse_options(
    key: str, kind: str, options: list[Any], known: dict[str, type]
) -> dict[str, Any]:
    """The options of an entry, by name.

    Args:
      key: of the config. known: name -> type: str, bool, int, float, or tuple for numbers.

    Raises:
      UserError: an option is malformed, unknown, given twice, or of another type.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        pair = isinstance(option, (tuple, list)) and len(option) == 2
        if not pair or not isinstance(option[0], str):
            raise UserError(f"{key}: option {option!r} of {kind!r} must be (name, value)")
        name, value = option
        if name in parsed:
            raise UserError(f"{key}: {kind!r} has the option {name!r} twice")
        wanted = known.get(name)
        if wanted is None:
            raise UserError(
                f"{key}: {kind!r} has no option {name!r}{did_you_mean(name, known)}: use one of "
                f"{', '.join(known)}"
            )
        if complaint := _complaint(value, wanted):
            raise UserError(f"{key}: {kind} {name}={value!r} must be {complaint}")
        parsed[name] = wanted(value)
    return parsed


def _complaint(value: Any, wanted: type) -> str | None:
    """What an option's value must be, if it is not."""
    if wanted is str:
        return None if isinstance(value, str) else "a string"
    if wanted is bool:
        return None if isinstance(value, bool) else "True or False"
    if wanted is tuple:
        numbers = isinstance(value, (tuple, list)) and value
        good = numbers and all(_complaint(number, float) is None for number in value)
        return None if good else "a tuple of finite numbers"
    number = (int, float) if wanted is float else wanted
    if isinstance(value, bool) or not isinstance(value, number) or not abs(value) <= _MOST:
        return f"a finite {wanted.__name__}"
    return None


def _parse_layers(key: str, kind: str, text: str, layers: int) -> tuple[int, ...]:
    """The layers of "3/4" (those whose number has the remainder 3 by 4) or "0,5"; "" are all."""
    if not text:
        return tuple(range(layers))
    numbers, slash, period = text.partition("/")
    good = re.fullmatch(r"\d{1,9}(,\d{1,9})*", numbers) and (
        not slash or re.fullmatch(r"[1-9]\d{0,8}", period)
    )
    limit = int(period) if slash and good else layers
    chosen = {int(number) for number in numbers.split(",")} if good else set()
    if not good or max(chosen) >= limit:
        raise UserError(
            f"{key}: {kind} layers={text!r} must be numbers of the {layers} layers from 0, such as "
            "'0,5', or remainders, such as '3/4' or '0,1,2/4'"
        )
    numbered = tuple(n for n in range(layers) if (n % limit if slash else n) in chosen)
    if not numbered:
        raise UserError(f"{key}: {kind} layers={text!r} is none of the model's {layers} layers")
    return numbered
