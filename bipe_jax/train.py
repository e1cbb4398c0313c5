"""Trains a model: python -m bipe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Running the same command again goes on from the last checkpoint. At the end the checkpoint is
evaluated at 1 to 16 times its training length.
"""

import base64
import contextlib
import itertools
import logging
import sys

import jax

from bipe_jax import cli, collectives, plan, processes, segments, sharding
from bipe_jax.checkpoint import Checkpoints, quiet
from bipe_jax.config import check_resumable, from_json, to_json
from bipe_jax.data import tokenizer, vocabulary
from bipe_jax.data.batches import Batches
from bipe_jax.errors import PREEMPTED, UserError
from bipe_jax.evaluate import Settings, evaluate, resolve
from bipe_jax.training import failures, finetune, metrics, observing, spikes
from bipe_jax.training.compiling import enable_cache
from bipe_jax.training.observing import trace, wandb_board
from bipe_jax.training.step import compile_on
from bipe_jax.workdir import Workdir, files, workdir_argument

_LOG = logging.getLogger("bipe_jax.train")


def train(config, workdir: str, stop_at: int | None = None, observer=None) -> bool:
    """Trains until `config.steps`, or until `stop_at` or SIGTERM, going on from the latest checkpoint.

    Writes WORKDIR/checkpoints, config.json, metrics.jsonl, tensorboard, events.jsonl, heartbeat.json and,
    if it trains one, tokenizer.model. All processes of a run call it (see `processes.start`); the first
    one writes.

    Args:
      observer: an `observing.Observer` that goes on observing afterwards; None: one of its own.

    Returns:
      Whether all steps are done.

    Raises:
      UserError: a wrong input; see the README. Checkpoints that were complete stay as they are.
    """
    config = plan.make(config)
    directory = Workdir(workdir)
    directory.make()
    mesh = sharding.make_mesh(config)
    sharding.check_batch(config, mesh)
    first_process = jax.process_index() == 0

    with contextlib.ExitStack() as stack:
        observer = observer or stack.enter_context(observing.Observer())
        observer.open(workdir)
        # What an earlier run left, and what can go on or start from it.
        if (recorded := directory.read_config()) is not None:
            check_resumable(from_json(recorded), config, workdir)
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint.keep))
        saved = checkpoints.meta()
        if saved:
            check_resumable(saved.config, config, workdir)
        source = saved or finetune.source(config)
        tokens = _tokenizer(config, workdir, source and source.tokenizer)
        rule = segments.resolve(config.segments.rule, tokens.pieces())
        config = config.with_rule(rule)

        # The data, the state and the compiled step.
        reader = sharding.reader(mesh, config.batch_size)
        batches = Batches(config, tokens, reader=reader)
        stack.enter_context(contextlib.closing(batches))
        stack.enter_context(jax.set_mesh(mesh))
        init, step, abstract = compile_on(config, mesh)

        def begin():
            """The latest checkpoint's state and data state; or a new state, and None."""
            if checkpoints.latest is not None:
                return checkpoints.restore(abstract)
            state = init(jax.random.key(config.seed))
            if source:
                state["params"] = finetune.start(config, source.step, mesh, state["params"])
            return state, None

        state, data_state = begin()
        rewinds = 0
        if data_state:
            batches.set_state_of(data_state["readers"])
            rewinds = data_state["rewinds"]
            if first_process:
                _LOG.info(f"Going on from step {saved.step} of {workdir}")
        number, last = int(state["step"]), min(config.steps, stop_at or config.steps)
        log = None
        if first_process:
            files.write_json(directory.config, to_json(config))
            log = stack.enter_context(
                metrics.Log(
                    config, workdir, number, tokens, lambda: batches.report() | observer.report()
                )
            )
        watch = spikes.Watch(config.spikes.policy)

        def save():
            with observer.saving():
                readers = collectives.of_all_processes(batches.get_state())
                checkpoints.save(state, {"readers": readers, "rewinds": rewinds}, config, tokens)

        def report(number, batch, values) -> bool:
            """Logs a step. Returns whether to rewind behind it."""
            values = observer.complete(number, values)
            if log:
                full = number % config.log.every == 0 or number == last or values["spike"]
                log.write(number, batch, values | {"rewinds": rewinds}, full)
            return watch(number, values, checkpoints.latest)

        # The loop. Step n - 1 is reported after step n is dispatched, so that devices never wait.
        pending, stop = None, False
        for dispatched in itertools.count(1):
            if number == last or stop:
                break
            number += 1
            with observer.phase("data"):
                batch = next(batches)
                placed = sharding.place_batch(mesh, batch, reader[1])
            state, values = observer.step(number, step, state, placed)
            stop = processes.preempted(dispatched)
            due = number % config.checkpoint.every == 0 or number == last or stop
            due |= checkpoints.failed()
            done, pending = [pending, (number, batch, values)], None
            if not due:  # what is saved has been looked at
                pending = done.pop()
            if any(report(*of_step) for of_step in done if of_step):
                with observer.phase("starting"):
                    state, _ = begin()  # the data go on where they are, behind the spike
                number, pending, rewinds = int(state["step"]), None, rewinds + 1
                observer.rewound(number)
                if log:
                    log.rewind(number)
            elif due:
                save()
        with observer.phase("saving"):
            checkpoints.finish(save)
        if number < config.steps:
            observer.preempted()
    return number == config.steps


def _tokenizer(config, workdir: str, saved: tokenizer.Tokenizer | None) -> tokenizer.Tokenizer:
    """What the first process chooses, since it may have to train one."""
    chosen = vocabulary.choose(config, workdir, saved) if jax.process_index() == 0 else None
    if jax.process_count() == 1:
        return chosen
    mine = chosen and [base64.b64encode(chosen.model).decode(), chosen.name]
    model, name = collectives.of_all_processes(mine)[0]
    return tokenizer.Tokenizer(base64.b64decode(model), name)


def main(arguments: list[str]) -> None:
    parser = cli.Parser("bipe_jax.train", __doc__)
    parser.add_argument(
        "--workdir", required=True, help="directory of the run: checkpoints, metrics, plots"
    )
    parser.add_argument(
        "--stop_at", type=int, help="train to this step, save and exit as though preempted"
    )
    parser.add_argument("--profile", help="steps to trace into WORKDIR/profile, FIRST:LAST")
    args, config = parser.parse_with_config(arguments)
    if not args.workdir:
        raise UserError("--workdir=DIR is needed")
    if args.stop_at is not None and args.stop_at < 1:
        raise UserError(f"--stop_at={args.stop_at} must be at least 1")
    quiet()
    enable_cache()
    config = plan.make(config)
    wandb_board.check(config)
    profile = trace.parse(args.profile, min(config.steps, args.stop_at or config.steps))
    # What the evaluation at the end would refuse is refused before the training.
    resolve(Settings(), config)
    processes.start()
    failures.forget(args.workdir)
    with observing.Observer(observing.process_start(), profile) as observer:
        if train(config, args.workdir, args.stop_at, observer):
            processes.leave_at_sigterm()
            with observer.phase("evaluating"):
                evaluate(args.workdir)
            return
    _LOG.info(f"Stopped and saved: the same command goes on (exit status {PREEMPTED})")
    sys.exit(PREEMPTED)


if __name__ == "__main__":
    # Flags that cannot be read are a failure of the run too.
    with cli.user_errors(), failures.recorded(workdir_argument(sys.argv)):
        main(sys.argv[1:])
