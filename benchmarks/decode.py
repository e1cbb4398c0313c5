"""Decoding: milliseconds a token against the length of the text before it.

python -m benchmarks.decode [--size=quickstart|151m|1b6] [--encodings=bipe_rope,rope] [--dtype=float32]
  [--lengths=256,1024,4096] [--rows=1] [--tokens=16] [--rounds=5]

Random parameters; each length has its own cache, of that many tokens or of those that can count. Each round
decodes --tokens tokens with every encoding, in the opposite order of the round before. Columns:

ms/token  one step of all rows, median over rounds, and the fastest
whole     the same step without a cache: the forward pass over all tokens, for comparison
prefill   tokens/s at which the prompt is read
MiB       of the cache
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Program, Timed, measure
from bipe_jax import model, plan
from bipe_jax.evaluation import decode, loaded
from bipe_jax.positions import NAMED
from bipe_jax.segments import Rule
from configs import bipe_rope_1b6, bipe_rope_151m, quickstart

SIZES = {"quickstart": quickstart, "151m": bipe_rope_151m, "1b6": bipe_rope_1b6}


def place(size: str, encoding: str, dtype: str) -> loaded.LoadedModel:
    config = SIZES[size].get_config()
    config.position.absolute, config.position.relative = NAMED[encoding]
    config.model.dtype = dtype or config.model.dtype
    config.model.vocab_size = config.model.vocab_size or 32000
    config = plan.make(config).with_rule(Rule((1,)))
    return loaded.on_all_devices(
        config, jax.jit(functools.partial(model.init, config))(jax.random.key(0))
    )


def prompts(placed, rows: int, length: int) -> list[np.ndarray]:
    """A rule by which about every tenth token ends a segment."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, placed.config.model.vocab_size, (rows, length))
    return list(np.where(rng.random(tokens.shape) < 0.1, 1, tokens).astype(np.int32))


def cached(placed, rows: int, length: int, tokens: int):
    """A program that decodes `tokens` tokens after `length` others, and the seconds of reading those."""
    generator = decode.Generator(placed, length + 2)
    text = prompts(placed, rows, length)
    jax.block_until_ready(generator._prefill(text))
    start = time.perf_counter()
    _, cache = jax.block_until_ready(generator._prefill(text))
    reading = time.perf_counter() - start
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    carried = [cache]

    def run():
        cache = carried.pop()
        with jax.set_mesh(placed.mesh):
            for _ in range(tokens):
                token = jnp.ones(rows, jnp.int32)
                # The same place each time, so that the length stays.
                logits, cache = generator._step(placed.params, placed.rule, cache, token)
                cache = cache | {"length": cache["length"] - 1}
            logits.block_until_ready()
        carried.append(cache)

    return Program(run, size), reading


def whole(placed, rows: int, length: int) -> Program:
    generator = decode.Generator(placed, length)
    text = np.stack(prompts(placed, rows, length))
    inputs = {"tokens": text, **decode.segments.coordinates(text, placed.rule)}
    counts = np.full(rows, length)

    def run():
        with jax.set_mesh(placed.mesh):
            generator._whole(placed.params, inputs, counts).block_until_ready()

    return Program(run, None)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--size", default="quickstart", choices=SIZES)
    parser.add_argument("--encodings", default="bipe_rope,bipe_alibi,rope")
    parser.add_argument("--dtype", default="", help="the config's")
    parser.add_argument("--lengths", default="256,1024,4096")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    device, dtype = jax.devices()[0].device_kind, args.dtype or "the config's dtype"
    print(f"{args.size}, {args.rows} row(s), {dtype}, {device}, jax {jax.__version__}")
    head = f"{'encoding':<12}{'length':>8}{'ms/token':>10}{'min':>8}{'whole':>10}{'prefill':>10}"
    print(f"{head}{'MiB':>8}")
    encodings = args.encodings.split(",")
    placed = {name: place(args.size, name, args.dtype) for name in encodings}
    for length in map(int, args.lengths.split(",")):
        built = {n: cached(p, args.rows, length, args.tokens) for n, p in placed.items()}
        builders = {
            (n, "step"): (lambda program=program: program) for n, (program, _) in built.items()
        }
        builders |= {
            (n, "whole"): functools.partial(whole, p, args.rows, length) for n, p in placed.items()
        }
        timings = measure(builders, args.rounds)
        for name in encodings:
            step, all_of_it = timings[name, "step"], timings[name, "whole"]
            if not isinstance(step, Timed):
                print(f"{name:<12}{length:>8}  {step}")
                continue
            each = [1e3 * s / args.tokens for s in step.seconds]
            again = (
                f"{1e3 * statistics.median(all_of_it.seconds):.1f}"
                if isinstance(all_of_it, Timed)
                else "-"
            )
            speed = args.rows * length / built[name][1]
            print(
                f"{name:<12}{length:>8}{statistics.median(each):>10.2f}{min(each):>8.2f}{again:>10}"
                f"{speed:>10,.0f}{step.memory / 2**20:>8.0f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
