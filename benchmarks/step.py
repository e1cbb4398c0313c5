"""Tokens a second and memory of a train step, for each positional encoding, and for PyTorch's.

python -m benchmarks.step [--config=quickstart] [--set=batch_size=8 ...] [--encodings=rope,bipe_rope]
  [--lengths=1024,4096] [--torch=eager,sdpa,compile] [--rounds=8] [--steps=1] [--alternate=auto]

One table a length; batch_size changes so that a step has as many tokens at each. Each round runs
every program once, in the opposite order of the round before. Columns:

ms, min      of a step: the median of the rounds, and the fastest
tokens/s     at that median, and at the fastest
MFU          model FLOPs over the device's peak, at the median; causal attention counts once,
             recomputation does not count. GFLOP/s where the peak is not known
MiB          at the peak: allocated by XLA for the compiled step; on a GPU, by PyTorch
/rope        tokens/s over those of rope, same program: the median of the rounds' ratios
jax/this     bipe_jax's tokens/s over this program's: the median of the rounds' ratios; their minimum

PyTorch (see torch_decoder.py for its variants) is first checked to be the same model. When it is timed
on a GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false, or JAX reserves most of the memory. On a CPU
its threads wait for each other at every operation: with other work on the machine, compare only the
fastest steps and not the medians.
"""

import argparse
import ast
import contextlib
import functools
import gc
import importlib
import os
import statistics

import jax
import numpy as np

from benchmarks.timing import Program, Timed, measure
from bipe_jax import plan, segments, sharding
from bipe_jax.data.batches import annotate
from bipe_jax.flops import flops_per_token
from bipe_jax.positions import NAMED
from bipe_jax.training import metrics
from bipe_jax.training.step import compile_on, init_state

_TOKENS_PER_SEGMENT = 10


def config_of(args, encoding: str, length: int):
    """The config with --set, an encoding, and a length at which a step has as many tokens."""
    config = importlib.import_module(f"configs.{args.config}").get_config()
    for assignment in args.set:
        key, _, value = assignment.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):  # a bare word is a string
            value = ast.literal_eval(value)
        *groups, field = key.split(".")
        functools.reduce(getattr, groups, config)[field] = value
    absolute, config.position.relative = NAMED[encoding]
    own = {entry[:2]: entry for entry in config.position.absolute}  # with the size of its tables
    config.position.absolute = tuple(own.get(entry[:2], entry) for entry in absolute)
    if length:
        config.batch_size = max(config.batch_size * config.sequence_length // length, 1)
        config.sequence_length = length
    return plan.make(config)


def make_batch(config) -> dict:
    shape = (config.batch_size, config.sequence_length + 1)
    block = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return annotate(block, segments.Rule(length=_TOKENS_PER_SEGMENT))


def build(config, steps: int, trace: str) -> Program:
    mesh = sharding.make_mesh(config)
    with jax.set_mesh(mesh):
        init, step, abstract = compile_on(config, mesh)
        batch = sharding.place_batch(mesh, make_batch(config))
        compiled = step.lower(abstract, batch).compile()
        carried = {"state": init(jax.random.key(0))}

    def run():
        for _ in range(steps):
            carried["state"], values = compiled(carried["state"], batch)
        jax.block_until_ready((carried["state"], values))

    if trace:
        run()
        with jax.profiler.trace(trace):
            run()
    m = compiled.memory_analysis()
    new = m.output_size_in_bytes - m.alias_size_in_bytes
    return Program(run, m.argument_size_in_bytes + new + m.temp_size_in_bytes)


def build_torch(config, variant: str, steps: int) -> Program:
    from benchmarks import torch_decoder

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return Program(*torch_decoder.build(config, variant, make_batch(config), steps, device))


def fit_together(configs, programs: int) -> bool:
    """Whether the train states of all programs take less than a third of the memory."""
    shapes = jax.eval_shape(lambda: init_state(configs[0], jax.random.key(0)))
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    stats = jax.devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return programs * state < stats.get("bytes_limit", host) / 3


def time_all(args, variants, configs) -> dict:
    """The times of each (encoding, program), or the reason why it has none."""
    # Where they do not fit together PyTorch comes first: JAX keeps what it once had.
    builders = {
        (encoding, variant): functools.partial(build_torch, config, variant, args.steps)
        for variant in variants
        for encoding, config in configs.items()
    } | {
        (encoding, "jax"): functools.partial(build, config, args.steps, args.trace)
        for encoding, config in configs.items()
    }
    together = args.alternate == "yes" or (
        args.alternate == "auto" and fit_together(list(configs.values()), len(builders))
    )
    release = gc.collect
    if variants:
        from benchmarks import torch_decoder

        torch_decoder.forget()
        release = torch_decoder.release
    results = measure(builders, args.rounds, together, release)
    return {(e, p): results[e, p] for e in configs for p in ("jax", *variants)}


def ratios(timed, other) -> list[float]:
    """The ratio of the speeds of the first and the second program, for each round."""
    return [b / a for a, b in zip(timed.seconds, other.seconds, strict=True)]


def table(args, config, results) -> str:
    """The table, one line a program."""
    tokens = config.batch_size * config.sequence_length
    flops = flops_per_token(config)
    peak = metrics.peak_flops(config, jax.devices()[0].device_kind)
    speed = "MFU" if peak else "GFLOP/s"
    lines = [
        f"{'encoding':12} {'program':8} {'ms':>9} {'min':>9} {'tokens/s':>10} {'(max)':>10} "
        f"{speed:>8} {'MiB':>7} {'/rope':>6} {'jax/this':>8} {'(min)':>6}"
    ]
    for (encoding, program), timed in results.items():
        line = f"{encoding:12} {program:8} "
        if not isinstance(timed, Timed):
            lines.append(line + f"left out: {timed}")
            continue
        seconds = [s / args.steps for s in timed.seconds]
        median, quickest = statistics.median(seconds), min(seconds)
        rate = tokens / median * flops
        speed = f"{rate / peak / jax.device_count():8.1%}" if peak else f"{rate / 1e9:8.1f}"
        memory = "-" if timed.memory is None else f"{timed.memory / 2**20:,.0f}"
        line += (
            f"{median * 1e3:9.1f} {quickest * 1e3:9.1f} {tokens / median:10,.0f} "
            f"{tokens / quickest:10,.0f} {speed} {memory:>7} "
        )
        rope, ours = results.get(("rope", program)), results[encoding, "jax"]
        if isinstance(rope, Timed) and encoding != "rope":
            line += f"{statistics.median(ratios(timed, rope)):6.3f} "
        else:
            line += f"{'-':>6} "
        if isinstance(ours, Timed) and program != "jax":
            pairs = ratios(ours, timed)
            line += f"{statistics.median(pairs):8.3f} {min(pairs):6.3f}"
        else:
            line += f"{'-':>8} {'-':>6}"
        lines.append(line)
    return "\n".join(lines)


def check_torch(variants, configs) -> None:
    from benchmarks import torch_check

    for encoding, config in configs.items():
        for variant in sorted({"eager" if v == "eager" else "sdpa" for v in variants}):
            deviations = torch_check.check(config, variant)
            print(
                f"{encoding}, PyTorch {variant}: logits differ by {deviations['logits']:.1e} at most"
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="a file under configs/, without .py")
    parser.add_argument("--set", action="append", default=[], help="such as model.layers=2")
    parser.add_argument("--encodings", default=",".join(NAMED))
    parser.add_argument("--lengths", default="0", help="default: the config's sequence_length")
    parser.add_argument("--torch", default="", help="eager, sdpa, compile; default: not timed")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1, help="steps that a program runs a round")
    parser.add_argument(
        "--alternate", choices=("auto", "yes", "no"), default="auto",
        help="no: one program after the other; auto: if the states of all take too much memory",
    )  # fmt: skip
    parser.add_argument("--trace", default="", help="directory for jax.profiler's traces of rounds")
    args = parser.parse_args()
    variants = [name for name in args.torch.split(",") if name]
    encodings = args.encodings.split(",")

    versions = f"jax {jax.__version__}"
    if variants:
        import torch

        versions += f", torch {torch.__version__}"
        check_torch(variants, {e: config_of(args, e, 0) for e in encodings})
    for length in map(int, args.lengths.split(",")):
        configs = {encoding: config_of(args, encoding, length) for encoding in encodings}
        results = time_all(args, variants, configs)
        config = configs[encodings[0]]
        print(
            f"\n{args.config}: batch {config.batch_size} x {config.sequence_length}, "
            f"{config.model.dtype}, remat {config.model.remat}, "
            f"{flops_per_token(config) / 1e6:.1f} MFLOP a token, {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}, {versions}; {args.rounds} rounds of {args.steps} step(s)"
        )
        print(table(args, config, results), flush=True)


if __name__ == "__main__":
    main()
