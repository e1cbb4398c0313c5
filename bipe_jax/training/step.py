"""The train state and the train step: pure functions of pytrees."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped

from bipe_jax import model, sharding
from bipe_jax.loss import cross_entropy_sum, sets_error_sum
from bipe_jax.plan import Plan
from bipe_jax.positions import draws
from bipe_jax.training import spikes
from bipe_jax.training.optimizer import learning_rate, make_optimizer

# Options of XLA by platform; all others are at XLA's defaults. XLA_FLAGS is left to the user.
OPTIONS = {
    "cpu": {},
    # Collectives run beside products instead of between them; off by default.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    # By default libtpu runs all-gathers beside products, and no other collectives.
    "tpu": {},
}

_DROPOUT = 1 << 16  # folded into a step's key; draws of coordinates fold in their numbers


def init_state(config: Plan, key: jax.Array) -> dict:
    """The state at step 0: {"step", "params", "optimizer"}."""
    params = model.init(config, key)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "optimizer": _optimizer(config).init(params),
    }


def _optimizer(config: Plan) -> optax.GradientTransformationExtraArgs:
    return spikes.guard(make_optimizer(config, model.declared(config)), config.spikes.threshold)


def _loss_sum(config: Plan, key, params, batch):
    hidden, output = model.hidden(config, params, batch, key)
    targets, weights = batch["targets"], batch["weights"]
    if "among" in batch:
        return sets_error_sum(hidden, output, targets, batch["among"], weights), {}
    return cross_entropy_sum(hidden, output, targets, weights, config.loss_chunk, config.z_loss)


def _with_dropout(config: Plan, step, batch: dict) -> tuple[dict, jax.Array | None]:
    """The batch with the numbers of its rows, and the step's key; without dropout the batch and None.

    What is dropped depends on the seed, the step and a row's number in the whole batch alone, so that
    resuming, accumulation and another mesh change nothing.
    """
    if not config.model.dropout:
        return batch, None
    tokens = batch["tokens"]
    rows = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], tokens.shape)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    return batch | {"rows": rows}, jax.random.fold_in(key, _DROPOUT)


def train_step(config: Plan, state: dict, batch: dict) -> tuple[dict, dict]:
    """One update by the mean loss over the batch's weighted targets, tokens or sets of them.

    With `accumulation` > 1 the batch is computed in parts, whose summed losses and gradients are
    divided by the whole batch's weight: the update is the same as in one part.

    Args:
      state: from `init_state`.
      batch: (B, L) arrays, see `data.batches.annotate`.

    Returns:
      The next state, and metrics: "loss" (nats a token), "gradient_norm", "learning_rate",
      "targets" (their number), "spike" (1 if the step is one, see `spikes`, else 0), "skipped_updates"
      (spikes so far) and, with `z_loss`, that term, which "loss" does not contain; losses and the norm are
      of the parameters before the update.
    """
    batch = draws.apply(config.encodings.draws, config.seed, state["step"], batch)
    batch, key = _with_dropout(config, state["step"], batch)
    gradient = jax.value_and_grad(functools.partial(_loss_sum, config, key), has_aux=True)
    params, parts = state["params"], config.accumulation

    if parts == 1:
        (loss, terms), grads = gradient(params, batch)
    else:

        def split(x):  # without moving rows between devices
            rows = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
            return jnp.moveaxis(rows, 1, 0)

        def add(total, part):
            part = jax.tree.map(lambda x: sharding.constrain(x, "tokens"), part)
            # The barrier keeps XLA from moving all-reduces out of this loop, which fails to compile
            # for TPUs with fsdp (RET_CHECK in while_loop_all_reduce_code_motion, libtpu 0.0.42).
            sums = jax.lax.optimization_barrier(gradient(params, part))
            return jax.tree.map(jnp.add, total, sums), None

        has_terms = config.z_loss and "among" not in batch
        terms = {"loss": jnp.float32(0), "z_loss": jnp.float32(0)} if has_terms else {}
        zero = ((jnp.float32(0), terms), jax.tree.map(jnp.zeros_like, params))
        ((loss, terms), grads), _ = jax.lax.scan(add, zero, jax.tree.map(split, batch))

    count = jnp.maximum(batch["weights"].sum(), 1)
    losses = {name: total / count for name, total in ({"loss": loss} | terms).items()}
    grads = jax.tree.map(lambda g: g / count, grads)
    norm = optax.tree.norm(grads)
    skipped = state["optimizer"].skipped
    updates, optimizer = _optimizer(config).update(
        grads, state["optimizer"], params, loss=losses["loss"], norm=norm
    )
    assert isinstance(optimizer, spikes.State)
    metrics = {
        **losses,
        "gradient_norm": norm,
        "learning_rate": learning_rate(config)(state["step"] - skipped),
        "targets": count,
        "skipped_updates": optimizer.skipped,
        "spike": optimizer.skipped - skipped,
    }
    return {
        "step": state["step"] + 1,
        "params": optax.apply_updates(params, updates),
        "optimizer": optimizer,
    }, metrics


def compile_on(config: Plan, mesh: Mesh) -> tuple[Wrapped, Wrapped, dict]:
    """`init` and `step`, jitted with explicit shardings on a mesh.

    Returns:
      init: key -> state. step: (state, batch) -> (state, metrics); the state is donated. abstract: the
      state's shapes, dtypes and shardings.
    """
    # No array is made here: the devices of the mesh need not exist, see `preflight`.
    shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
    shardings = sharding.state_shardings(mesh, shapes, model.declared(config))
    init = jax.jit(functools.partial(init_state, config), out_shardings=shardings)
    step = jax.jit(
        functools.partial(train_step, config),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=OPTIONS[sharding.platform(mesh.abstract_mesh)],
    )
    abstract = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )
    return init, step, abstract
