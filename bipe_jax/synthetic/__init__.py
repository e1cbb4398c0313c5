"""Tasks whose examples are computed from a seed: the sources `synthetic:NAME(OPTION=VALUE, ...)`.

A task is a frozen dataclass of options. Its examples are numbered; each is a document (see
`data.examples`), and depends on the options, the seed, the split and its number alone.
"""

from bipe_jax.synthetic.registry import NAMES, Task, parse

__all__ = ["NAMES", "Task", "parse"]
