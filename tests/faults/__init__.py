"""Real trainings under faults, compared bit for bit with one that nothing disturbed.

python -m tests.faults --runs=200 [--seed=N] [--kinds=kill,term] [--jobs=2] [--directory=DIR]
"""

import os

from tests import xla_flags


def environment(root: str) -> dict:
    """Variables to be set before JAX is imported."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(root, "cache")
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "XLA_FLAGS": xla_flags.QUICK,
        "OPENBLAS_NUM_THREADS": "1",  # it would start threads as it is imported, see `forks`
    }
