"""Saving checkpoints: those of training, asynchronously, and models alone."""

import base64
import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from bipe_jax import collectives
from bipe_jax.checkpoint import checksums
from bipe_jax.checkpoint.reading import (
    Meta,
    check_restorable,
    locate,
    meta_of,
    meta_to_json,
    steps,
)
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import Transient, UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, complete_steps, files, is_complete

_LOG = logging.getLogger(__name__)

# What a checkpoint consists of.
_ITEMS = {"params", "optimizer", "data", "config", "tokenizer", checksums.NAME}
_ITEMS |= {"_CHECKPOINT_METADATA", "commit_success.txt"}
_ATTEMPTS, _PAUSE = 50, 0.1  # to remove a directory that threads may write into; seconds


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
    """The checkpoints of a training run: saves asynchronously, restores the latest.

    A failed save is retried with the state at that time, after each of `files.PAUSES`. Complete
    checkpoints are not changed.

    Args:
      workdir: checkpoints are in WORKDIR/checkpoints.
      keep: number of the latest checkpoints to keep.

    Raises:
      UserError: there are checkpoints, and all of them are damaged.
    """

    def __init__(self, workdir: files.Path, keep: int):
        self.directory = epath.Path(workdir).resolve() / Workdir.checkpoints
        _check_path(self.directory)
        if jax.process_index() == 0 and self.directory.is_dir():
            _set_stray_aside(self.directory, keep)
        collectives.of_all_processes(None)  # waits until it is done
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self._manager = _Manager(self.directory, options=options)
        self._opened = os.open(self.directory, os.O_RDONLY)
        self._failures = 0  # in a row
        self._was_read = False  # a checkpoint of this run, by this process
        self._retry_at: float | None = None
        # Unfinished saves of a killed run; other commands cannot tell them from a save in progress.
        if jax.process_index() == 0:
            _remove_unfinished(self.directory)
        self._set_damaged_aside()

    def _add_checksums(self) -> None:
        """Called by Orbax after all processes have written, before the checkpoint gets its name."""
        if jax.process_index() == 0:
            for unfinished in ocp.utils.tmp_checkpoints(self.directory):
                checksums.write(unfinished.get())

    def _set_damaged_aside(self) -> None:
        """Renames damaged checkpoints, so that the latest one is intact."""
        damaged = []
        while (step := self.latest) is not None:
            path = self.directory / str(step)
            problems = collectives.of_all_processes(self._problems_of_my_files(path))
            if not (lines := [line for lines in problems for line in lines]):
                return
            damaged.append(aside := path.with_name(f"{step}.damaged"))
            if jax.process_index() == 0:
                _LOG.info(f"{path} is damaged ({lines[0]}): set aside as {aside.name}")
                if aside.exists():
                    _remove(aside)
                path.rename(aside)
            collectives.of_all_processes(None)  # waits until it is renamed
            self._manager.reload()
        if damaged:
            raise UserError(
                f"all checkpoints in {self.directory} are damaged: look at {damaged[0]}, or start again "
                "in another --workdir"
            )

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

    def meta(self) -> Meta | None:
        """The meta data of the latest checkpoint, or None if there is none."""
        step = self.latest
        return None if step is None else meta_of(self._manager, self.directory, step)

    def save(self, state: dict, data_state: dict, config: Plan, tokenizer: Tokenizer) -> None:
        """Starts a save; does nothing during the pause after a failure.

        Raises:
          Transient: saving has failed too often.
          UserError: saving has failed too often, since the directory has vanished.
        """
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return
        items = _model_items(config, state["params"], tokenizer) | {
            "optimizer": ocp.args.StandardSave(state["optimizer"]),
            "data": ocp.args.JsonSave(data_state),
        }
        self._retry_at = None
        with self._retried():
            self._check_directory()
            self._manager.wait_until_finished()
        if self._retry_at is not None:
            return
        self._read_back()
        with self._retried():
            if not self._manager.save(int(state["step"]), args=ocp.args.Composite(**items)):
                raise RuntimeError(f"Orbax regards step {int(state['step'])} as saved")

    def _vanished(self) -> bool:
        """Whether the directory is missing or was replaced, which Orbax does not notice."""
        try:
            return not os.path.samestat(os.fstat(self._opened), os.stat(self.directory))
        except FileNotFoundError:
            return True

    def _check_directory(self) -> None:
        if self._vanished():
            raise FileNotFoundError(errno.ENOENT, "it has vanished", str(self.directory))

    def restore(self, abstract: dict) -> tuple[dict, dict]:
        """The latest (state, data state), with the shapes, dtypes and shardings of `abstract`.

        Raises:
          UserError: the checkpoint is a model alone, see `save_model`.
        """
        with self._retried():
            self._manager.wait_until_finished()  # Orbax's latest step may be a save in progress
        step = self.latest
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
        if self._manager.failure or not self._manager.is_saving_in_progress():
            with self._retried():
                self._manager.wait_until_finished()  # raises each error once
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
                    _remove_unfinished(self.directory)
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


def _check_path(directory: epath.Path) -> None:
    """Raises UserError for a path that Orbax would take for a glob when it reads a checkpoint."""
    if any(character in str(directory) for character in "*?[\\"):
        raise UserError(
            f"checkpoints cannot be saved in {directory}: Orbax would take its * ? [ or \\ for a pattern: "
            "choose another path"
        )


def _set_stray_aside(directory: epath.Path, keep: int) -> None:
    """Renames entries that are called as a step but are no checkpoint.

    Orbax would count them as checkpoints, and delete others that exceed `keep`. What is left of a checkpoint
    that was being deleted for `keep` is removed.
    """
    complete = complete_steps(directory)
    for entry in directory.iterdir():
        if not entry.name.isdecimal() or is_complete(os.fspath(entry)):
            continue
        later = [step for step in complete if step > int(entry.name)]
        if entry.is_dir() and len(later) >= keep and {e.name for e in entry.iterdir()} <= _ITEMS:
            _remove(entry)
            continue
        aside = entry.with_name(f"{entry.name}.stray")
        _LOG.info(f"{entry} is no checkpoint: set aside as {aside.name}")
        if aside.exists():
            _remove(aside) if aside.is_dir() else aside.unlink()
        entry.rename(aside)


def _remove_unfinished(directory) -> None:
    """Removes unfinished saves. Orbax's option does it in a thread, which may outlive an early error."""
    for unfinished in ocp.utils.tmp_checkpoints(directory):
        _remove(unfinished.get())


def _remove(path) -> None:
    """Removes a directory that threads of a failed save may still be writing into."""
    for attempt in range(_ATTEMPTS):
        try:
            path.rmtree()
        except FileNotFoundError:
            pass  # removed by a thread
        except OSError:
            if attempt == _ATTEMPTS - 1:
                raise
        time.sleep(_PAUSE)
        if not path.exists():
            return


def _model_items(config: Plan, params: dict, tokenizer: Tokenizer) -> dict:
    """The items that every checkpoint has."""
    model = base64.b64encode(tokenizer.model).decode()
    return {
        "params": ocp.args.StandardSave(params),
        "config": ocp.args.JsonSave(meta_to_json(config)),
        "tokenizer": ocp.args.JsonSave({"model": model}),
    }


def check_free(workdir: files.Path) -> None:
    """Raises UserError if `workdir` contains a checkpoint or is a file."""
    path = epath.Path(workdir).resolve()
    _check_path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{workdir} is a file: name a directory to write the checkpoint to")
    directory, step = locate(path)
    if step is not None or (directory.is_dir() and ocp.utils.checkpoint_steps(directory)):
        raise UserError(f"{workdir} holds a checkpoint already: name another directory")


def save_model(workdir: files.Path, config: Plan, params: dict, tokenizer: Tokenizer) -> None:
    """Writes WORKDIR/checkpoints/0: a model without the state of a training, see `check_free`.

    Args:
      workdir: to write to. config, tokenizer: of the model.
      params: a nested dict of float32 arrays, NumPy's or JAX's.

    Raises:
      UserError: it cannot be written. Incomplete files are removed.
    """
    directory = epath.Path(workdir).resolve() / Workdir.checkpoints
    # Orbax copies NumPy's arrays, but not JAX's, which are immutable.
    items = _model_items(config, jax.device_put(params), tokenizer)
    made = next((path for path in [*directory.parents[::-1], directory] if not path.exists()), None)
    try:
        with ocp.CheckpointManager(directory) as manager:
            manager.save(0, args=ocp.args.Composite(**items))
    except BaseException as error:
        if made is None:
            _remove_unfinished(directory)
        else:
            _remove(made)
        if not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"saving a checkpoint to {directory} failed ({reason})") from error
