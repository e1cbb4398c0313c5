"""Options of the model that are off by default: QK-norm, soft-cap, z-loss and dropout, in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from tiny import tiny_plan

from bipe_jax import model
from bipe_jax.data.batches import annotate
from bipe_jax.evaluation import caching
from bipe_jax.segments import Rule
from bipe_jax.training import optimizer, step
from tests.model.test_model import annotated, close, draw, draw_tokens

ALL = {
    "model__qk_norm": True,
    "model__logit_softcap": 4.0,
    "model__dropout": 0.25,
    "z_loss": 1e-3,
}


def batch_of(config, seed=0):
    rows = draw_tokens(seed, config.batch_size, config.sequence_length + 1)
    return annotate(rows.astype(np.int32), Rule((1, 2)))


def gradient_of(config, batch):
    """The loss, and the parameters after one step of the optimizer."""
    state = step.init_state(config, jax.random.key(0))
    state["params"] = draw(config)
    return jax.jit(functools.partial(step.train_step, config))(state, batch)


def test_dropped_numbers_are_the_formulas(monkeypatch):
    """The decoder with masks of ours, against the float64 decoder with the same masks."""
    config = tiny_plan(model__dropout=0.25)
    params, inputs = draw(config), annotated(draw_tokens(0, 2, 24))
    rng = np.random.default_rng(0)
    masks = [rng.random((2, 24, 32)) < 0.75 for _ in range(1 + 2)]
    # The layers are scanned: what a layer adds has the same mask in each of them here.
    calls = []

    def drop(x, rate, key, rows):
        calls.append(rate)
        return jnp.where(masks[min(len(calls) - 1, 2)], x / (1 - rate), 0)

    monkeypatch.setattr(model, "_drop", drop)
    rows = jnp.broadcast_to(jnp.arange(2)[:, None], (2, 24))
    hidden, output = model.hidden(config, params, inputs | {"rows": rows}, jax.random.key(0))
    assert calls == [0.25] * 3
    wanted = reference.logits(config, params, inputs, [mask / 0.75 for mask in masks])
    close(output.logits(hidden), wanted, atol=1e-5)


def test_a_share_is_dropped_and_what_depends_on_the_key_and_the_row_alone():
    x = jnp.ones((3, 64, 256))
    drop = functools.partial(model._drop, rate=0.25)
    dropped = drop(x, key=jax.random.key(1), rows=jnp.array([4, 5, 6]))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert np.asarray(dropped == 0).mean() == pytest.approx(
        0.25, abs=5 * (0.25 * 0.75 / x.size) ** 0.5
    )
    alone = drop(x[:1], key=jax.random.key(1), rows=jnp.array([6]))
    np.testing.assert_array_equal(alone[0], dropped[2])
    assert (dropped[0] != dropped[1]).any()
    assert (drop(x, key=jax.random.key(2), rows=jnp.array([4, 5, 6])) != dropped).any()


def test_each_step_drops_others_and_evaluation_drops_none():
    config = tiny_plan(**ALL)
    batch, state = batch_of(config), step.init_state(config, jax.random.key(0))
    run = jax.jit(functools.partial(step.train_step, config))
    losses = [float(run(state | {"step": jnp.int32(n)}, batch)[1]["loss"]) for n in (0, 1, 1)]
    assert losses[0] != losses[1] == losses[2]
    plain = reference.logits(config, state["params"], batch)
    close(model.apply(config, state["params"], batch), plain, atol=1e-5)


def test_layers_drop_differently():
    config = tiny_plan(model__dropout=0.5, position__absolute=())
    key = jax.random.key(0)
    seen = []

    def record(x, rate, key, rows):
        jax.debug.callback(lambda data: seen.append(data.tobytes()), jax.random.key_data(key))
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_drop", record)
        batch = batch_of(config)
        rows = np.zeros(batch["tokens"].shape, np.int32)
        jax.block_until_ready(model.hidden(config, draw(config), batch | {"rows": rows}, key))
        jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 1 + 2 * config.model.layers


@pytest.mark.parametrize(
    "other",
    [
        {"accumulation": 2},
        {"model__remat": "full"},
        pytest.param({"model__remat": "dots"}, marks=pytest.mark.slow),
    ],
)
def test_accumulation_and_remat_change_nothing(other):
    one, two = (tiny_plan(**ALL, **more) for more in ({}, other))
    (whole, a), (parts, b) = (gradient_of(c, batch_of(c)) for c in (one, two))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    moments = (jax.tree.leaves(state["optimizer"]) for state in (whole, parts))
    for x, y in zip(*moments, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)


def test_the_z_loss_is_minimised_and_reported_apart():
    config = tiny_plan(z_loss=0.01)
    batch = batch_of(config)
    logits = reference.logits(config, draw(config), batch)
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    _, values = gradient_of(config, batch)
    assert float(values["loss"]) == pytest.approx((log_z - picked).mean(), rel=1e-5)
    assert float(values["z_loss"]) == pytest.approx(0.01 * (log_z**2).mean(), rel=1e-5)
    _, plain = gradient_of(tiny_plan(), batch)
    assert "z_loss" not in plain and plain["gradient_norm"] != values["gradient_norm"]
    assert float(plain["loss"]) == pytest.approx(float(values["loss"]), rel=1e-6)


def test_decoding_has_the_norms_and_the_cap():
    config = tiny_plan(model__qk_norm=True, model__logit_softcap=4.0, model__kv_heads=2)
    params = draw(config)
    cache, inputs = caching.empty_cache(config, 1, 16), annotated(draw_tokens(3, 1, 12))
    wanted = reference.logits(config, params, inputs)[0]
    for first, last in ((0, 7), (7, 8), (8, 12)):
        part = {name: x[:, first:last] for name, x in inputs.items()}
        logits, cache = caching.extend(config, params, cache, part, jnp.array([last - first]))
        close(logits[0], wanted[last - 1], atol=1e-5)


def test_norms_in_attention_are_no_matrices_and_are_not_decayed():
    config = tiny_plan(model__qk_norm=True, optimizer__name="muon")
    params = model.init(config, jax.random.key(0))
    matrices = optimizer._muon_matrices(params, model.declared(config))["layers"]["attention"]
    decayed = optimizer.decay_mask(config, params)["layers"]["attention"]
    for name in ("query_norm", "key_norm"):
        assert matrices[name]["scale"] is None and not decayed[name]["scale"]
        assert params["layers"]["attention"][name]["scale"].shape == (2, 8)
    assert matrices["query"] is not None and decayed["query"]
