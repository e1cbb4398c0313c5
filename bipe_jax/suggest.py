"""Suggestions for mistyped names: of commands, flags, config fields, kinds, rules, sources."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint at the name that is nearest to a mistyped one: " (did you mean 'x'?)"; "" if none is near.

    Of names with dots, such as "model.width", the last part alone may be meant.
    """
    known = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, known, 1, 0.7)
    if not near:
        last = {known_name.rpartition(".")[2]: known_name for known_name in reversed(known)}
        parts = difflib.get_close_matches(name.rpartition(".")[2], last, 1, 0.8)
        near = [last[part] for part in parts]
    return f" (did you mean {near[0]!r}?)" if near else ""
