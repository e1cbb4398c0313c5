"""Pretraining of language models with Bilevel Positional Encoding (BiPE) in JAX.

config, params = bipe_jax.load("runs/quickstart")
logits = bipe_jax.apply(config, params, tokens)
"""

import importlib
import importlib.metadata
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bipe_jax.api import apply as apply
    from bipe_jax.api import load as load
    from bipe_jax.evaluate import evaluate as evaluate
    from bipe_jax.evaluation.decode import Generator as Generator
    from bipe_jax.train import train as train

    __version__: str

# What the library offers, and where it is. It is imported when it is asked for: launchers import this
# package in milliseconds.
_HOMES = {
    "load": "bipe_jax.api",
    "apply": "bipe_jax.api",
    "train": "bipe_jax.train",
    "evaluate": "bipe_jax.evaluate",
    "Generator": "bipe_jax.evaluation.decode",
}
__all__ = ["Generator", "__version__", "apply", "evaluate", "load", "train"]


class _Package(types.ModuleType):
    """This package, whose `train` and `evaluate` are the functions, not the commands' modules.

    Python makes a submodule an attribute of its package when it is imported. Here the function keeps
    the name, whatever is imported first: `from bipe_jax.train import main` reaches the module.
    """

    def __setattr__(self, name, value):
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name == "__version__":
        try:
            value = importlib.metadata.version("bipe-jax")
        except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
            value = "0+unknown"
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
