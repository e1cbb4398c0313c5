"""Optimizers and schedules, from optax."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from bipe_jax.config import Config
from bipe_jax.sharding import Declaration, names


def _linear(peak, config, steps):
    return optax.linear_schedule(peak, peak * config.final_fraction, steps)


def _cosine(peak, config, steps):
    return optax.cosine_decay_schedule(peak, steps, alpha=config.final_fraction)


def _wsd(peak, config, steps):
    stable = steps - config.decay_steps
    decay = _linear(peak, config, config.decay_steps)
    return optax.join_schedules([optax.constant_schedule(peak), decay], [stable])


SCHEDULES = {"linear": _linear, "cosine": _cosine, "wsd": _wsd}


def learning_rate(config: Config) -> optax.Schedule:
    """The learning rate by step, from 0: linear warm-up, then the schedule `schedule.name`."""
    peak, warmup = config.optimizer.learning_rate, config.schedule.warmup_steps
    main = SCHEDULES[config.schedule.name](peak, config.schedule, max(config.steps - warmup, 1))
    # Step s of the warm-up has (s + 1) / warmup of the peak, so that step 0 updates too.
    growth = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([growth, main], [warmup])


def decay_mask(config: Config, params: Any) -> Any:
    """A tree of booleans: which parameters are decayed (`optimizer.no_decay` names the others)."""
    return jax.tree.map(
        lambda name: not any(part in name for part in config.optimizer.no_decay), names(params)
    )


def _adamw(config, schedule, mask, declared):
    o = config.optimizer
    return optax.adamw(
        schedule, o.beta1, o.beta2, o.epsilon, weight_decay=o.weight_decay, mask=mask
    )


def _lion(config, schedule, mask, declared):
    o = config.optimizer
    return optax.lion(schedule, o.beta1, o.beta2, weight_decay=o.weight_decay, mask=mask)


def _muon(config, schedule, mask, declared):
    o = config.optimizer
    directions = optax.contrib.muon(
        learning_rate=1.0,
        beta=o.beta1,
        eps=o.epsilon,
        adam_b2=o.beta2,
        muon_weight_dimension_numbers=lambda params: _muon_matrices(params, declared),
        # Updates have the size of AdamW's, so that one learning rate serves both (Liu et al. 2025).
        consistent_rms=0.2,
    )
    return optax.chain(
        directions,
        optax.scale(-1.0),  # muon's own minus sign; decay is added before the learning rate's
        optax.add_decayed_weights(o.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def _muon_matrices(params, declared: Mapping[str, Declaration]):
    """The parameters that Muon orthogonalises, layer by layer: the matrices of the layers.

    Adam updates norms, tables, the output kernel and parameters of encodings.
    """

    def numbers(name, leaf):
        _, inputs, stacked = declared[name]
        if not (inputs and stacked):
            return None
        # Dimension 0 is that of the layers.
        reduced, output = tuple(range(1, inputs + 1)), tuple(range(inputs + 1, leaf.ndim))
        return optax.contrib.MuonDimensionNumbers(reduction_axis=reduced, output_axis=output)

    return jax.tree.map(numbers, names(params), params)


OPTIMIZERS = {"adamw": _adamw, "lion": _lion, "muon": _muon}


def make_optimizer(
    config: Config, declared: Mapping[str, Declaration]
) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer `optimizer.name`.

    Args:
      declared: the model's parameters, see `model.declared`.
    """

    def mask(params):
        return decay_mask(config, params)

    inner = OPTIMIZERS[config.optimizer.name](config, learning_rate(config), mask, declared)
    limit = config.optimizer.clip_norm
    # Both have an empty state, so that a run can be resumed with another limit.
    clip = optax.clip_by_global_norm(limit) if limit else optax.identity()
    return optax.chain(clip, inner)
