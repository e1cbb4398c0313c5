"""Observing a run: time by phase, slow steps, memory, traces, heartbeats. See docs/reference/observing.md."""

from bipe_jax.training.observing.observer import Observer, process_start

__all__ = ["Observer", "process_start"]
