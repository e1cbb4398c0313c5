"""How steps are compiled: options of XLA by platform, and the cache of compiled programs."""

import os

import jax

# XLA options by platform, for each compilation; all others are at XLA's default. XLA_FLAGS of the
# environment are the user's.
OPTIONS = {
    "cpu": {},
    # Collectives run beside products instead of between them; off by default.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    # libtpu overlaps collectives by default: `preflight` shows them as asynchronous.
    "tpu": {},
}


def enable_cache() -> None:
    """Keeps compiled programs in ~/.cache/bipe_jax, or where JAX_COMPILATION_CACHE_DIR says.

    A run that resumes, or another of the same shapes, starts without compiling. An empty
    JAX_COMPILATION_CACHE_DIR turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "bipe_jax"))
