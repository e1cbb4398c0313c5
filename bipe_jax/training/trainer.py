"""Training, as a function to call from Python: train(config, "runs/quickstart")."""

import base64
import contextlib
import logging
from collections.abc import Callable, Mapping

import jax
from ml_collections import ConfigDict

from bipe_jax import collectives, plan, processes, segments, sharding
from bipe_jax.checkpoint import Checkpoints, shards_from_json, shards_to_json
from bipe_jax.config import check_resumable, from_json
from bipe_jax.data import held_out, identity, tokenizer, vocabulary
from bipe_jax.data.batches import Batches
from bipe_jax.errors import UserError
from bipe_jax.evaluation.periodic import PeriodicEvaluation
from bipe_jax.training import finetune, lock, metrics, observing, spikes, starts, summary
from bipe_jax.training.keeping import Keeping
from bipe_jax.training.progress import Progress, Step
from bipe_jax.training.step import compile_on
from bipe_jax.workdir import Workdir

_LOG = logging.getLogger(__name__)


def train(
    config: ConfigDict | Mapping | plan.Plan,
    workdir: str,
    stop_at: int | None = None,
    observer: observing.Observer | None = None,
    check: Callable[[plan.Plan, tokenizer.Tokenizer], object] = lambda config, tokens: None,
) -> bool:
    """Trains to `config.steps` and saves, resuming from the latest checkpoint of the workdir.

    Writes WORKDIR/checkpoints, config.json, starts, metrics.jsonl, tensorboard, events.jsonl,
    heartbeat.json and, if it trains one, tokenizer.model. Messages, and the progress bar where there is no
    terminal, go to the logger "bipe_jax". All processes of a run call it (see `processes.start`); the
    first one writes.

    It stops early, after a save, at step `stop_at`, after SIGTERM to any of the processes, and after
    Ctrl-C. It handles signals if it runs in the main thread, and restores their handlers at the end.

    Args:
      config: an `ml_collections.ConfigDict` as configs/base.py makes it, or another input of `plan.make`.
      workdir: the run's directory, made if it does not exist.
      stop_at: a step; None: `config.steps`.
      observer: of a caller that observes more than the training, and has entered `lock.locked(workdir)`;
        None: a new one.
      check: called with the plan and the run's tokenizer before the training: whether what the caller does
        after it can be done.

    Returns:
      Whether all steps are trained: False if it stopped early. If the target was reached before, nothing
      is trained, deleted or rewritten.

    Raises:
      UserError: a wrong input. Complete checkpoints are kept. Transient, of its kind:
        another run trains in the workdir, or a disk fails.
      KeyboardInterrupt: after Ctrl-C, the next step and its save. A second Ctrl-C raises it at once, or as
        soon as a save in flight is complete.
    """
    config = plan.make(config)
    target = min(config.steps, stop_at or config.steps)
    directory = Workdir(workdir)
    directory.make()
    mesh = sharding.make_mesh(config)
    sharding.check_batch(config, mesh)
    first_process = jax.process_index() == 0

    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.stop_signals())
        if observer is None:
            stack.enter_context(lock.locked(workdir))
            observer = stack.enter_context(observing.Observer())
        observer.open(workdir)

        # ------------------------------------------------------------------------------------------
        # The start of the run: its own latest checkpoint; else the parameters of another run,
        # config.initial_checkpoint; else the seed.
        # ------------------------------------------------------------------------------------------
        if (recorded := directory.read_config()) is not None:
            check_resumable(from_json(recorded), config, workdir)
        keep, every = config.checkpoint.keep, config.checkpoint.every
        keeping = Keeping(config, workdir)
        checkpoints = stack.enter_context(Checkpoints(workdir, keep, every, keeping))
        saved = checkpoints.meta()
        if saved:
            check_resumable(saved.config, config, workdir)
            _check_steps(config, saved.step, workdir)
            if saved.step >= target:
                if first_process:
                    _LOG.info(f"{workdir} has a checkpoint of step {saved.step}: nothing to train")
                if saved.step < config.steps:
                    observer.preempted()
                return saved.step == config.steps
        source = saved or finetune.source(config)

        # ------------------------------------------------------------------------------------------
        # Data: the shards, the tokenizer, the segment rule, the batches, and the held-out text.
        # ------------------------------------------------------------------------------------------
        with observer.phase("data"):
            config, changed = _with_shards(config, workdir, saved and saved.config)
        with observer.phase("tokenizer"):
            tokens = _tokenizer(config, workdir, source and source.tokenizer)
        rule = segments.rule_of(config, tokens.pieces(), tokens.bos_id)
        config = config.with_rule(rule)
        check(config, tokens)
        if first_process:
            for remark in vocabulary.remarks(config, tokens):
                _LOG.info(remark)
        shard = sharding.data_shard(mesh, config.batch_size)
        evaluate = None
        with observer.phase("data"):
            batches = Batches(config, tokens, shard=shard)
            stack.enter_context(contextlib.closing(batches))
            if config.evaluation.every:
                evaluate = PeriodicEvaluation(config, mesh, tokens)

        # ------------------------------------------------------------------------------------------
        # The state on the devices, the compiled step, and the log.
        # ------------------------------------------------------------------------------------------
        stack.enter_context(jax.set_mesh(mesh))
        init, train_step, abstract = compile_on(config, mesh)
        if first_process:
            for line in summary.lines(config, mesh, abstract["params"], workdir):
                _LOG.info(line)

        def restore_or_init(number: int | None):
            """The state and the data's state of a checkpoint; of None, a new state and None."""
            if number is not None:
                return checkpoints.restore(abstract, number)
            state = init(jax.random.key(config.seed))
            origin = finetune.source(config) if saved else source
            if origin:
                state["params"] = finetune.start(config, origin.step, mesh, state["params"])
            return state, None

        with observer.phase("restore"):
            state, data_state = restore_or_init(checkpoints.latest)
        rewinds = data_state["rewinds"] if data_state else 0
        progress = Progress(config, int(state["step"]), target, rewinds)
        if saved and data_state:
            with observer.phase("data"):
                batches.set_state_of(data_state["readers"], changed)
            if first_process:
                _LOG.info(f"Resuming from step {progress.step} of {workdir}")
            skipped = int(state["optimizer"].skipped)
            starts.report_changes(saved.config, config, progress.step, skipped, observer)
        start = starts.Start(config, workdir, progress.step, saved and saved.start)
        # Checkpoints of earlier versions do not have it.
        to, in_a_row = (data_state or {}).get("rewound", (None, 0))
        watch = spikes.Watch(config.spikes.policy, (to, in_a_row))
        log = None
        if first_process:
            log = metrics.Log(
                config,
                workdir,
                progress.step,
                tokens,
                more=lambda: batches.report() | observer.report(),
            )
            stack.enter_context(log)

        def save():
            if not sharding.all_finite(state["params"]):
                raise UserError(
                    f"step {progress.step}: the parameters are not finite, and are not saved; the last "
                    f"checkpoint is step {checkpoints.latest}: {spikes.ADVICE}"
                )
            with observer.saving():
                if log:
                    log.sync()
                readers = collectives.of_all_processes(batches.get_state())
                data_state = {
                    "readers": readers,
                    "rewinds": progress.rewinds,
                    "rewound": watch.rewound,
                }
                checkpoints.save(state, data_state, config, tokens, start.origin)

        def log_and_judge(step: Step) -> bool:
            """Waits until a step is complete, and returns whether to rewind since it is a spike."""
            values = observer.complete(step.number, step.values)
            start.record()
            if log:
                full = progress.log_is_full(step) or values["spike"]
                logged = values | {"rewinds": progress.rewinds}
                log.write(step.number, step.batch, logged, full, step.evaluation)
            if not values["spike"]:
                checkpoints.prove(step.number - 1)
            rewinding = config.spikes.policy == "rewind"
            last = checkpoints.rewinds_to if rewinding else checkpoints.latest
            return watch(step.number, values, last)

        # ------------------------------------------------------------------------------------------
        # The loop. Each step is dispatched while the previous one runs.
        # ------------------------------------------------------------------------------------------
        while not progress.ended:
            with observer.phase("data"):
                batch = next(batches)
                arrays = sharding.place_batch(mesh, batch, shard[1])
            state, values = observer.step(progress.step + 1, train_step, state, arrays)
            progress.dispatched(batch, values)
            progress.stopping = processes.preempted(progress.dispatches)
            if progress.stopping and first_process:
                hint = "; another Ctrl-C ends at once" if processes.interrupted() else ""
                _LOG.info(f"Stopping after step {progress.step}: saving{hint}")

            if evaluate and progress.evaluation_is_due:
                jax.block_until_ready(values)  # this wait counts as the step's
                with (
                    observer.phase("evaluating"),
                    log.paused() if log else contextlib.nullcontext(),
                ):
                    progress.evaluated(rows := evaluate(state["params"]))
                keeping.evaluated(progress.step, rows)

            save_is_due = checkpoints.failed() or progress.save_is_due
            spike = next(filter(log_and_judge, progress.to_read(newest=save_is_due)), None)
            if spike:
                if spike.number == progress.step:
                    next(batches)  # of the step that is dispatched where no save is due
                with observer.phase("starting"):
                    # The data continues after the spike.
                    state, _ = checkpoints.rewind(restore_or_init)
                progress.rewound(int(state["step"]))
                observer.rewound(progress.step)
                if log:
                    log.rewind(progress.step)
            elif save_is_due and (progress.ended or not watch.skipping):
                # While steps are skipped, the parameters may be ruined, and good checkpoints would go.
                save()

        # ------------------------------------------------------------------------------------------
        # The end: the last save completes before anything is closed.
        # ------------------------------------------------------------------------------------------
        with observer.phase("saving"):
            checkpoints.finish(save)
        if not progress.done:
            observer.preempted()
        interrupted = processes.interrupted()
    if interrupted:
        raise KeyboardInterrupt
    return progress.done


def _check_steps(config: plan.Plan, step: int, workdir: str) -> None:
    if step > config.steps:
        raise UserError(
            f"config.steps={config.steps}, but the run in {workdir} has a checkpoint of step {step}: set "
            f"config.steps to at least {step}, or use another --workdir"
        )


def _with_shards(
    config: plan.Plan, workdir: str, saved: plan.Plan | None
) -> tuple[plan.Plan, list[bool]]:
    """The plan with the shards that the first process reads, and which sources have changed."""

    def read():
        if saved:
            shards, changed = identity.resumed(saved, config, workdir)
        else:
            shards = tuple(map(identity.of_source, config.training.sources))
            changed = [False] * len(shards)
        held_out.check(config.with_shards(shards))
        return shards_to_json(shards), changed

    shards, changed = collectives.of_first_process(read)
    return config.with_shards(shards_from_json(shards)), changed


def _tokenizer(
    config: plan.Plan, workdir: str, saved: tokenizer.Tokenizer | None
) -> tokenizer.Tokenizer:
    """The tokenizer, which the first process chooses and, if needed, trains."""

    def choose():
        chosen = vocabulary.choose(config, workdir, saved)
        return base64.b64encode(chosen.model).decode(), chosen.name

    model, name = collectives.of_first_process(choose)
    return tokenizer.Tokenizer(base64.b64decode(model), name)
