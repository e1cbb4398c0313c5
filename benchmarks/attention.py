"""Time and memory of attention, forward and backward, for each backend that runs here.

python -m benchmarks.attention [--lengths=1024,4096] [--heads=12] [--width=64] [--kv_heads=12]
  [--tokens=1] [--rounds=5] [--calls=1] [--limit_gib=4]

A batch has --tokens tokens, at least one sequence. Each round runs every backend once (--calls times
in a row), in the opposite order of the round before. "xla" is JAX's own
jax.nn.dot_product_attention, for comparison; it and "reference" make L x L logits, and are skipped at
lengths where those take more than --limit_gib. bfloat16, on a CPU float32. Columns:

bias      none (as with RoPE, whose rotation of q and k is not included), or ALiBi of the segment
ms, min   of one call: median and fastest of the rounds
TFLOP/s   at the median; 6 B L^2 N H operations: causal attention counts once, nothing recomputed
MiB       temporaries that XLA allocates: without q, k, v and their gradients
/xla      speed over that of "xla": the median of the rounds' ratios
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Program, Timed, measure
from bipe_jax import plan
from bipe_jax.attention import BACKENDS, attention, choose
from bipe_jax.errors import UserError
from bipe_jax.positions.alibi import Alibi
from configs import quickstart

_TOKENS_PER_SEGMENT = 10


def xla(q, k, v, encodings):
    """jax.nn.dot_product_attention, with the bias as an L x L array."""
    heads = jnp.arange(q.shape[2])
    bias = [encoding.bias(prepared, prepared, heads) for encoding, prepared in encodings]
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias[0] if bias else None, is_causal=True, implementation="xla"
    )


def runs_here(backend, q, encodings, limit: float) -> bool:
    B, L, N, _ = q.shape
    logits = 4 * B * N * L * L
    if backend in ("xla", "reference") and logits > limit:
        return False
    try:
        return backend == "xla" or bool(
            choose(backend, jax.default_backend(), q, encodings=encodings)
        )
    except UserError:
        return False


def build(backend, arrays, encodings, segment, calls: int) -> Program:
    """The gradients of q, k and v of a product with random numbers."""
    *qkv, cotangent = arrays

    def loss(q, k, v, cotangent, segment):
        biases = [(encoding, encoding.features(segment)) for encoding in encodings]
        attend = xla if backend == "xla" else functools.partial(attention, backend=backend)
        mixed = attend(q, k, v, encodings=biases)
        return jnp.sum(mixed.astype(jnp.float32) * cotangent)

    args = (*qkv, cotangent, segment)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes

    def run():
        for _ in range(calls):
            out = compiled(*args)
        jax.block_until_ready(out)

    return Program(run, memory)


def time_length(args, config, length: int) -> dict:
    """The times of each (bias, backend), or the reason why it has none."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    B = max(args.tokens // length, 1)
    rng = np.random.default_rng(length)
    shapes = [(B, length, n, args.width) for n in (args.heads, *[args.kv_heads] * 2)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in (*shapes, shapes[0])]
    segment = jnp.broadcast_to(jnp.arange(length) // _TOKENS_PER_SEGMENT, (B, length))
    biases = {"none": [], "alibi": [Alibi(config, "segment", jax.random.key(0), slope_scale=96.0)]}
    builders = {
        (name, backend): functools.partial(build, backend, arrays, encodings, segment, args.calls)
        for name, encodings in biases.items()
        for backend in (*BACKENDS, "xla")
        if runs_here(backend, arrays[0], encodings, args.limit_gib * 2**30)
    }
    return measure(builders, args.rounds)


def lines(args, length, results):
    B = max(args.tokens // length, 1)
    flops = 6 * B * length**2 * args.heads * args.width
    for (bias, backend), timed in results.items():
        line = f"{B:5} {length:7} {bias:6} {backend:10} "
        if not isinstance(timed, Timed):
            yield line + f"left out: {timed}"
            continue
        seconds = [s / args.calls for s in timed.seconds]
        median, quickest = statistics.median(seconds), min(seconds)
        line += f"{median * 1e3:9.2f} {quickest * 1e3:9.2f} {flops / median / 1e12:8.3f} "
        line += f"{timed.memory / 2**20:8,.0f} "
        other = results.get((bias, "xla"))
        if isinstance(other, Timed):
            pairs = [b / a for a, b in zip(timed.seconds, other.seconds, strict=True)]
            yield line + f"{statistics.median(pairs):6.2f}"
        else:
            yield line + f"{'-':>6}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--tokens", type=int, default=1, help="of a batch; default: 1 sequence")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv_heads", type=int, default=0, help="default: as many as --heads")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1, help="of a program, in one round")
    parser.add_argument("--limit_gib", type=float, default=4, help="of L x L logits, float32")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    config = quickstart.get_config()
    config.model.heads = config.model.kv_heads = args.heads  # what ALiBi's slopes depend on
    config.model.width = args.heads * args.width
    config = plan.make(config)

    print(
        f"{args.heads} heads of {args.width}, {args.kv_heads} of keys, "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.rounds} rounds of "
        f"{args.calls} call(s)"
    )
    print(
        f"{'batch':5} {'length':>7} {'bias':6} {'backend':10} {'ms':>9} {'min':>9} {'TFLOP/s':>8} "
        f"{'MiB':>8} {'/xla':>6}"
    )
    for length in map(int, args.lengths.split(",")):
        for line in lines(args, length, time_length(args, config, length)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
