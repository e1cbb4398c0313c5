"""Tokens a second and memory of a train step, for each positional encoding.

python benchmarks/step.py [--config=quickstart] [--rounds=8] [--set=batch_size=8 ...]

Each round runs every encoding once, in turn, after two steps of warm-up; a row is the median of the
rounds. Memory is what XLA allots to the compiled step: its arguments and its temporaries.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import statistics
import time

import jax
import numpy as np

from bipe_jax import metrics, segments, sharding
from bipe_jax.config import validate
from bipe_jax.data.stream import annotate
from bipe_jax.step import compile_on
from configs.quickstart import ENCODINGS

_TOKENS_PER_SEGMENT = 10


def _build(config):
    """(a function that runs one step and waits for it, bytes of the compiled step)."""
    validate(config)
    mesh = sharding.make_mesh(config)
    shape = (config.batch_size, config.sequence_length + 1)
    block = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    rule = segments.Rule(length=_TOKENS_PER_SEGMENT)
    with jax.set_mesh(mesh):
        init, step, abstract = compile_on(config, mesh)
        batch = sharding.place_batch(mesh, annotate(block, rule))
        compiled = step.lower(abstract, batch).compile()
        held = {"state": init(jax.random.key(0))}
    memory = compiled.memory_analysis()

    def run():
        held["state"], values = compiled(held["state"], batch)
        jax.block_until_ready(values)

    return run, memory.argument_size_in_bytes + memory.temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="quickstart", help="a file under configs/, without .py")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--encodings", default=",".join(ENCODINGS))
    parser.add_argument("--set", action="append", default=[], help="such as model.layers=2")
    args = parser.parse_args()

    runs, times = {}, {}
    for name in args.encodings.split(","):
        config = importlib.import_module(f"configs.{args.config}").get_config()
        config.position.absolute, config.position.relative = ENCODINGS[name]
        for assignment in args.set:
            key, _, value = assignment.partition("=")
            with contextlib.suppress(ValueError, SyntaxError):  # a bare word is a string
                value = ast.literal_eval(value)
            *groups, field = key.split(".")
            functools.reduce(getattr, groups, config)[field] = value
        runs[name], times[name] = _build(config), []
        for _ in range(2):
            runs[name][0]()
    for _ in range(args.rounds):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)

    tokens = config.batch_size * config.sequence_length
    device = jax.devices()[0]
    print(
        f"{args.config}: batch {config.batch_size} x {config.sequence_length}, "
        f"{metrics.flops_per_token(config) / 1e6:.1f} MFLOP a token, {jax.device_count()} x "
        f"{device.device_kind}, jax {jax.__version__}"
    )
    print(f"{'encoding':12} {'tokens/s':>10} {'min-max':>17} {'GFLOP/s':>8} {'MiB':>7}")
    for name, (_, size) in runs.items():
        rates = sorted(tokens / t for t in times[name])
        median = statistics.median(rates)
        flops = median * metrics.flops_per_token(config) / 1e9
        low, high = rates[0], rates[-1]
        print(
            f"{name:12} {median:10,.0f} {low:8,.0f}-{high:<8,.0f} {flops:8.1f} {size / 2**20:7.0f}"
        )


if __name__ == "__main__":
    main()
