"""Observing a run: where its time goes, slow steps, memory, traces, heartbeats. See docs/observing.md."""

from bipe_jax.training.observing.observer import Observer, process_start

__all__ = ["Observer", "process_start"]
