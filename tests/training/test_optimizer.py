"""Schedules and optimizers against plain formulas in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_plan

from bipe_jax import model, sharding
from bipe_jax.config import fields
from bipe_jax.data.batches import annotate
from bipe_jax.segments import Rule
from bipe_jax.training import optimizer
from bipe_jax.training.optimizer import decay_mask, learning_rate, make_optimizer

PEAK = 3e-3
STEPS = 50


def plain_rate(name, s, warmup, decay, final):
    """The learning rate of step s, from 0."""
    if s < warmup:
        return PEAK * (s + 1) / warmup
    if name == "linear":
        done = (s - warmup) / (STEPS - warmup)
        return PEAK * (1 - done) + PEAK * final * done
    if name == "cosine":
        half_turn = math.cos(math.pi * (s - warmup) / (STEPS - warmup))
        return PEAK * (final + (1 - final) * (1 + half_turn) / 2)
    done = max(0, s - (STEPS - decay)) / decay
    return PEAK * (1 - done) + PEAK * final * done


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "warmup", "decay"),
    [
        ("linear", 0, 0),
        ("linear", 1, 0),
        ("linear", 10, 0),
        ("linear", STEPS, 0),
        ("cosine", 0, 0),
        ("cosine", 10, 0),
        ("wsd", 0, STEPS),
        ("wsd", 10, 15),
        ("wsd", 10, 40),
        ("wsd", 1, 1),
    ],
)
def test_schedules_equal_plain_formulas_at_every_step(name, warmup, decay, final):
    config = tiny_plan(
        steps=STEPS,
        schedule__name=name,
        schedule__warmup_steps=warmup,
        schedule__decay_steps=decay,
        schedule__final_fraction=final,
        optimizer__learning_rate=PEAK,
    )
    rate = jax.vmap(learning_rate(config))(jnp.arange(STEPS))
    expected = [plain_rate(name, s, warmup, decay, final) for s in range(STEPS)]
    np.testing.assert_allclose(rate, expected, rtol=1e-5, atol=1e-7 * PEAK)
    assert max(rate) == pytest.approx(PEAK)
    assert min(rate) > 0


def random_like(params, seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(scale * generator.standard_normal(p.shape), jnp.float32), params
    )


def parameters(**overrides):
    config = tiny_plan(schedule__warmup_steps=2, optimizer__learning_rate=0.01, **overrides)
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    return config, random_like(shapes, 1)


def by_name(tree) -> dict:
    names = jax.tree.leaves(sharding.names(tree))
    return dict(zip(names, map(np.float64, jax.tree.leaves(tree)), strict=True))


def updates(config, params, gradients) -> list[dict]:
    """The updates of consecutive steps on parameters that stay as they are, by name."""
    made = make_optimizer(config, model.declared(config))
    state = made.init(params)
    update = jax.jit(made.update)
    found = []
    for gradient in gradients:
        change, state = update(gradient, state, params)
        found.append(by_name(change))
    return found


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_equals_a_plain_formula(clip):
    """Kingma & Ba 2015, algorithm 1, with decoupled decay (Loshchilov & Hutter 2019)."""
    config, params = parameters(
        optimizer__clip_norm=clip,
        optimizer__weight_decay=0.1,
        optimizer__beta1=0.8,
        optimizer__beta2=0.95,
        optimizer__epsilon=1e-3,
        optimizer__no_decay=("norm/scale", "embed/"),
    )
    gradients = [random_like(params, seed, scale=0.02) for seed in (2, 3, 4)]
    first = {name: 0.0 for name in by_name(params)}
    second = dict(first)
    for t, (gradient, found) in enumerate(
        zip(map(by_name, gradients), updates(config, params, gradients), strict=True), 1
    ):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        assert norm > 0.5
        rate = [0.005, 0.01, 0.01][t - 1]  # two steps of warm-up, then the peak
        for name, p in by_name(params).items():
            g = gradient[name] * (min(1, clip / norm) if clip else 1)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            direction = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-3)
            decayed = "norm/scale" not in name and not name.startswith("embed/")
            expected = -rate * (direction + (0.1 * p if decayed else 0))
            np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_weight_decay_spares_the_parameters_that_are_named(name):
    """Without a gradient, decay is all that an optimizer does."""
    config, params = parameters(
        optimizer__name=name,
        optimizer__weight_decay=0.1,
        optimizer__no_decay=("norm/scale", "absolute/"),
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    (found,) = updates(config, params, [zero])
    spared = {
        "norm/scale",
        "layers/attention_norm/scale",
        "layers/feed_forward_norm/scale",
        "absolute/learned_offset/table",
    }
    assert spared < found.keys()
    for parameter, p in by_name(params).items():
        expected = 0 * p if parameter in spared else -0.005 * 0.1 * p
        np.testing.assert_allclose(found[parameter], expected, rtol=1e-6, err_msg=parameter)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(("schedule", "decay"), [("linear", 0), ("cosine", 0), ("wsd", 15)])
def test_the_rate_of_each_update_is_that_of_its_step(schedule, decay, final):
    """From the first step to the last: Lion's updates are of the rate's size."""
    config, params = parameters(
        steps=STEPS,
        optimizer__name="lion",
        optimizer__weight_decay=0.0,
        schedule__name=schedule,
        schedule__decay_steps=decay,
        schedule__final_fraction=final,
    )
    gradient = random_like(params, 2)
    found = updates(config, params, [gradient] * STEPS)
    for s, update in enumerate(found):
        expected = plain_rate(schedule, s, 2, decay, final) / PEAK * 0.01
        for name, g in by_name(gradient).items():
            np.testing.assert_allclose(update[name], -expected * np.sign(g), rtol=2e-5, atol=1e-10)


def test_the_mask_of_base_spares_norms_alone():
    config, params = parameters()
    mask = by_name(decay_mask(config, params))
    assert {name for name, decayed in mask.items() if not decayed} == {
        "norm/scale",
        "layers/attention_norm/scale",
        "layers/feed_forward_norm/scale",
    }


def test_lion_equals_a_plain_formula():
    """Chen et al. 2023, algorithm 2: the sign of an interpolation, another one is kept."""
    config, params = parameters(
        optimizer__name="lion",
        optimizer__clip_norm=0.0,
        optimizer__weight_decay=0.0,
        optimizer__beta1=0.9,
        optimizer__beta2=0.5,
    )
    gradients = [random_like(params, seed) for seed in (2, 3)]
    moment = {name: 0.0 for name in by_name(params)}
    for rate, gradient, found in zip(
        (0.005, 0.01), map(by_name, gradients), updates(config, params, gradients), strict=True
    ):
        for name, g in gradient.items():
            mixed = 0.9 * moment[name] + 0.1 * g
            certain = np.abs(mixed) > 1e-6
            np.testing.assert_allclose(
                found[name][certain], -rate * np.sign(mixed[certain]), rtol=1e-6, err_msg=name
            )
            moment[name] = 0.5 * moment[name] + 0.5 * g


def test_muon_turns_each_matrix_of_each_layer_by_itself():
    """Two steps, against optax's Muon on that one matrix: inputs x outputs, heads joined."""
    config, params = parameters(
        optimizer__name="muon",
        optimizer__beta1=0.9,
        optimizer__clip_norm=0.0,
        optimizer__weight_decay=0.1,
        model__kv_heads=2,
    )
    gradients = [random_like(params, seed) for seed in (2, 3)]
    found = updates(config, params, gradients)
    shapes = {  # width 32, 4 heads and 2 key/value heads of 8, feed-forward 48
        "layers/attention/query": (32, 32),
        "layers/attention/key": (32, 16),
        "layers/attention/value": (32, 16),
        "layers/attention/output": (32, 32),
        "layers/feed_forward/gate": (32, 48),
        "layers/feed_forward/up": (32, 48),
        "layers/feed_forward/down": (48, 32),
    }
    single = optax.contrib.muon(
        lambda s: jnp.where(s == 0, 0.005, 0.01), beta=0.9, weight_decay=0.1, consistent_rms=0.2
    )
    one_step = jax.jit(single.update)
    for name, shape in shapes.items():
        for layer in range(2):
            matrix = jnp.float32(by_name(params)[name][layer].reshape(shape))
            state = single.init(matrix)
            for gradient, change in zip(gradients, found, strict=True):
                g = jnp.float32(by_name(gradient)[name][layer].reshape(shape))
                expected, state = one_step(g, state, matrix)
                np.testing.assert_allclose(
                    change[name][layer].reshape(shape), expected, rtol=1e-3, atol=2e-6, err_msg=name
                )


def test_muon_leaves_tables_norms_and_the_output_to_adam():
    """Nesterov's Adam (Dozat 2016) with beta1 0.9, as optax has it beside Muon."""
    config, params = parameters(
        optimizer__name="muon",
        optimizer__beta2=0.95,
        optimizer__clip_norm=0.0,
        optimizer__weight_decay=0.0,
        optimizer__epsilon=1e-3,
    )
    gradient = random_like(params, 2)
    (found,) = updates(config, params, [gradient])
    rest = {
        "embed/table",
        "absolute/learned_offset/table",
        "norm/scale",
        "layers/attention_norm/scale",
        "layers/feed_forward_norm/scale",
        "output/kernel",
    }
    for name in rest:
        g = by_name(gradient)[name]
        first = 0.9 * (0.1 * g / (1 - 0.9**2)) + 0.1 * g / (1 - 0.9)
        expected = -0.005 * first / (np.abs(g) + 1e-3)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.fixture(scope="module")
def loss():
    """The loss of one batch and its gradient, compiled once."""
    config, _ = parameters()
    ids = np.random.default_rng(0).integers(0, 64, (4, 17), dtype=np.int32)
    batch = annotate(ids, Rule(separators=(1, 2)))

    def mean(params):
        logits = model.apply(config, params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    return jax.jit(jax.value_and_grad(mean))


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_the_loss_falls(name, loss):
    config, params = parameters(optimizer__name=name, steps=40)
    config = config.replace({"optimizer.learning_rate": 3e-3})
    params = jax.tree.map(
        lambda name, p: jnp.ones_like(p) if name.endswith("scale") else 0.02 * p,
        sharding.names(params),
        params,
    )
    made = make_optimizer(config, model.declared(config))
    state = made.init(params)
    update = jax.jit(made.update)
    losses = []
    for _ in range(config.steps):
        value, gradient = loss(params)
        losses.append(float(value))
        change, state = update(gradient, state, params)
        params = optax.apply_updates(params, change)
    assert losses[0] == pytest.approx(math.log(64), abs=0.1)
    assert losses[-1] < 0.7 * losses[0]


def test_the_table_of_fields_has_the_names_that_exist():
    assert tuple(optimizer.OPTIMIZERS) == fields.OPTIMIZERS
    assert tuple(optimizer.SCHEDULES) == fields.SCHEDULES
    assert tuple(model.REMAT_POLICIES) == fields.REMATS


@pytest.mark.parametrize("relative", [("t5", "position"), ("t5", "position", ("shared", False))])
def test_parameters_of_relative_encodings_are_neither_decayed_nor_muons(relative):
    config, params = parameters(position__relative=(relative,), optimizer__name="muon")
    decayed = by_name(decay_mask(config, params))
    names = [name for name in decayed if "relative/" in name]
    assert len(names) == 1 and not decayed[names[0]] and decayed["layers/attention/query"]
    matrices = optimizer._muon_matrices(params, model.declared(config))
    chosen = {
        n
        for n, m in zip(
            decayed,
            jax.tree.leaves(matrices, is_leaf=_is_choice),
            strict=True,
        )
        if m
    }
    assert chosen == {
        *(f"layers/attention/{name}" for name in ("query", "key", "value", "output")),
        *(f"layers/feed_forward/{name}" for name in ("gate", "up", "down")),
    }


def _is_choice(x):
    return x is None or isinstance(x, tuple)
