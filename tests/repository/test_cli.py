"""What commands set up: the cache of compiled programs."""

import os
import pwd

import jax
import pytest

from bipe_jax import cli


@pytest.mark.parametrize(
    ("variables", "known", "expected"),
    [
        ({"HOME": "/home/x"}, True, "/home/x/.cache/bipe_jax"),
        ({"HOME": "/home/x", "XDG_CACHE_HOME": "/c"}, True, "/c/bipe_jax"),
        ({"HOME": "/home/x", "XDG_CACHE_HOME": "c"}, True, "/home/x/.cache/bipe_jax"),
        ({"HOME": "/home/x", "JAX_COMPILATION_CACHE_DIR": ""}, True, None),
        ({}, False, None),
        ({"HOME": ""}, True, None),
    ],
)
def test_where_programs_are_cached(monkeypatch, variables, known, expected):
    """Never in a directory that is called `~`."""
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not known:

        def unknown(_):
            raise KeyError("uid not found")

        monkeypatch.setattr(pwd, "getpwuid", unknown)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        cli.cache_programs()
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert not os.path.exists("~")
