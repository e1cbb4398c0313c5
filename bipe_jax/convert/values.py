"""Values of another program's config.json."""

from typing import Any

from bipe_jax.errors import UserError


def value(theirs: dict, key: str, where: str, kind: type = int, default: Any = None) -> Any:
    """The value of a key; `default` if it is missing or null.

    Raises:
      UserError: it is of another type, or it is missing and has no default.
    """
    item = theirs.get(key)
    item = default if item is None else item
    if item is None:
        raise UserError(f"{where} has no {key!r}")
    kinds = (int, float) if kind is float else kind
    if not isinstance(item, kinds) or isinstance(item, bool) != (kind is bool):
        raise UserError(f"{where}: {key}={item!r} must be of the type {kind.__name__}")
    return item
