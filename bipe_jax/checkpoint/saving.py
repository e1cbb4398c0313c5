"""Saving and restoring the checkpoints of a training, asynchronously."""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from bipe_jax import collectives
from bipe_jax.checkpoint import checksums, deleting, models
from bipe_jax.checkpoint.reading import (
    Meta,
    check_restorable,
    meta_of,
    meta_to_json,
    steps,
)
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import Transient, UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, bucket, files, trainer_lock

_LOG = logging.getLogger(__name__)

_PAUSE = 0.1  # seconds between looks at a save in progress


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, with changes for several processes.

    Attributes:
      failure: the error of this process's part of a save, while Orbax waits for the other processes.
    """

    failure: Exception | None = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise

    def wait_until_finished(self):
        # After a failure of one process, Orbax lets all processes wait for it for 20 minutes.
        while jax.process_count() > 1 and self.is_saving_in_progress():
            if self.failure:
                raise self.failure
            time.sleep(_PAUSE)
        super().wait_until_finished()

    def reached_preemption(self, step: int) -> bool:
        # The trainer alone asks JAX, once per dispatched step. The step numbers of all calls must be
        # consecutive: JAX agrees on the highest of all processes, which might never come.
        return False


class Checkpoints:
    """The checkpoints of a training run: saves them asynchronously, restores and deletes them.

    A failed save is retried with the state at that time, after each of `files.PAUSES`. Complete
    checkpoints are not changed; the first process deletes those that are superfluous.

    Args:
      workdir: checkpoints are in WORKDIR/checkpoints.
      keep: number of the latest checkpoints to keep, see `deleting.superfluous`.
      every: steps between regular saves.
      others: of the steps of all checkpoints, chooses those that are kept for another reason.

    Raises:
      UserError: there are checkpoints, and all of them are damaged.
    """

    def __init__(
        self,
        workdir: files.Path,
        keep: int,
        every: int,
        others: Callable[[Iterable[int]], Iterable[int]] = lambda steps: (),
    ):
        self._workdir = workdir
        self._keep, self._every, self._others = keep, every, others
        bucket.check(workdir, "--workdir")
        self.directory = epath.Path(files.absolute(workdir)) / Workdir.checkpoints
        models.check_path(self.directory)
        if jax.process_index() == 0 and self.directory.is_dir():
            deleting.set_stray_aside(self.directory, keep)
            deleting.remove_deleted(self.directory)
        collectives.of_all_processes(None)  # waits until it is done
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self._manager = _Manager(self.directory, options=options)
        self._opened = None if bucket.holds(workdir) else os.open(self.directory, os.O_RDONLY)
        self._saving = 0  # the step of the last save
        self._failures = 0  # in a row
        self._was_read = False  # a checkpoint of this run, by this process
        self._proved: int | None = None  # checkpoints up to this step are proved good
        self._deleter = deleting.Deleter(self.directory)
        self._retry_at: float | None = None
        # Unfinished saves of a killed run; other commands cannot tell them from a save in progress.
        if jax.process_index() == 0:
            deleting.remove_unfinished(self.directory)
        self._intact(lambda: self.latest)

    def _add_checksums(self) -> None:
        """Called by Orbax after all processes have written, before the checkpoint gets its name."""
        if jax.process_index() == 0:
            for path in deleting.unfinished(self.directory):
                if path.name.partition(".")[0] == str(self._saving):
                    checksums.write(path)

    def _intact(self, choose: Callable[[], int | None]) -> int | None:
        """The step of the checkpoint that `choose` names; damaged ones are renamed, so that it is intact."""
        damaged = []
        while (step := choose()) is not None:
            path = self.directory / str(step)
            problems = collectives.of_all_processes(self._problems_of_my_files(path))
            if not (lines := [line for lines in problems for line in lines]):
                return step
            damaged.append(aside := path.with_name(f"{step}.damaged"))
            if jax.process_index() == 0:
                _LOG.info(f"{path} is damaged ({lines[0]}): set aside as {aside.name}")
                deleting.set_aside(path, aside)
            collectives.of_all_processes(None)  # waits until it is renamed
            self._manager.reload()
        if damaged:
            raise UserError(
                f"all checkpoints in {self.directory} are damaged: look at {damaged[0]}, or start again "
                "in another --workdir"
            )
        return None

    @staticmethod
    def _problems_of_my_files(path) -> list[str]:
        try:
            sums = checksums.read(path) or []
        except (OSError, ValueError) as error:
            return [str(error)]
        return checksums.problems(path, sums[jax.process_index() :: jax.process_count()])

    @property
    def latest(self) -> int | None:
        """The latest complete step."""
        return self._manager.latest_step()

    @property
    def rewinds_to(self) -> int | None:
        """The step that a rewind goes back to, None: the beginning. It may be a save in progress."""
        return deleting.rewinds_to(self._manager.all_steps(), self._every)

    def meta(self) -> Meta | None:
        """The meta data of the latest checkpoint, or None if there is none."""
        step = self.latest
        return None if step is None else meta_of(self._manager, self.directory, step)

    def save(
        self, state: dict, data_state: dict, config: Plan, tokenizer: Tokenizer, start: dict
    ) -> None:
        """Starts a save; does nothing during the pause after a failure.

        Args:
          start: the one that trains, see `Meta.start`.

        Raises:
          Transient: saving has failed too often, or another trainer has taken the workdir.
          UserError: saving has failed too often, since the directory has vanished.
        """
        trainer_lock.check(self._workdir)
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return
        items = models.items(config, state["params"], tokenizer) | {
            "optimizer": ocp.args.StandardSave(state["optimizer"]),
            "data": ocp.args.JsonSave(data_state),
            "config": ocp.args.JsonSave(meta_to_json(config) | {"start": start}),
        }
        self._retry_at = None
        with self._retried():
            self._check_directory()
            self._manager.wait_until_finished()
            self._delete_superfluous()
        if self._retry_at is not None:
            return
        self._read_back()
        self._saving = int(state["step"])
        with self._retried():
            if not self._manager.save(self._saving, args=ocp.args.Composite(**items)):
                raise RuntimeError(f"Orbax regards step {self._saving} as saved")

    def _vanished(self) -> bool:
        """Whether the directory is missing or was replaced, which Orbax does not notice.

        In a bucket a workdir that was removed has lost its lock, see `trainer_lock.check`.
        """
        if self._opened is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._opened), os.stat(self.directory))
        except FileNotFoundError:
            return True

    def _check_directory(self) -> None:
        if self._vanished():
            raise FileNotFoundError(errno.ENOENT, "it has vanished", str(self.directory))

    def prove(self, step: int) -> None:
        """Records that a step after `step` was no spike: checkpoints up to it are good."""
        self._proved = step

    def _delete_superfluous(self) -> None:
        """To be called while no save is in progress.

        Only the first process deletes. The others' lists still name what it has deleted, which nothing
        depends on: it is neither the latest checkpoint nor the one to rewind to.
        """
        if jax.process_index() != 0:
            return
        steps = self._manager.all_steps()
        others = self._others(steps)
        old = deleting.superfluous(steps, self._proved, self._keep, self._every, others)
        if old and not self._vanished():
            self._deleter.delete(old)
            self._manager.reload()

    def rewind(self, restore: Callable[[int | None], Any]) -> Any:
        """Goes back to `rewinds_to`: later checkpoints are deleted after `restore`.

        Args:
          restore: called with the step, or None to start from the beginning.

        Returns:
          What `restore` returns.

        Raises:
          Transient: the later ones cannot be deleted.
        """
        with self._retried():
            self._manager.wait_until_finished()
        step = self._intact(lambda: collectives.of_first_process(lambda: self.rewinds_to))
        restored = restore(step)
        collectives.of_all_processes(None)  # waits until all have restored it
        if jax.process_index() == 0:
            later = [s for s in self._manager.all_steps() if step is None or s > step]
            files.retry(lambda: self._deleter.delete(later), self.directory)
            self._deleter.finish()  # these steps are saved again
        collectives.of_all_processes(None)  # waits until they are deleted
        self._manager.reload()
        if self._proved is not None:
            self._proved = None if step is None else min(self._proved, step)
        return restored

    def restore(self, abstract: dict, step: int) -> tuple[dict, dict]:
        """(state, data state) of a step, with the shapes, dtypes and shardings of `abstract`.

        Raises:
          UserError: the checkpoint is a model alone, see `models.save_model`.
        """
        if not (self.directory / str(step) / "optimizer").is_dir():
            raise UserError(
                f"the checkpoint {self.directory / str(step)} is a model alone, without the state of a "
                "training to resume: start a new run from it, in another --workdir, with "
                f"config.initial_checkpoint={self.directory.parent}"
            )
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract["params"]),
                optimizer=ocp.args.StandardRestore(abstract["optimizer"]),
                data=ocp.args.JsonRestore(),
            ),
        )
        number = jax.device_put(jax.numpy.int32(step), abstract["step"].sharding)
        state = {"step": number, "params": restored.params, "optimizer": restored.optimizer}
        self._was_read = True
        return state, restored.data

    def failed(self) -> bool:
        """Whether a save has failed and its retry is due. Raises as `save`."""
        trainer_lock.check(self._workdir)
        if self._manager.failure or not self._manager.is_saving_in_progress():
            with self._retried():
                self._manager.wait_until_finished()  # raises each error once
                if self._retry_at is None:
                    self._delete_superfluous()
                self._failures = self._failures if self._retry_at else 0
            self._read_back()
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def _read_back(self) -> None:
        """Reads the run's first checkpoint, of which each process reads its share of the arrays.

        Raises:
          UserError: it cannot be read, and the run must not go on for hours relying on it.
        """
        if self._was_read or self._retry_at is not None or self._vanished():
            return
        if (step := self.latest) is None:
            return
        try:
            share = jax.process_index(), jax.process_count()
            check_restorable(self.directory, step, share)
        except UserError as error:
            raise UserError(
                f"the run's first checkpoint cannot be read back: {error}: look at the disk of "
                f"{self.directory}, or use another --workdir"
            ) from error
        self._was_read = True

    def finish(self, save: Callable[[], None]) -> None:
        """Waits until the last save is complete; calls `save` to retry it. Raises as `save`."""
        while True:
            with self._retried():
                self._manager.wait_until_finished()
                if self._retry_at is None:
                    self._check_directory()
                    self._delete_superfluous()
            if self._retry_at is None:
                self._read_back()
                return
            time.sleep(max(0.0, self._retry_at - time.monotonic()))
            save()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # Waits for a save in progress, unless another process of it was lost. An earlier error has
        # precedence over one of closing.
        lost = jax.process_count() > 1 and kind and issubclass(kind, jax.errors.JaxRuntimeError)
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            if not lost:
                self._manager.close()
        self._deleter.finish()
        if self._opened is not None:
            os.close(self._opened)

    @contextlib.contextmanager
    def _retried(self):
        """Schedules a retry after an error of saving (disk full, no permission), or raises."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            failure = f"saving a checkpoint to {self.directory} failed ({reason})"
            vanished = self._vanished()
            # Several processes would have to agree on a retry; they restart instead.
            pauses = files.PAUSES if jax.process_count() == 1 else ()
            if pauses:
                with contextlib.suppress(Exception):
                    if not vanished:
                        self._manager.reload()  # restores its list of checkpoints to delete
                with contextlib.suppress(OSError):
                    deleting.remove_unfinished(self.directory)
                    if vanished:  # removes the new directory that Orbax has made, if it is empty
                        os.rmdir(self.directory)
                        os.rmdir(self.directory.parent)
            if self._failures == len(pauses):
                # After the directory has vanished, a restart would begin a new run.
                kind = UserError if vanished else Transient
                # Orbax's latest step may be a save in progress.
                complete = self.latest if vanished else max(steps(self.directory), default=None)
                raise kind(
                    f"{failure}; the last complete one is step {complete}: mend that, then run the "
                    "same command"
                ) from error
            pause = pauses[self._failures]
            _LOG.info(f"{failure}; trying again in {pause:g} s")
            self._failures += 1
            self._retry_at = time.monotonic() + pause
