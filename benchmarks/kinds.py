"""What each kind of encoding runs on and costs, as the table of docs/positions.md.

python -m benchmarks.kinds [--config=quickstart] [--rounds=5] [--steps=2] [--set=batch_size=8 ...]

One row an encoding (bipe_jax/positions/named.py). Columns:

flash       whether it runs on flash kernels (splash, cuDNN)
export      whether python -m bipe_jax.convert to-hf takes it
parameters  of the encodings, in all layers
ms          of a train step, and the median of the rounds' ratios to that of rope
bytes       that decoding keeps of a token in a layer, besides keys and values of the model's width
"""

import argparse
import functools
import math
import statistics

import jax

from benchmarks.step import build, config_of, ratios
from benchmarks.timing import Timed, measure
from bipe_jax import model
from bipe_jax.convert import mapping, to_hf
from bipe_jax.errors import UserError
from bipe_jax.evaluation.decode import empty_cache
from bipe_jax.positions import NAMED


def runs_on_flash(config) -> bool:
    def folds(encoding) -> bool:
        acts = encoding.acts
        return not acts & {"visible", "logits"} and ("bias" not in acts or "columns" in acts)

    return all(map(folds, config.encodings.scoring))


def is_exported(config) -> bool:
    try:
        to_hf.encodings_of(config)
        mapping.pairs(config)
    except UserError:
        return False
    return True


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
    configs = {name: config_of(args, name, 0) for name in names}
    device = jax.devices()[0].device_kind
    print(
        f"{args.config}: batch {configs['rope'].batch_size} x {configs['rope'].sequence_length}, "
        f"{device}, jax {jax.__version__}; {args.rounds} rounds of {args.steps} step(s)\n"
    )
    print("| encoding | flash | export | parameters | ms | times RoPE's | bytes |")
    print("|---|---|---|---|---|---|---|")
    for name, config in configs.items():
        # Beside RoPE, in turn, so that other work on the machine falls on both.
        pair = {
            n: functools.partial(build, configs[n], args.steps, "")
            for n in dict.fromkeys(("rope", name))
        }
        timed = measure(pair, args.rounds)
        ours, rope = timed[name], timed["rope"]
        if isinstance(ours, Timed) and isinstance(rope, Timed):
            ms = f"{statistics.median(ours.seconds) / args.steps * 1e3:.1f}"
            times = f"{1 / statistics.median(ratios(ours, rope)):.2f}"
        else:
            ms = times = "–"
        flash, export = ("yes" if x else "no" for x in (runs_on_flash(config), is_exported(config)))
        print(
            f"| `{name}` | {flash} | {export} | {parameters(config):,} | {ms} | {times} | "
            f"{kept(config):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
