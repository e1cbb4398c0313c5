# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""A plan: a config whose text is parsed, which is what the program works with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from bipe_jax import config as configs
from bipe_jax import plugins, positions, segments, synthetic
from bipe_jax.config import Config, spec
from bipe_jax.errors import UserError
from bipe_jax.positions import Encodings
from bipe_jax.segments import Rule


@dataclasses.dataclass(frozen=True)
class Plan(Config):
    """A config, and what its text stands for. `make` and `of` build one, which is to check it.

    Attributes:
      encodings: all positional encodings of the model.
      training: the mixture of sources that `data.train` names.
      evaluated: the sources that `data.evaluation` names: one of text, or some of examples.
      rule: where segments end; None as long as that depends on a tokenizer that is not known yet.
      shards: of each source of training, in the order in which they are numbered; () until they are known.
    """

    encodings: Encodings = dataclasses.field(kw_only=True)
    training: spec.Mixture = dataclasses.field(kw_only=True)
    evaluated: tuple[spec.Source, ...] = dataclasses.field(kw_only=True)
    rule: Rule | None = dataclasses.field(kw_only=True)
    shards: tuple[tuple[spec.Shard, ...], ...] = dataclasses.field(kw_only=True, default=())

    @property
    def segment_rule(self) -> Rule:
        """The rule, where a tokenizer has settled it."""
        if self.rule is None:
            raise ValueError(f"the rule {self.segments.rule!r} needs a tokenizer: see `with_rule`")
        return self.rule

    @property
    def has_sets(self) -> bool:
        """Whether the targets of training are sets of tokens, see `data.examples`."""
        return any(task.has_sets for task in _tasks(self.training))

    @property
    def plugins(self) -> tuple[plugins.Plugin, ...]:
        """The plug-ins that the config names."""
        levels = segments.parse_levels(self.segments.levels)
        entries = (*self.encodings.absolute, *self.encodings.relative)
        named = [
            *((plugins.KINDS, entry.kind) for entry in entries),
            *((plugins.RULES, rule) for rule in (self.segments.rule, *(r for _, r in levels))),
            *((plugins.SOURCES, s.kind) for s in (*self.training.sources, *self.evaluated)),
        ]
        found = [plugins.find(group, name, ()) for group, name in dict.fromkeys(named)]
        return tuple(plugin for plugin in found if plugin)

    def replace(self, changes: Mapping[str, Any]) -> "Plan":
        """A plan with other values of some fields: `plan.replace({"model.remat": "full"})`.

        Raises:
          UserError: a value is wrong.
        """
        config = configs.parse(configs.to_dict(configs.replace(self, changes)))
        rule = self.rule if config.segments == self.segments else None
        return dataclasses.replace(of(config, rule), shards=self.shards)

    def with_rule(self, rule: Rule) -> "Plan":
        """The plan with the rule that a tokenizer has settled."""
        return dataclasses.replace(self, rule=rule)

    def with_shards(self, shards: tuple[tuple[spec.Shard, ...], ...]) -> "Plan":
        """The plan with the shards that its sources have."""
        return dataclasses.replace(self, shards=shards)


def make(config: Mapping[str, Any] | ml_collections.ConfigDict | Config) -> Plan:
    """The plan of a config, such as a config file returns it. Nothing is opened.

    Raises:
      UserError: one line that names the field, its value and what it must be.
    """
    return of(config if isinstance(config, Config) else configs.parse(config))


def of(config: Config, rule: Rule | None = None) -> Plan:
    """The plan of a checked config.

    Args:
      rule: that a tokenizer has settled, if it is known.

    Raises:
      UserError: the encodings, the segment rule or the sources make no sense.
    """
    training = spec.parse_mixture(config.data.train)
    _check_examples(config, training)
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
    return Plan(
        **own,
        encodings=positions.parse(config),
        training=training,
        evaluated=spec.parse_evaluation(config.data.evaluation, "config.data.evaluation"),
        rule=rule
        or segments.rule_without_tokenizer(
            config.segments.rule, segments.parse_levels(config.segments.levels)
        ),
    )


def _tasks(mixture: spec.Mixture) -> list[synthetic.Task]:
    """The synthetic tasks among the sources of a mixture."""
    return [
        synthetic.parse(source.path, "config.data.train")
        for source in mixture.sources
        if source.kind == spec.SYNTHETIC
    ]


def _check_examples(config: Config, training: spec.Mixture) -> None:
    """Raises UserError unless examples, if there are any, stay whole and apart."""
    names = [source.text for source in training.sources if source.kind in spec.OF_EXAMPLES]
    apart = config.data.packing == "row" or (
        config.data.packing == "document" and config.data.separate_documents
    )
    if names and not apart:
        raise UserError(
            f"config.data.train has the examples {names[0]!r}, which must stay whole: set "
            "config.data.packing='row', or 'document' with config.data.separate_documents=True"
        )
    if len(training.sources) > 1 and any(task.has_sets for task in _tasks(training)):
        raise UserError(
            f"config.data.train={training.text!r}: a task whose tokens have sets as labels is not mixed "
            "with other sources"
        )
