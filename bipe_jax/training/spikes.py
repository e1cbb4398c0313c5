"""Spikes: steps whose loss or gradient is not finite, or far above those of the steps before.

The update of a spike is never applied. `spikes.policy` chooses whether the run continues, rewinds or stops.
"""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bipe_jax.errors import UserError

_LOG = logging.getLogger(__name__)

ADVICE = "lower config.optimizer.learning_rate or raise config.schedule.warmup_steps"
_HORIZON = 128  # steps that the running mean and variance remember
_FIRST = 32  # steps before the first judgement

_MOST_SKIPPED = 25  # in a row
_MOST_REWINDS = 3  # to the same checkpoint


class State(NamedTuple):
    """Statistics of the loss and the gradient's norm over the steps that were no spikes."""

    mean: jax.Array  # (2,)
    variance: jax.Array  # (2,)
    steps: jax.Array  # number of steps that were no spikes
    skipped: jax.Array  # number of spikes
    inner: optax.OptState


def guard(
    inner: optax.GradientTransformation, threshold: float
) -> optax.GradientTransformationExtraArgs:
    """The optimizer `inner`, without the updates of spikes.

    `update` also takes `loss`, and `norm` of the gradient. With the exponentially weighted mean m and
    variance v of either, x is a spike if it is not finite or x > m + threshold sqrt(v). A spike changes
    no state but the count of spikes, so that the schedule skips it too.

    Args:
      threshold: standard deviations; 0: only values that are not finite are spikes.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> State:
        # Each leaf is an array of its own, so that the state can be donated.
        zeros = functools.partial(jnp.zeros, 2, jnp.float32)
        zero = functools.partial(jnp.zeros, (), jnp.int32)
        return State(zeros(), zeros(), zero(), zero(), inner.init(params))

    def update(updates, state, params=None, **values):
        x = jnp.stack([values["loss"], values["norm"]]).astype(jnp.float32)
        usual = jnp.isfinite(x).all()
        if threshold:
            limit = state.mean + threshold * jnp.sqrt(state.variance)
            usual &= (state.steps < _FIRST) | (x <= limit).all()
        # The plain mean and variance over the first steps; then weights decay over the horizon.
        weight = 1.0 / jnp.minimum(state.steps + 1, _HORIZON).astype(jnp.float32)
        away = x - state.mean
        updates, new_inner = inner.update(updates, state.inner, params)
        new = State(
            state.mean + weight * away,
            (1 - weight) * (state.variance + weight * away**2),
            state.steps + 1,
            state.skipped,
            new_inner,
        )
        old = state._replace(skipped=state.skipped + 1)
        new = jax.tree.map(lambda n, o: jnp.where(usual, n, o), new, old)
        return jax.tree.map(lambda u: jnp.where(usual, u, 0), updates), new

    return optax.GradientTransformationExtraArgs(init, update)


class Watch:
    """Decides what a run does after a spike, by `spikes.policy`.

    Args:
      rewound: the attribute, as an earlier start of the run has saved it.

    Attributes:
      skipping: whether the last step was skipped.
      rewound: where the last rewind went to (a step, None: the beginning), and how many in a row did.
    """

    def __init__(self, policy: str, rewound: tuple[int | None, int] = (None, 0)):
        self._policy = policy
        self._in_a_row = 0
        self.rewound = rewound

    @property
    def skipping(self) -> bool:
        return self._in_a_row > 0

    def __call__(self, number: int, values: dict, latest: int | None) -> bool:
        """Judges a step.

        Args:
          number: of the step. values: its metrics, from `step.train_step`.
          latest: the step of the last complete checkpoint, or None; of policy "rewind", that of the
            checkpoint to rewind to.

        Returns:
          Whether to rewind to that checkpoint.

        Raises:
          UserError: the step is a spike and the policy is to stop, or there are too many spikes.
        """
        self._in_a_row = self._in_a_row + 1 if values["spike"] else 0
        if not values["spike"]:
            return False
        spike = (
            f"step {number}: loss is {float(values['loss']):g}, norm of the gradient "
            f"{float(values['gradient_norm']):g}"
        )
        where = (
            "no checkpoint yet" if latest is None else f"the last good checkpoint is step {latest}"
        )
        if self._policy == "stop":
            raise UserError(f"{spike}; {where}: {ADVICE}, or set config.spikes.policy")
        if self._policy == "skip":
            _LOG.info(f"{spike}: skipped, {int(values['skipped_updates'])} in all")
            if self._in_a_row == _MOST_SKIPPED:
                raise UserError(
                    f"{spike}; {_MOST_SKIPPED} steps in a row were skipped; {where}: {ADVICE}"
                )
            return False
        to, rewinds = self.rewound
        self.rewound = (latest, rewinds + 1 if to == latest else 1)
        if self.rewound[1] > _MOST_REWINDS:
            raise UserError(
                f"{spike}, after {_MOST_REWINDS} rewinds to one checkpoint; {where}: {ADVICE}"
            )
        _LOG.info(f"{spike}: rewinding to step {latest or 0}; the data since then are skipped")
        return True
