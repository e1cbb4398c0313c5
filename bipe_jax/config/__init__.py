# pyright: reportMissingTypeStubs=false
"""Configs: their defaults, checking them, comparing them, and reading those of older checkpoints.

A config file returns an `ml_collections.ConfigDict`, which `parse` turns into a frozen `Config`. The
program works with the latter alone. The table of fields is in `fields`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import ml_collections

from bipe_jax.config import checks, fields
from bipe_jax.config.fields import Config
from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean

__all__ = [
    "FIELDS", "Config", "Field", "check_resumable", "check_startable", "defaults", "differences",
    "flatten", "from_json", "parse", "replace", "to_dict", "to_json",
]  # fmt: skip

AnyConfig = TypeVar("AnyConfig", bound=Config)

FORMAT = 2
# What became of a field: {format that changed it: {its old name: its new name, or None}}. None: it is
# no longer a field.
RENAMES: dict[int, dict[str, str | None]] = {
    # The separators that a tokenizer has for the rule are part of a checkpoint's meta data.
    1: {"segments.separators": None},
    # Targets are counted in tokens, not in windows of the shortest length.
    2: {"evaluation.windows": None},
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One row of the table of fields.

    Attributes:
      name: such as "model.width".
      default: its value in configs/base.py.
      complaint: value -> what it must be, None if it is.
      meaning: with the unit.
      fixes: see `fields`.
      choices: the values that it may have, if they are listed.
    """

    name: str
    default: Any
    complaint: Callable[[Any], str | None]
    meaning: str
    fixes: str
    choices: tuple[str, ...] = ()


def _rows() -> Iterator[Field]:
    def rows(kind: type, prefix: str) -> Iterator[Field]:
        for row in dataclasses.fields(kind):
            if "check" in row.metadata:
                m = row.metadata
                check = m["check"]
                choices = check.names if isinstance(check, checks.Choice) else ()
                yield Field(
                    prefix + row.name,
                    row.default,
                    check.complaint,
                    m["meaning"],
                    m["fixes"],
                    choices,
                )
            else:
                yield from rows(_group_kind(row), f"{row.name}.")

    return rows(Config, "")


def _group_kind(row: dataclasses.Field[Any]) -> type:
    kind = row.default_factory
    assert isinstance(kind, type)
    return kind


FIELDS: dict[str, Field] = {field.name: field for field in _rows()}
_GROUPS = {row.name: _group_kind(row) for row in dataclasses.fields(Config) if not row.metadata}


def defaults() -> Any:
    """A ConfigDict with every field at its default: what all config files start from.

    Its type is Any, since what an attribute of a ConfigDict is cannot be known.
    """
    nested: dict[str, Any] = {}
    for name, field in FIELDS.items():
        group, _, key = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[key] = field.default
    return ml_collections.ConfigDict(nested)


def flatten(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    """{"model.width": 768, ...} of a nested config.

    Raises:
      UserError: it is no config, or a group of fields is not a group.
    """
    if not _is_group(config):
        raise UserError(f"the config must be a ConfigDict, not {type(config).__name__}")
    flat: dict[str, Any] = {}
    for key, value in _items(config):
        if key not in _GROUPS:
            flat[key] = value
        elif not _is_group(value):
            first = dataclasses.fields(_GROUPS[key])[0].name
            raise UserError(
                f"config.{key}={value!r} must be a ConfigDict: set its fields one by one, as in "
                f"config.{key}.{first} = ..."
            )
        else:
            flat |= {f"{key}.{name}": item for name, item in _items(value)}
    return flat


def _is_group(value: Any) -> bool:
    return isinstance(value, (Mapping, ml_collections.ConfigDict))


def _items(config: Any) -> Iterable[tuple[str, Any]]:
    return config.items()


def parse(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Checks every field and what must hold between fields.

    Raises:
      UserError: one line that names the field, its value and what it must be.
    """
    return _parse_flat(flatten(config))


def _parse_flat(flat: Mapping[str, Any]) -> Config:
    for name in flat.keys() - FIELDS.keys():
        hint = did_you_mean(name, FIELDS)
        raise UserError(
            f"config.{name} is unknown{hint}: see docs/reference/config.md for all fields"
        )
    for name, field in FIELDS.items():
        if name not in flat:
            raise UserError(f"config.{name} is missing: start from configs/base.py")
        if wanted := field.complaint(flat[name]):
            shown = " ".join(repr(flat[name]).split())  # a ConfigDict is shown on several lines
            raise UserError(f"config.{name}={shown} must be {wanted}")
    parsed = _build(flat)
    _check_together(parsed, flat)
    return parsed


def _build(flat: Mapping[str, Any]) -> Config:
    groups: dict[str, dict[str, Any]] = {name: {} for name in _GROUPS}
    top: dict[str, Any] = {}
    for name in FIELDS:
        group, _, key = name.rpartition(".")
        (groups[group] if group else top)[key] = _frozen(flat[name])
    return Config(**top, **{name: _GROUPS[name](**values) for name, values in groups.items()})


def _frozen(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    if not isinstance(value, (tuple, list)):
        return value
    return tuple(map(_frozen, cast(Sequence[Any], value)))


def _check_together(config: Config, flat: Mapping[str, Any]) -> None:
    def divides(small: str, large: str) -> None:
        if flat[large] % flat[small]:
            raise UserError(
                f"config.{small}={flat[small]} must divide config.{large}={flat[large]}"
            )

    divides("model.heads", "model.width")
    divides("model.kv_heads", "model.heads")
    divides("accumulation", "batch_size")
    if config.sequence_length > config.loss_chunk:
        divides("loss_chunk", "sequence_length")
    schedule = config.schedule
    if schedule.warmup_steps + schedule.decay_steps > config.steps:
        raise UserError(
            f"config.schedule.warmup_steps={schedule.warmup_steps} and decay_steps="
            f"{schedule.decay_steps} are together more than config.steps={config.steps}"
        )
    if schedule.name != "wsd" and schedule.decay_steps:
        raise UserError(
            f"config.schedule.decay_steps={schedule.decay_steps} is for schedule 'wsd' only: "
            f"{schedule.name!r} decays until the last step"
        )
    if schedule.name == "wsd" and not schedule.decay_steps:
        raise UserError(
            "config.schedule.decay_steps=0: schedule 'wsd' needs the length of its decay"
        )
    if config.checkpoint.keep_every:
        divides("checkpoint.every", "checkpoint.keep_every")
    if config.checkpoint.keep_best:
        if not config.evaluation.every:
            raise UserError(
                "config.checkpoint.keep_best=True needs config.evaluation.every above 0, whose losses it "
                "compares"
            )
        divides("evaluation.every", "checkpoint.every")
    if config.data.cut_documents == "continue" and not config.data.separate_documents:
        raise UserError(
            "config.data.cut_documents='continue' needs config.data.separate_documents=True: where "
            "attention crosses documents, coordinates are the block's"
        )


def replace(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """A copy with other values: `replace(config, {"model.attention": "chunked"})`.

    The new values are not checked.
    """
    top: dict[str, Any] = {}
    for name, value in changes.items():
        group, _, key = name.rpartition(".")
        if group:
            top[group] = dataclasses.replace(top.get(group, getattr(config, group)), **{key: value})
        else:
            top[key] = value
    return dataclasses.replace(config, **top)


def value_of(config: Config, name: str) -> Any:
    """The value of a field, by a name such as "model.width"."""
    group, _, key = name.rpartition(".")
    return getattr(getattr(config, group) if group else config, key)


def to_dict(config: Config) -> dict[str, Any]:
    """The nested dict that `parse` makes the same config of."""
    nested: dict[str, Any] = {}
    for name in FIELDS:
        group, _, key = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[key] = value_of(config, name)
    return nested


def to_json(config: Config) -> dict[str, Any]:
    """What is saved of a config, with the number of its format."""
    return {"format": FORMAT, **to_dict(config)}


def from_json(saved: Mapping[str, Any]) -> Config:
    """The config that `to_json` gave, in this version of the program or an earlier one.

    Fields that were renamed since then are renamed (RENAMES), fields that did not exist yet have
    their defaults.

    Raises:
      UserError: it was saved by a later version, or is not a config.
    """
    number = saved.get("format", 0)
    if not isinstance(number, int) or not 0 <= number <= FORMAT:
        raise UserError(
            f"the config has the format {number!r}, and this version of bipe_jax reads formats up to "
            f"{FORMAT}: use a newer one"
        )
    flat = flatten({name: value for name, value in saved.items() if name != "format"})
    for changed in range(number + 1, FORMAT + 1):
        for old, new in RENAMES.get(changed, {}).items():
            if old in flat:
                value = flat.pop(old)
                flat |= {new: value} if new else {}
    return _parse_flat({name: field.default for name, field in FIELDS.items()} | flat)


def check_resumable(saved: Config, config: Config, workdir: str) -> None:
    """Raises UserError if the run of `saved` cannot be resumed with `config` in its workdir."""
    for field, before, now in differences(saved, config):
        if field.fixes in (fields.RUN, fields.PARAMETERS):
            raise UserError(
                f"config.{field.name}={now!r}, but the run in {workdir} was started with {before!r}: use "
                "that value, or another --workdir"
            )


def check_startable(saved: Config, config: Config) -> None:
    """Raises UserError if a new run cannot start from the parameters of a run with `saved`."""
    for field, before, now in differences(saved, config):
        if field.fixes == fields.PARAMETERS:
            raise UserError(
                f"config.{field.name}={now!r}, but config.initial_checkpoint={config.initial_checkpoint} "
                f"was trained with {before!r}: use that value"
            )


def differences(saved: Config, config: Config) -> Iterator[tuple[Field, Any, Any]]:
    """Yields (field, value in `saved`, value in `config`) of the fields that are not equal."""
    for name, field in FIELDS.items():
        before, now = value_of(saved, name), value_of(config, name)
        if before != now:
            yield field, before, now
