"""How steps are compiled: options of XLA by platform, and the cache of compiled programs."""

import os

import jax

# XLA options by platform, given to each compilation (the environment's XLA_FLAGS are left to the
# user). What is not here is at XLA's default.
OPTIONS = {
    "cpu": {},
    # Collectives run beside products instead of between them; off by default.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    # libtpu overlaps collectives by default: `preflight` shows them as asynchronous.
    "tpu": {},
}


def enable_cache() -> None:
    """Keeps compiled programs in ~/.cache/bipe_jax, or where JAX_COMPILATION_CACHE_DIR says.

    A run that goes on, or another of the same shape, starts without compiling. An empty
    JAX_COMPILATION_CACHE_DIR turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "bipe_jax"))
