"""What each kind of encoding runs on and costs, as the table of docs/reference/positions.md.

python -m benchmarks.kinds [--config=quickstart] [--rounds=5] [--steps=2] [--set=batch_size=8 ...]

One row an encoding (bipe_jax/positions/named.py). Columns:

flash       whether it runs on flash kernels (splash attention on a TPU)
chunked     whether it runs in chunks, on any device
decode      whether decoding keeps a cache, and does not compute the whole text for each token
context     whether a mesh may cut blocks over mesh.context
export      whether python -m bipe_jax.convert to-hf takes it
parameters  of the encodings, in all layers
step        the time of a train step over that of rope: the median of the rounds' ratios
bytes       that decoding keeps of a token in a layer, besides keys and values of the model's width
"""

import argparse
import contextlib
import functools
import math
import statistics

import jax

from benchmarks.step import build, config_of, ratios
from benchmarks.timing import Timed, measure
from bipe_jax import model
from bipe_jax.attention import choose
from bipe_jax.convert import mapping, to_hf
from bipe_jax.errors import UserError
from bipe_jax.evaluation.caching import empty_cache
from bipe_jax.positions import NAMED
from bipe_jax.segments import Rule


def runs_on(backend: str, platform: str, config) -> None:
    """Raises UserError unless the backend computes the config's encodings."""
    m = config.model
    q = jax.ShapeDtypeStruct((1, config.sequence_length, m.heads, m.width // m.heads), "bfloat16")
    choose(backend, platform, q, encodings=config.encodings.scoring)


def has_cache(config) -> None:
    if not config.encodings.cacheable:
        raise UserError("the whole text is computed for each token")


def is_exported(config) -> None:
    to_hf.encodings_of(config)
    mapping.pairs(config)


# What an encoding may be able to do -> a function of the config that raises UserError if it is not.
ABILITIES = {
    "flash": functools.partial(runs_on, "splash", "tpu"),
    "chunked": functools.partial(runs_on, "chunked", "cpu"),
    "decode": has_cache,
    "context": lambda config: config.replace({"mesh.context": 2}),
    "export": is_exported,
}


def can(ability, config) -> str:
    with contextlib.suppress(UserError):
        ability(config)
        return "yes"
    return "no"


def parameters(config) -> int:
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    own = [shapes.get("absolute"), shapes.get("relative"), shapes["layers"].get("relative")]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(own))


def kept(config) -> float:
    """Bytes of a token in a layer."""
    m = config.model
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 64))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache["layers"]))
    width = m.width // m.heads
    plain = 2 * m.layers * m.kv_heads * width * 64 * jax.numpy.dtype(m.dtype).itemsize
    return (size - plain) / m.layers / 64


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="a file under configs/, without .py")
    parser.add_argument("--set", action="append", default=[], help="such as model.layers=2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps that a program runs a round")
    parser.add_argument("--encodings", default=",".join(NAMED))
    args = parser.parse_args()

    names = ["rope", *(name for name in args.encodings.split(",") if name != "rope")]
    configs = {name: config_of(args, name, 0).with_rule(Rule()) for name in names}
    device = jax.devices()[0].device_kind
    print(
        f"{args.config}: batch {configs['rope'].batch_size} x {configs['rope'].sequence_length}, "
        f"{device}, jax {jax.__version__}; {args.rounds} rounds of {args.steps} step(s)\n"
    )
    print(f"| encoding | {' | '.join(ABILITIES)} | parameters | step | bytes |")
    print("|---" * (len(ABILITIES) + 4) + "|")
    for name, config in configs.items():
        # Beside RoPE, in turn, so that other work on the machine falls on both.
        pair = {
            n: functools.partial(build, configs[n], args.steps, "")
            for n in dict.fromkeys(("rope", name))
        }
        timed = measure(pair, args.rounds)
        ours, rope = timed[name], timed["rope"]
        if isinstance(ours, Timed) and isinstance(rope, Timed):
            times = f"{1 / statistics.median(ratios(ours, rope)):.2f}"
        else:
            times = "–"
        abilities = " | ".join(can(ability, config) for ability in ABILITIES.values())
        print(
            f"| `{name}` | {abilities} | {parameters(config):,} | {times} | {kept(config):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
