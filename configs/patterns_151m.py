"""Which layers see what, as in released models; --config=configs/patterns_151m.py:PATTERN.

The authors' model with 4096 tokens. Windows and units are a quarter of that; in the models that the
patterns are named after they are 1/4 to 1/32 of the training length.

llama4     three layers of RoPE within chunks, then one without positions and with a temperature (Llama 4)
smollm3    three layers of RoPE, then one without positions (SmolLM3)
rnope_swa  three layers of RoPE in a sliding window, then one without positions (Yang et al. 2025)
gemma3     five layers of RoPE in a sliding window, then one of slow RoPE over everything (Gemma 3)
bipe_swa   three layers of BiPE-RoPE in a window of segments, then one with offsets alone
"""

from bipe_jax.errors import UserError
from bipe_jax.suggest import did_you_mean

from . import bipe_rope_151m

LENGTH = 4096
WINDOW = LENGTH // 4
_LOCAL, _GLOBAL = ("layers", "0,1,2/4"), ("layers", "3/4")
_OFFSET = (("learned", "offset", ("size", 1024)),)

# Pattern -> (position.absolute, position.relative).
PATTERNS = {
    "llama4": (
        (),
        (
            ("rope", "position", ("theta", 500000.0), _LOCAL),
            ("window", "position", ("size", WINDOW), ("chunked", True), _LOCAL),
            ("temperature", "position", ("unit", float(WINDOW)), _GLOBAL),
        ),
    ),
    "smollm3": ((), (("rope", "position", ("theta", 50000.0), _LOCAL),)),
    "rnope_swa": (
        (),
        (("rope", "position", _LOCAL), ("window", "position", ("size", WINDOW), _LOCAL)),
    ),
    "gemma3": (
        (),
        (
            ("rope", "position", ("layers", "0,1,2,3,4/6")),
            ("window", "position", ("size", WINDOW), ("layers", "0,1,2,3,4/6")),
            ("rope", "position", ("theta", 1000000.0), ("layers", "5/6")),
        ),
    ),
    "bipe_swa": (
        _OFFSET,
        (("rope", "segment", _LOCAL), ("window", "segment", ("size", 64), _LOCAL)),
    ),
}


def get_config(pattern: str = "llama4"):
    if pattern not in PATTERNS:
        hint = did_you_mean(pattern, PATTERNS)
        raise UserError(
            f"--config=...:{pattern} is unknown{hint}: use one of {', '.join(PATTERNS)}"
        )
    c = bipe_rope_151m.get_config()
    c.position.absolute, c.position.relative = PATTERNS[pattern]
    c.sequence_length = LENGTH
    c.batch_size = 64
    c.model.remat = "full"
    return c
