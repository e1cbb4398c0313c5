"""Trains a model: python -m bipe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Running the same command again goes on from the last checkpoint. At the end the checkpoint is
evaluated at 1 to 16 times its training length.
"""

import contextlib
import math
import os

import jax
from absl import flags

from bipe_jax import cli, evaluate, finetune, metrics, observe, segments, sharding, tokenizer
from bipe_jax.checkpoint import Checkpoints, quiet
from bipe_jax.compiling import enable_cache
from bipe_jax.config import check_resumable, validate
from bipe_jax.data.batches import Batches
from bipe_jax.errors import UserError
from bipe_jax.observe import trace, wandb_board
from bipe_jax.step import compile_on

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, plots")
_STOP_AT = flags.DEFINE_integer(
    "stop_at", None, "Train to this step, save and exit as though preempted", lower_bound=1
)
_PROFILE = flags.DEFINE_string("profile", None, "Steps to trace into WORKDIR/profile, FIRST:LAST")


def train(config, workdir: str, stop_at: int | None = None, watch=None) -> bool:
    """Trains until `config.steps`, or until `stop_at`, going on from the latest checkpoint.

    Writes WORKDIR/checkpoints, metrics.jsonl, tensorboard, events.jsonl, heartbeat.json and, if it trains
    one, tokenizer.model.

    Args:
      watch: an `observe.Watch` that goes on watching afterwards; None: one of its own.

    Returns:
      Whether all steps are done.

    Raises:
      UserError: a wrong input; see the README. Checkpoints that were complete stay as they are.
    """
    validate(config)
    config = config.copy_and_resolve_references()
    _make_writable(workdir)
    mesh = sharding.make_mesh(config)
    sharding.check_batch(config, mesh)

    with contextlib.ExitStack() as stack:
        watch = watch or stack.enter_context(observe.Watch())
        watch.open(workdir)
        # What an earlier run left, and what can go on or start from it.
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint.keep))
        saved = checkpoints.meta()
        if saved:
            check_resumable(saved.config, config, workdir)
        source = saved or finetune.source(config)
        tokens = tokenizer.choose(config, workdir, source and source.tokenizer)
        rule = segments.resolve(config.segments.rule, tokens.pieces())
        config.segments.separators = rule.separators

        # The data, the state and the compiled step.
        reader = sharding.reader(mesh, config.batch_size)
        batches = Batches(config, tokens, reader=reader)
        stack.enter_context(contextlib.closing(batches))
        stack.enter_context(jax.set_mesh(mesh))
        init, step, abstract = compile_on(config, mesh)
        if saved:
            state, data_state = checkpoints.restore(abstract)
            batches.set_state_of(data_state["readers"])
            cli.say(f"Going on from step {saved.step} of {workdir}")
        else:
            state = init(jax.random.key(config.seed))
            if source:
                state["params"] = finetune.start(config, source.step, mesh, state["params"])
        first, last = int(state["step"]), min(config.steps, stop_at or config.steps)
        log = stack.enter_context(
            metrics.Log(config, workdir, first, tokens, lambda: batches.report() | watch.report())
        )

        # The loop. Step n - 1 is reported after step n is dispatched, so that devices never wait.
        def report(number, batch, values):
            values = watch.complete(number, values)
            log.write(number, batch, values, full=number % config.log.every == 0 or number == last)
            if not all(math.isfinite(values[name]) for name in ("loss", "gradient_norm")):
                raise UserError(
                    f"step {number}: loss is {values['loss']}, norm of the gradient "
                    f"{values['gradient_norm']}; the last good checkpoint is step "
                    f"{checkpoints.latest} in {checkpoints.directory}: lower "
                    "config.optimizer.learning_rate or raise config.schedule.warmup_steps"
                )

        pending = None
        for number in range(first + 1, last + 1):
            with watch.phase("data"):
                batch = next(batches)
                placed = sharding.place_batch(mesh, batch, reader[1])
            state, values = watch.step(number, step, state, placed)
            if pending:
                report(*pending)
            pending = (number, batch, values)
            checkpoints.check()
            if number % config.checkpoint.every == 0 or number == last:
                report(*pending)  # what is not finite is never saved
                pending = None
                readers = sharding.of_all_processes(batches.get_state())
                with watch.saving():
                    checkpoints.save(state, {"readers": readers}, config, tokens)
        with watch.phase("saving"):
            checkpoints.wait()
        if last < config.steps:
            watch.preempted()
    return last == config.steps


def _make_writable(workdir: str) -> None:
    probe = os.path.join(workdir, ".writable")
    try:
        os.makedirs(workdir, exist_ok=True)
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError(f"--workdir={workdir} is not writable: {error.strerror}") from None


def main(_):
    if cli.CONFIG.value is None or _WORKDIR.value is None:
        raise UserError("--config=FILE and --workdir=DIR are needed")
    quiet()
    enable_cache()
    validate(cli.CONFIG.value)
    wandb_board.check(cli.CONFIG.value)
    # What the evaluation at the end would refuse is refused before the training.
    evaluate.resolve(evaluate.Settings(), cli.CONFIG.value)
    last = min(cli.CONFIG.value.steps, _STOP_AT.value or cli.CONFIG.value.steps)
    profile = trace.parse(_PROFILE.value, last)
    with observe.Watch(observe.process_start(), profile) as watch:
        if train(cli.CONFIG.value, _WORKDIR.value, _STOP_AT.value, watch):
            with watch.phase("evaluating"):
                evaluate.evaluate(_WORKDIR.value)


if __name__ == "__main__":
    cli.run_with_flags(main)
