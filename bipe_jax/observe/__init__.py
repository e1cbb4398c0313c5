"""Observing a run: where its time goes, slow steps, memory, traces, signs of life. docs/observing.md"""

from bipe_jax.observe.watch import Watch, process_start

__all__ = ["Watch", "process_start"]
