# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""A plan: a config whose text is parsed, which is what the program works with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from bipe_jax import config as configs
from bipe_jax import positions, segments
from bipe_jax.config import Config, spec
from bipe_jax.positions import Encodings
from bipe_jax.segments import Rule


@dataclasses.dataclass(frozen=True)
class Plan(Config):
    """A config, and what its text stands for. `make` and `of` build one, which is to check it.

    Attributes:
      encodings: all positional encodings of the model.
      training: the mixture of sources that `data.train` names.
      evaluated: the source that `data.evaluation` names.
      rule: where segments end; None as long as that depends on a tokenizer that is not known yet.
      shards: of each source of training, in the order in which they are numbered; () until they are known.
    """

    encodings: Encodings = dataclasses.field(kw_only=True)
    training: spec.Mixture = dataclasses.field(kw_only=True)
    evaluated: spec.Source = dataclasses.field(kw_only=True)
    rule: Rule | None = dataclasses.field(kw_only=True)
    shards: tuple[tuple[spec.Shard, ...], ...] = dataclasses.field(kw_only=True, default=())

    @property
    def segment_rule(self) -> Rule:
        """The rule, where a tokenizer has settled it."""
        if self.rule is None:
            raise ValueError(f"the rule {self.segments.rule!r} needs a tokenizer: see `with_rule`")
        return self.rule

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
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
    return Plan(
        **own,
        encodings=positions.parse(config),
        training=spec.parse_mixture(config.data.train),
        evaluated=spec.parse_evaluation(config.data.evaluation, "config.data.evaluation"),
        rule=rule or segments.rule_without_tokenizer(config.segments.rule),
    )
