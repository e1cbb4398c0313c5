"""Checking a config before anything is built, and comparing it with a checkpoint's."""

import math
import re

import ml_collections

from bipe_jax import positions, segments
from bipe_jax.attention import BACKENDS
from bipe_jax.data.batches import mixture
from bipe_jax.data.packing import PACKINGS
from bipe_jax.data.sources import ON_ERROR
from bipe_jax.errors import UserError
from bipe_jax.model import REMAT_POLICIES
from bipe_jax.training.optimizer import OPTIMIZERS, SCHEDULES
from bipe_jax.training.spikes import POLICIES


class _Number:
    """An integer or a float from `low` to `high`;
    not the ends themselves if `above` or `below`."""

    def __init__(self, kind, low, high=math.inf, above=False, below=False):
        self.kind, self.low, self.high, self.above, self.below = kind, low, high, above, below

    def complaint(self, value):
        kinds = (int, float) if self.kind is float else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return "an integer" if self.kind is int else "a number"
        if not math.isfinite(value):
            return "finite"
        if value < self.low or (self.above and value == self.low):
            return f"{'above' if self.above else 'at least'} {self.low:g}"
        if value > self.high or (self.below and value == self.high):
            return f"{'below' if self.below else 'at most'} {self.high:g}"
        return None


class _Choice:
    def __init__(self, *names):
        self.names = names

    def complaint(self, value):
        return None if value in self.names else f"one of {', '.join(map(repr, self.names))}"


class _Kind:
    def __init__(self, kind, description):
        self.kind, self.description = kind, description

    def complaint(self, value):
        return None if isinstance(value, self.kind) else self.description


class _TupleOf:
    def __init__(self, item, description):
        self.item, self.description = item, description

    def complaint(self, value):
        good = isinstance(value, (tuple, list)) and not any(self.item.complaint(v) for v in value)
        return None if good else self.description


_COUNT = _Number(int, low=1)
_NATURAL = _Number(int, low=0)
_POSITIVE = _Number(float, low=0, above=True)
_NOT_NEGATIVE = _Number(float, low=0)
_FRACTION = _Number(float, low=0, high=1)
_BETA = _Number(float, low=0, high=1, below=True)
_TEXT = _Kind(str, "a string")
_FLAG = _Kind(bool, "True or False")
_NAMES = _TupleOf(_TEXT, "a tuple of strings, such as ('a', 'b')")
_IDS = _TupleOf(_NATURAL, "a tuple of integers")
_ENTRIES = _Kind((tuple, list), "a tuple of entries (kind, coordinate)")

FIELDS = {
    "steps": _COUNT,
    "batch_size": _COUNT,
    "sequence_length": _Number(int, low=2),
    "seed": _Number(int, low=0, high=2**31 - 1),  # Grain adds the window's number, in 32 bits
    "initial_checkpoint": _TEXT,
    "accumulation": _COUNT,
    "loss_chunk": _COUNT,
    "model.layers": _COUNT,
    "model.width": _COUNT,
    "model.heads": _COUNT,
    "model.kv_heads": _COUNT,
    "model.feed_forward": _COUNT,
    "model.vocab_size": _COUNT,
    "model.tied_output": _FLAG,
    "model.norm_epsilon": _POSITIVE,
    "model.init_std": _POSITIVE,
    "model.dtype": _Choice("bfloat16", "float32"),
    "model.attention": _Choice("auto", *BACKENDS),
    "model.remat": _Choice(*REMAT_POLICIES),
    "position.absolute": _ENTRIES,
    "position.relative": _ENTRIES,
    "segments.rule": _TEXT,
    "segments.separators": _IDS,
    "tokenizer.path": _TEXT,
    "tokenizer.train_bytes": _COUNT,
    "data.train": _TEXT,
    "data.evaluation": _TEXT,
    "data.sets": _NAMES,
    "data.shuffle_blocks": _COUNT,
    "data.packing": _Choice(*PACKINGS),
    "data.separate_documents": _FLAG,
    "data.cut_documents": _Choice("restart", "continue"),
    "data.workers": _Number(int, low=-1),
    "data.on_error": _Choice(*ON_ERROR),
    "data.max_bad_share": _FRACTION,
    "optimizer.name": _Choice(*OPTIMIZERS),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.beta1": _BETA,
    "optimizer.beta2": _BETA,
    "optimizer.epsilon": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.no_decay": _NAMES,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "schedule.name": _Choice(*SCHEDULES),
    "schedule.warmup_steps": _NATURAL,
    "schedule.decay_steps": _NATURAL,
    "schedule.final_fraction": _FRACTION,
    "spikes.threshold": _NOT_NEGATIVE,
    "spikes.policy": _Choice(*POLICIES),
    "checkpoint.every": _COUNT,
    "checkpoint.keep": _COUNT,
    "log.every": _COUNT,
    "log.peak_flops": _NOT_NEGATIVE,
    "log.wandb": _TEXT,
    "mesh.devices": _NATURAL,
    "mesh.data": _NATURAL,
    "mesh.fsdp": _COUNT,
    "mesh.tensor": _COUNT,
    "mesh.context": _COUNT,
    "mesh.topology": _TEXT,
    "evaluation.every": _NATURAL,
    "evaluation.lengths": _TupleOf(_Number(int, low=2), "a tuple of lengths, such as (256, 512)"),
    "evaluation.windows": _COUNT,
    "evaluation.batch_tokens": _COUNT,
}

# What a checkpoint's parameters, optimizer state and data state depend on.
_FIXED_AT_START = re.compile(
    r"(model\.(?!remat|attention).*|position\..*|segments\..*|optimizer\.name|sequence_length|batch_size|seed"
    r"|data\.(train|sets|shuffle_blocks|packing|separate_documents|cut_documents))"
)

# What must be as it was for parameters to mean the same in a new run that starts from them.
_FIXED_BY_PARAMETERS = re.compile(r"model\.(?!remat|attention|dtype).*")


def flatten(config) -> dict:
    """{"model.width": 768, …} of a ConfigDict; the sub-configs are known from FIELDS."""
    groups = {name.split(".")[0] for name in FIELDS if "." in name}
    flat = {}
    for key, value in config.items():
        if key not in groups:
            flat[key] = value
        elif not isinstance(value, ml_collections.ConfigDict):
            raise UserError(
                f"config.{key}={value!r} must be a ConfigDict: set its fields one by one, as in "
                f"config.{key}.{_first_field(key)} = ..."
            )
        else:
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
    return flat


def _first_field(group: str) -> str:
    return next(name for name in FIELDS if name.startswith(f"{group}.")).partition(".")[2]


def validate(config) -> None:
    """Checks every field and what must hold between fields; nothing is built before this.

    Raises:
      UserError: one line that names the field, its value and what it must be.
    """
    flat = flatten(config)
    for name in flat.keys() - FIELDS.keys():
        raise UserError(f"config.{name} is unknown: see bipe_jax/defaults.py for all fields")
    for name, field in FIELDS.items():
        if name not in flat:
            raise UserError(f"config.{name} is missing: start from configs/base.py")
        if wanted := field.complaint(flat[name]):
            shown = " ".join(repr(flat[name]).split())  # a ConfigDict is shown on several lines
            raise UserError(f"config.{name}={shown} must be {wanted}")

    def divides(small, large):
        if flat[large] % flat[small]:
            raise UserError(
                f"config.{small}={flat[small]} must divide config.{large}={flat[large]}"
            )

    divides("model.heads", "model.width")
    divides("model.kv_heads", "model.heads")
    divides("accumulation", "batch_size")
    if config.sequence_length > config.loss_chunk:
        divides("loss_chunk", "sequence_length")
    if config.schedule.warmup_steps + config.schedule.decay_steps > config.steps:
        raise UserError(
            f"config.schedule.warmup_steps={config.schedule.warmup_steps} and decay_steps="
            f"{config.schedule.decay_steps} are together more than config.steps={config.steps}"
        )
    if config.schedule.name != "wsd" and config.schedule.decay_steps:
        raise UserError(
            f"config.schedule.decay_steps={config.schedule.decay_steps} is for schedule 'wsd' only: "
            f"{config.schedule.name!r} decays until the last step"
        )
    if config.schedule.name == "wsd" and not config.schedule.decay_steps:
        raise UserError(
            "config.schedule.decay_steps=0: schedule 'wsd' needs the length of its decay"
        )
    mixture(config)
    if config.data.cut_documents == "continue" and not config.data.separate_documents:
        raise UserError(
            "config.data.cut_documents='continue' needs config.data.separate_documents=True: where "
            "attention crosses documents, coordinates are the block's"
        )
    segments.check_rule(config.segments.rule)
    positions.check(config)


def check_resumable(saved, config, workdir: str) -> None:
    """Raises UserError if the run of `saved` cannot go on with `config` in its workdir."""
    for name, before, now in _differences(saved, config, _FIXED_AT_START):
        # The separators follow from the rule and the tokenizer, which comes with the checkpoint.
        if name != "segments.separators":
            raise UserError(
                f"config.{name}={now!r}, but the run in {workdir} was started with {before!r}: use that "
                "value, or another --workdir"
            )


def check_startable(saved, config) -> None:
    """Raises UserError if a new run cannot start from the parameters of a run with `saved`."""
    for name, before, now in _differences(saved, config, _FIXED_BY_PARAMETERS):
        raise UserError(
            f"config.{name}={now!r}, but config.initial_checkpoint={config.initial_checkpoint} was "
            f"trained with {before!r}: use that value"
        )


def _differences(saved, config, fields: re.Pattern):
    """Yields (name, value in `saved`, value in `config`) of the fields that are not equal."""
    before, now = flatten(saved), flatten(config)
    for name in filter(fields.fullmatch, FIELDS):
        if _plain(before[name]) != _plain(now[name]):
            yield name, before[name], now[name]


def _plain(value):
    """Tuples as lists, as JSON has them."""
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def from_dict(plain: dict) -> ml_collections.ConfigDict:
    """The config that JSON holds: lists become tuples again."""
    return ml_collections.ConfigDict(_tuples(plain))
