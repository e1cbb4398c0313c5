"""Saving checkpoints: those of a training, asynchronously, and a model alone."""

import base64
import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath

from bipe_jax import collectives
from bipe_jax.checkpoint import checksums
from bipe_jax.checkpoint.reading import Meta, locate, meta_of, meta_to_json, steps
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.errors import Transient, UserError
from bipe_jax.plan import Plan
from bipe_jax.workdir import Workdir, files

_LOG = logging.getLogger(__name__)

_ATTEMPTS, _PAUSE = 50, 0.1  # to remove what threads may still write into; seconds


class _Manager(ocp.CheckpointManager):
    """Attributes:
    failure: what went wrong with this process's part of a save, while Orbax waits for the others.
    """

    failure: Exception | None = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise

    def wait_until_finished(self):
        # When one process has failed, Orbax lets all wait for 20 minutes for it to succeed.
        while jax.process_count() > 1 and self.is_saving_in_progress():
            if self.failure:
                raise self.failure
            time.sleep(_PAUSE)
        super().wait_until_finished()

    def reached_preemption(self, step: int) -> bool:
        # JAX is asked by the trainer alone, once for each step that it dispatches. The numbers that it is
        # asked with must not jump: SIGTERM would be heeded at the highest one, maybe never.
        return False


class Checkpoints:
    """The trainer's view of WORKDIR/checkpoints: saves asynchronously, restores the latest.

    A save that fails is tried again with the state that the training has reached then, until
    `files.PAUSES` are used up; checkpoints that were complete stay as they are.

    Raises:
      UserError: there are checkpoints, and all of them are damaged.
    """

    def __init__(self, workdir, keep: int):
        self.directory = epath.Path(workdir).resolve() / Workdir.checkpoints
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self._manager = _Manager(self.directory, options=options)
        self._opened = os.open(self.directory, os.O_RDONLY)
        self._tries, self._again_at = 0, None  # saves that failed in a row; when to try again
        # What a killed run left unfinished. Only the trainer may: a save under way looks the same.
        if jax.process_index() == 0:
            _remove_unfinished(self.directory)
        self._set_damaged_aside()

    def _add_checksums(self) -> None:
        """Orbax calls this when all processes have written, before the checkpoint gets its name."""
        if jax.process_index() == 0:
            for unfinished in ocp.utils.tmp_checkpoints(self.directory):
                checksums.write(unfinished.get())

    def _set_damaged_aside(self) -> None:
        """Renames checkpoints that are not what was written, so that an earlier one is the latest."""
        damaged = []
        while (step := self.latest) is not None:
            path = self.directory / str(step)
            found = collectives.of_all_processes(self._problems_of_my_files(path))
            if not (lines := [line for lines in found for line in lines]):
                return
            damaged.append(aside := path.with_name(f"{step}.damaged"))
            if jax.process_index() == 0:
                _LOG.info(f"{path} is damaged ({lines[0]}): set aside as {aside.name}")
                if aside.exists():
                    _remove(aside)
                path.rename(aside)
            collectives.of_all_processes(None)  # until it has been renamed
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
        """The last step that was saved completely."""
        return self._manager.latest_step()

    def meta(self) -> Meta | None:
        """Of the latest checkpoint, or None if there is none."""
        step = self.latest
        return None if step is None else meta_of(self._manager, self.directory, step)

    def save(self, state: dict, data_state: dict, config: Plan, tokenizer: Tokenizer) -> None:
        """Starts saving; between failures, when the pause is over.

        Raises:
          Transient: saving has failed too often. UserError: since the directory has vanished.
        """
        if self._again_at is not None and time.monotonic() < self._again_at:
            return
        items = _model_items(config, state["params"], tokenizer) | {
            "optimizer": ocp.args.StandardSave(state["optimizer"]),
            "data": ocp.args.JsonSave(data_state),
        }
        self._again_at = None
        with self._noted():
            self._see_directory()
            if not self._manager.save(int(state["step"]), args=ocp.args.Composite(**items)):
                raise RuntimeError(f"step {int(state['step'])} is taken for saved")

    def _vanished(self) -> bool:
        """Whether the directory is not there, or another in its place: Orbax would make it anew."""
        try:
            return not os.path.samestat(os.fstat(self._opened), os.stat(self.directory))
        except FileNotFoundError:
            return True

    def _see_directory(self) -> None:
        if self._vanished():
            raise FileNotFoundError(errno.ENOENT, "it has vanished", str(self.directory))

    def restore(self, abstract: dict) -> tuple[dict, dict]:
        """The latest (state, data state); `abstract` gives shapes, dtypes and shardings.

        Raises:
          UserError: the checkpoint is a model alone, see `save_model`.
        """
        with self._noted():
            self._manager.wait_until_finished()  # to Orbax a save under way is the latest step
        step = self.latest
        if not (self.directory / str(step) / "optimizer").is_dir():
            raise UserError(
                f"the checkpoint {self.directory / str(step)} is a model alone, without the state of a "
                "training to go on with: start a new run from it, in another --workdir, with "
                f"config.initial_checkpoint={self.directory.parent}"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract["params"]),
                optimizer=ocp.args.StandardRestore(abstract["optimizer"]),
                data=ocp.args.JsonRestore(),
            ),
        )
        number = jax.device_put(jax.numpy.int32(step), abstract["step"].sharding)
        state = {"step": number, "params": restored.params, "optimizer": restored.optimizer}
        return state, restored.data

    def failed(self) -> bool:
        """Whether a save has failed and should be made again now. Raises as `save`."""
        if self._manager.failure or not self._manager.is_saving_in_progress():
            with self._noted():
                self._manager.wait_until_finished()  # raises, once, what went wrong
                self._tries = self._tries if self._again_at else 0
        return self._again_at is not None and time.monotonic() >= self._again_at

    def finish(self, save: Callable[[], None]) -> None:
        """Waits until what was saved is complete; calls `save` if it failed. Raises as `save`."""
        while True:
            with self._noted():
                self._manager.wait_until_finished()
                if self._again_at is None:
                    self._see_directory()
            if self._again_at is None:
                return
            time.sleep(max(0.0, self._again_at - time.monotonic()))
            save()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # Waits for a save that is still under way, unless with another process that was lost; what went
        # wrong before matters more.
        lost = jax.process_count() > 1 and kind and issubclass(kind, jax.errors.JaxRuntimeError)
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            if not lost:
                self._manager.close()
        os.close(self._opened)

    @contextlib.contextmanager
    def _noted(self):
        """Plans to try again what went wrong while saving (disk full, no permission), if it may."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            failure = f"saving a checkpoint to {self.directory} failed ({reason})"
            vanished = self._vanished()
            # Several processes would have to agree on it: they start again instead.
            pauses = files.PAUSES if jax.process_count() == 1 else ()
            if pauses:
                with contextlib.suppress(Exception):
                    if not vanished:
                        self._manager.reload()  # it has forgotten those that it would have deleted
                with contextlib.suppress(OSError):
                    _remove_unfinished(self.directory)
                    if vanished:  # what Orbax has made in its place, if it is empty
                        os.rmdir(self.directory)
                        os.rmdir(self.directory.parent)
            if self._tries == len(pauses):
                # Where the directory has vanished, another start would begin a new run.
                kind = UserError if vanished else Transient
                # Orbax counts one that is under way too.
                complete = self.latest if vanished else max(steps(self.directory), default=None)
                raise kind(
                    f"{failure}; the last complete one is step {complete}: mend that, then run the "
                    "same command"
                ) from error
            pause = pauses[self._tries]
            _LOG.info(f"{failure}; trying again in {pause:g} s")
            self._tries += 1
            self._again_at = time.monotonic() + pause


def _remove_unfinished(directory) -> None:
    """Orbax's own option does it in a thread, which an early error would leave behind."""
    for unfinished in ocp.utils.tmp_checkpoints(directory):
        _remove(unfinished.get())


def _remove(path) -> None:
    """Removes a directory that threads of a failed save may still be writing into."""
    for attempt in range(_ATTEMPTS):
        try:
            path.rmtree()
        except FileNotFoundError:
            pass  # what a thread has removed, or all of it
        except OSError:
            if attempt == _ATTEMPTS - 1:
                raise
        time.sleep(_PAUSE)
        if not path.exists():
            return


def _model_items(config: Plan, params: dict, tokenizer: Tokenizer) -> dict:
    """What every checkpoint has."""
    model = base64.b64encode(tokenizer.model).decode()
    return {
        "params": ocp.args.StandardSave(params),
        "config": ocp.args.JsonSave(meta_to_json(config)),
        "tokenizer": ocp.args.JsonSave({"model": model}),
    }


def check_free(workdir) -> None:
    """Raises UserError unless a model can be saved to `workdir`: it holds no checkpoint yet."""
    path = epath.Path(workdir).resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{workdir} is a file: name a directory to write the checkpoint to")
    directory, step = locate(path)
    if step is not None or (directory.is_dir() and ocp.utils.checkpoint_steps(directory)):
        raise UserError(f"{workdir} holds a checkpoint already: name another directory")


def save_model(workdir, config: Plan, params: dict, tokenizer: Tokenizer) -> None:
    """Writes WORKDIR/checkpoints/0: a model without the state of a training, see `check_free`.

    Args:
      params: a nested dict of float32 arrays, NumPy's or JAX's.

    Raises:
      UserError: it cannot be written. What was begun is removed.
    """
    directory = epath.Path(workdir).resolve() / Workdir.checkpoints
    # JAX's arrays cannot change under Orbax, which would copy NumPy's first.
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
