"""The synthetic tasks by name, and the language that names one: "arithmetic(operators=1:15, seed=3)"."""

import dataclasses
import re
from typing import Any

from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean
from bipe_jax.synthetic.arithmetic import Arithmetic, Fold
from bipe_jax.synthetic.bi_nfa import BiNfa
from bipe_jax.synthetic.lookup import Lookup
from bipe_jax.synthetic.recall import Recall
from bipe_jax.synthetic.task import Task

_TASKS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
    "fold": Fold,
    "bi-nfa": BiNfa,
    "recall": Recall,
    "lookup": Lookup,
}
NAMES = tuple(_TASKS)
_FORM = re.compile(r"([a-z-]+)(?:\((.*)\))?")


def parse(text: str, key: str = "data") -> Task:
    """The task that a text names.

    Args:
      text: NAME or NAME(OPTION=VALUE, ...). key: what names the text, for messages.

    Raises:
      UserError: the task or an option is unknown, or a value is wrong.
    """
    form = _FORM.fullmatch(text.strip())
    if form is None or form[1] not in _TASKS:
        name = form[1] if form else text
        raise UserError(
            f"{key}: there is no synthetic task {name!r}{did_you_mean(name, NAMES)}: use one of "
            f"{', '.join(NAMES)}, such as arithmetic(operators=1:15)"
        )
    kind = _TASKS[form[1]]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in (form[2] or "").split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in fields:
            raise UserError(
                f"{key}: {part!r} is no option of the task {form[1]}{did_you_mean(name, fields)}: it has "
                f"{', '.join(fields)}"
            )
        options[name] = _value(value, fields[name].default, f"{key}: {form[1]}({name}={value})")
    task = kind(**options)
    for name, problem in task.problems().items():
        raise UserError(f"{key}: {form[1]}({name}={_text(getattr(task, name))}) {problem}")
    return task


def _value(text: str, default: Any, where: str) -> Any:
    """A value of the default's type; a range is LOW:HIGH, or one number for both."""
    try:
        if isinstance(default, tuple):
            low, colon, high = text.partition(":")
            return int(low), int(high if colon else low)
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(default)(text)
    except (ValueError, KeyError):
        kinds = {tuple: "a range, such as 1:8", bool: "true or false", int: "a whole number"}
        raise UserError(f"{where} must be {kinds.get(type(default), 'a number')}") from None


def _text(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
