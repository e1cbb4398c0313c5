"""The base of the experiments on text: the smoke config, the quickstart's, or the authors' model and recipe.

The text is the quickstart's, at the size "paper" shards of the Pile; --config.data.train,
--config.data.evaluation and --config.data.sets name others.
"""

from typing import Any

from bipe_jax.config import file
from bipe_jax.errors import UserError

SIZES = {"quick": "smoke", "laptop": "quickstart", "paper": "bipe_rope_151m"}


def get_config(size: str = "quick"):
    if size not in SIZES:
        raise UserError(f"--config=...:{size} is unknown: use one of {', '.join(SIZES)}")
    c: Any = file.load(SIZES[size])
    # Named in full, so that arms of other lengths score the same targets.
    most = 4 if size == "quick" else 16
    c.evaluation.lengths = tuple(c.sequence_length * 2**i for i in range(most.bit_length()))
    return c
