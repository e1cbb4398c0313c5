"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases and the progress bar."""

import contextlib
import json
import math
import time
from collections.abc import Callable

import jax

from bipe_jax import hardware, segments
from bipe_jax.config import Config
from bipe_jax.data.tokenizer import Tokenizer
from bipe_jax.evaluation import periodic
from bipe_jax.flops import flops_per_token
from bipe_jax.loss import perplexity
from bipe_jax.training.observing.bar import ProgressBar
from bipe_jax.training.observing.tensorboard import TensorBoard
from bipe_jax.training.observing.wandb_board import WandbBoard
from bipe_jax.workdir import Workdir, appending, bucket, files, metrics, opening


def peak_flops(config: Config, device_kind: str) -> float | None:
    """FLOPs a second of one device: `log.peak_flops` if set, else those of its kind, or None."""
    return config.log.peak_flops or hardware.peak_flops(device_kind)


class Log:
    """Writes metrics.jsonl, TensorBoard's files, the progress bar and, if configured, to W&B.

    A context manager. Lines of steps after `first_step`, which a killed run may have written, are dropped:
    these steps are trained again.

    Args:
      first_step: the step that the run resumes from, or 0.
      tokenizer: its byte lengths give bits per byte.
      more: returns further metrics by name; called for each full line.

    Raises:
      UserError: W&B is not installed, or refuses the project.
      Transient: the disk fails, also in `write`.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        first_step: int,
        tokenizer: Tokenizer,
        more: Callable[[], dict],
    ):
        self._config, self._workdir = config, workdir
        self._byte_lengths = tokenizer.byte_lengths()
        self._more = more
        self._wandb = WandbBoard(config, workdir) if config.log.wandb else None
        self._evaluated = ""  # the last evaluation, for the progress bar
        self._open(first_step)

    def _open(self, first_step: int):
        self._path = Workdir(self._workdir).metrics
        _truncate(self._path, first_step)
        if bucket.holds(self._path):
            self._file = appending.Growing(self._path)
        else:
            self._file = open(self._path, "ab", opener=opening.not_through_a_link)  # noqa: SIM115
        self._board = TensorBoard(Workdir(self._workdir).tensorboard, first_step + 1)
        self._bar = ProgressBar(self._config.steps, first_step)
        self._meter = _Meter(self._config)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        # An error inside the context, such as a full disk, takes precedence.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self._close()
        if self._wandb:
            self._wandb.close(failed=error is not None)

    def _close(self):
        self._bar.close()
        self._board.close()
        self._file.close()

    def sync(self) -> None:
        """Writes all lines so far, before a checkpoint of their steps is saved. Raises Transient."""
        if isinstance(self._file, appending.Growing):
            files.retry(self._file.sync, self._path)

    def rewind(self, step: int) -> None:
        """Drops the lines of steps after `step`, which are trained again."""
        self._close()
        self._open(step)

    def paused(self):
        """A context whose time does not count for tokens a second and MFU."""
        return self._meter.paused()

    def write(
        self, step: int, batch: dict, values: dict, full: bool, evaluation: list[dict] | None = None
    ) -> None:
        """Logs one step.

        Args:
          step: its number, from 1; steps are written in order.
          batch: its NumPy arrays (B, L).
          values: its metrics from `step.train_step`.
          full: write all metrics, not only the loss, and to TensorBoard and W&B too.
          evaluation: rows of `evaluation.periodic` after this step, which must be full.
        """
        values = {name: float(value) for name, value in values.items()}
        if full:
            values |= self._meter.read(step) | self._text_metrics(batch, values)
        else:
            values = {"loss": values["loss"]}
            self._meter.begin(step)
        if evaluation:
            values |= periodic.metrics(evaluation)
            self._evaluated = periodic.summary(evaluation)
        values = {
            k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in values.items()
        }
        tokens = step * self._config.batch_size * self._config.sequence_length
        line = {"step": step, "time": time.time(), "tokens": tokens, **values}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        files.retry(self._file.flush, self._path)  # a retry resumes after the bytes written
        self._bar.advance()
        if full:
            numbers = {k: v for k, v in values.items() if not isinstance(v, str | None)}
            self._board.add(step, numbers)
            if self._wandb:
                self._wandb.add(step, values)
            self._bar.show(self._bar_text(values))

    def _bar_text(self, values: dict) -> str:
        shown = [("loss", "loss", ".3f"), ("tokens_per_second", "tokens/s", ",.0f")]
        parts = [
            f"{label} {values[name]:{form}}"
            for name, label, form in shown
            if values.get(name) is not None
        ]
        return ", ".join(parts + [self._evaluated] * bool(self._evaluated))

    def _text_metrics(self, batch: dict, values: dict) -> dict:
        of_text = {}
        if "among" not in batch:  # the targets are tokens
            scored = batch["targets"][batch["weights"] > 0]  # of this process
            bytes_per_token = int(self._byte_lengths[scored].sum()) / max(len(scored), 1)
            of_text = {
                "perplexity": perplexity(values["loss"]),
                "bits_per_byte": values["loss"] / math.log(2) / max(bytes_per_token, 1e-9),
            }
        return {
            **of_text,
            **self._more(),
            **segments.statistics(batch["segment"], batch["offset"], len(batch["offset"])),
        }


def _truncate(path: str, last_step: int) -> None:
    """Drops the lines of later steps, and a line at the end that a kill has cut off.

    If another line is no step's, the file is set aside as it is, and the lines of steps are kept.
    """
    files.set_aside_unless_file(path)
    if not files.exists(path):
        return
    with opening.to_read(path) as file:
        lines = file.read().split(b"\n")
    if metrics.is_cut_off(lines[-1]):
        lines.pop()
    steps = [metrics.step_of(line) for line in lines]
    if None in steps:
        files.set_aside(path, f"line {steps.index(None) + 1} is no step's")
    kept = [
        line + b"\n"
        for line, step in zip(lines, steps, strict=True)
        if step is not None and step <= last_step
    ]
    with files.replacing(path, "wb") as file:
        file.writelines(kept)


class _Meter:
    """Tokens a second and MFU since the last reading, without the first step, which compiles."""

    def __init__(self, config: Config):
        self._tokens_per_step = config.batch_size * config.sequence_length
        self._flops = flops_per_token(config)
        peak = peak_flops(config, jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        self._since: tuple[int, float] | None = None

    def begin(self, step: int) -> None:
        """Starts the clock after `step`, unless it runs."""
        self._since = self._since or (step, time.perf_counter())

    @contextlib.contextmanager
    def paused(self):
        """A context whose time does not count."""
        begin = time.perf_counter()
        yield
        if self._since:
            step, since = self._since
            self._since = step, since + time.perf_counter() - begin

    def read(self, step: int) -> dict:
        """The rates from the last reading to the end of `step`."""
        now, since = time.perf_counter(), self._since
        self._since = (step, now)
        if since is None:
            return {}
        rate = (step - since[0]) * self._tokens_per_step / (now - since[1])
        values = {"tokens_per_second": rate}
        if self._peak:
            values["mfu"] = rate * self._flops / self._peak
        return values
