"""Perplexity on held-out text during training, every `config.evaluation.every` steps.

It is measured at the training length and at one longer length, on the same target tokens, by the protocol
same-tokens of `protocols`. Parameters stay on the devices that train them.
"""

import logging

import jax

from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import UserError
from bipe_jax.evaluation import evaluator, loaded, perplexity
from bipe_jax.evaluation.protocols import protocol
from bipe_jax.loss import perplexity as perplexity_of
from bipe_jax.plan import Plan

_LOG = logging.getLogger(__name__)


def lengths(config: Plan) -> tuple[int, ...]:
    """The training length, and the next length of `evaluation.lengths` above it.

    Without such a length the second is twice the training length, if the model can be run there.

    Raises:
      UserError: the model cannot be run at the longer length.
    """
    training = config.sequence_length
    if longer := [length for length in config.evaluation.lengths if length > training]:
        chosen = (training, min(longer))
    else:
        chosen = perplexity.default_lengths(config, (1, 2))
    perplexity.check_lengths(config, chosen)
    return chosen


class PeriodicEvaluation:
    """Scores the parameters of a training; reads the data and compiles once.

    All processes of the run make one, and call it for the same steps.

    Args:
      config: of the run, with its segment rule. mesh: of the run.

    Raises:
      UserError: `data.evaluation` cannot be read, no document is long enough, or a length does not
        divide over `mesh.context`; and as `lengths`.
    """

    def __init__(self, config: Plan, mesh: jax.sharding.Mesh, tokenizer: Tokenizer):
        chosen = lengths(config)
        context = max(evaluator.default_context(config), *chosen)
        settings = evaluator.resolve(evaluator.Settings(chosen, context=context), config)
        for length in settings.lengths:
            if length % mesh.shape["context"]:
                raise UserError(
                    f"config.evaluation.lengths={tuple(config.evaluation.lengths)}: with "
                    f"config.evaluation.every={config.evaluation.every} the length {length} must divide "
                    f"over config.mesh.context={mesh.shape['context']}"
                )
        self._evaluation = perplexity.Evaluation(
            loaded.LoadedModel(loaded.with_exact_encodings(config), {}, mesh, tokenizer),
            evaluator.read_targets(config, tokenizer, settings),
            settings.lengths,
            protocol(settings.protocol, settings.lengths, settings.context),
            _LOG.info,
        )

    def __call__(self, params: dict) -> list[dict]:
        """Scores parameters, in place and without changing them.

        Returns:
          For each set and length {"set", "length", "loss" (nats a token), "tokens" (number of targets)}.
          The loss of parameters that have diverged is not finite.
        """
        return [
            {
                "set": targets.set,
                "length": length,
                "loss": tally.loss,
                "tokens": sum(targets.to_json()["tokens"]),
            }
            for targets, length, tally in self._evaluation.tallies(params)
        ]


def metrics(rows: list[dict]) -> dict[str, float]:
    """The rows as metrics: evaluation/SET/LENGTH/loss and evaluation/SET/LENGTH/perplexity."""
    values = {}
    for row in rows:
        name = f"evaluation/{row['set']}/{row['length']}"
        values |= {f"{name}/loss": row["loss"], f"{name}/perplexity": perplexity_of(row["loss"])}
    return values


def summary(rows: list[dict]) -> str:
    """The perplexity of all sets together at each length, for the progress bar."""
    parts = []
    for length in dict.fromkeys(row["length"] for row in rows):
        of_length = [row for row in rows if row["length"] == length]
        total = sum(row["loss"] * row["tokens"] for row in of_length)
        mean = total / sum(row["tokens"] for row in of_length)
        parts.append(f"{perplexity_of(mean):.2f} at {length:,}")
    return f"held-out perplexity {', '.join(parts)}"
