"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, the progress bar, FLOPs.

Model FLOP utilisation (MFU) is the model's own FLOPs a second over the devices' peak: 6 FLOPs a
token for each weight of a matrix product (2 forward, 4 backward; the lookup of embeddings counts
nothing) plus 6 L D a layer for causal attention (each query sees half of the L keys on average).
What is recomputed does not count.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time

import jax
import numpy as np
import tqdm
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from bipe_jax import hardware
from bipe_jax.training.observing.wandb_board import WandbBoard
from bipe_jax.workdir import Workdir, files

_LOG = logging.getLogger(__name__)

_EVERY = 10  # seconds between lines of the progress bar in a file


def peak_flops(config, device_kind: str) -> float | None:
    """FLOPs a second of one device: `log.peak_flops` if set, else by its kind, else None."""
    return config.log.peak_flops or hardware.peak_flops(device_kind)


def flops_per_token(config) -> float:
    """Model FLOPs of one token in training (forward and backward); see the module's text."""
    m = config.model
    head_width = m.width // m.heads
    attention = 2 * m.width * head_width * (m.heads + m.kv_heads)
    weights = m.layers * (attention + 3 * m.width * m.feed_forward) + m.width * m.vocab_size
    return 6.0 * weights + 6.0 * m.layers * config.sequence_length * m.width


def segment_statistics(segment: np.ndarray, offset: np.ndarray, blocks: int) -> dict:
    """Of that many blocks in a row: tokens a segment (mean, 99th percentile), segments a block (mean).

    Each block begins a segment: with offset 0.
    """
    starts = np.flatnonzero(offset.ravel() == 0)
    lengths = np.diff(np.append(starts, offset.size))
    return {
        "segment_tokens_mean": float(lengths.mean()),
        "segment_tokens_p99": float(np.percentile(lengths, 99)),
        "segments_per_block": len(starts) / blocks,
        "segment_max": int(segment.max()),
    }


def perplexity(loss: float) -> float:
    """exp(loss in nats a token); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class _Lines:
    """The progress bar in a file, such as the log of a job: a line each time, that nothing overwrites."""

    def write(self, text: str) -> None:
        if text := text.strip():
            _LOG.info(text)

    def flush(self) -> None:
        pass


class Log:
    """Writes WORKDIR/metrics.jsonl, WORKDIR/tensorboard, the progress bar and, if asked, to W&B.

    Lines of steps after `first_step`, left by a run that was cut off, are dropped: they are made
    again.
    """

    def __init__(self, config, workdir: str, first_step: int, tokenizer, data):
        self._config, self._workdir = config, workdir
        self._byte_lengths = tokenizer.byte_lengths()
        self._data = data
        self._wandb = WandbBoard(config, workdir) if config.log.wandb else None
        self._open(first_step)

    def _open(self, first_step: int):
        self._path = Workdir(self._workdir).metrics
        _truncate(self._path, first_step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _Board(Workdir(self._workdir).tensorboard, first_step + 1)
        watched = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=self._config.steps,
            initial=first_step,
            unit="step",
            file=None if watched else _Lines(),
            dynamic_ncols=watched,
            mininterval=1 if watched else _EVERY,
        )
        self._meter = _Meter(self._config)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        # What went wrong before, such as a disk that is full, matters more.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self._close()
        if self._wandb:
            self._wandb.close(failed=error is not None)

    def _close(self):
        self._bar.close()
        self._board.close()
        self._file.close()

    def rewind(self, step: int) -> None:
        """Goes back behind a step: the lines of later ones are dropped."""
        self._close()
        self._open(step)

    def write(self, step: int, batch: dict, values: dict, full: bool) -> None:
        """Logs one step.

        Args:
          step: its number, from 1. Steps come in order.
          batch: what it was trained on, NumPy arrays (B, L).
          values: its metrics from `step.train_step`.
          full: write all metrics, not the loss alone, and to TensorBoard and W&B too.
        """
        values = {name: float(value) for name, value in values.items()}
        if full:
            values |= self._meter.read(step) | self._text_metrics(batch, values)
        else:
            values = {"loss": values["loss"]}
            self._meter.begin(step)
        values = {
            k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in values.items()
        }
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        files.retry(self._file.flush, self._path)  # a flush that failed continues where it was
        self._bar.update(1)
        if full:
            self._board.add(
                step, {k: v for k, v in values.items() if not isinstance(v, str | None)}
            )
            if self._wandb:
                self._wandb.add(step, values)
            self._bar.set_postfix_str(
                ", ".join(
                    f"{label} {values[name]:{form}}"
                    for name, label, form in (
                        ("loss", "loss", ".3f"), ("tokens_per_second", "tokens/s", ",.0f"),
                    )
                    if values.get(name) is not None
                ),
                refresh=False,
            )  # fmt: skip

    def _text_metrics(self, batch: dict, values: dict) -> dict:
        scored = batch["targets"][batch["weights"] > 0]  # this process's
        bytes_per_token = int(self._byte_lengths[scored].sum()) / max(len(scored), 1)
        return {
            "perplexity": perplexity(values["loss"]),
            "bits_per_byte": values["loss"] / math.log(2) / max(bytes_per_token, 1e-9),
            **self._data(),
            **segment_statistics(batch["segment"], batch["offset"], len(batch["offset"])),
        }


class _Board:
    """TensorBoard's events. The writer of tensorboardX has a thread, without which the training hangs
    when the disk has failed it once."""

    def __init__(self, directory: str, purge_step: int):
        os.makedirs(directory, exist_ok=True)
        self._directory = directory
        self._events = EventsWriter(os.path.join(directory, "events"))
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: dict) -> None:
        scalars = [summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))

    def _write(self, **content) -> None:
        self._events.write_event(Event(wall_time=time.time(), **content))
        files.retry(self._events.flush, self._directory)

    def close(self) -> None:
        self._events.close()


def _truncate(path: str, last_step: int) -> None:
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except ValueError:  # cut off in the middle
                continue
    files.write_text(path, "".join(kept))


class _Meter:
    """Tokens a second and MFU since the last reading; the first step, which compiles, is left out."""

    def __init__(self, config):
        self._tokens_per_step = config.batch_size * config.sequence_length
        self._flops = flops_per_token(config)
        peak = peak_flops(config, jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        self._since: tuple[int, float] | None = None

    def begin(self, step: int) -> None:
        """`step` is complete: starts the clock, if it does not run yet."""
        self._since = self._since or (step, time.perf_counter())

    def read(self, step: int) -> dict:
        """`step` is complete: the rates since the last reading."""
        now, since = time.perf_counter(), self._since
        self._since = (step, now)
        if since is None:
            return {}
        rate = (step - since[0]) * self._tokens_per_step / (now - since[1])
        values = {"tokens_per_second": rate}
        if self._peak:
            values["mfu"] = rate * self._flops / self._peak
        return values
