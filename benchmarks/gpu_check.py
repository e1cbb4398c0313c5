"""Checks the flash attention that a GPU runs: forward and gradients, for the encodings that run on it.

python -m benchmarks.gpu_check [--backend=cudnn] [--encodings=rope,fox] [--length=1000] [--heads=8]
  [--kv_heads=2] [--width=64]

Compares a backend in bfloat16 with the backend "reference" in float32 on the same (rounded) inputs,
with documents kept apart, heads in groups, and a length that is no multiple of a kernel's tile.
--backend=cudnn-xla is cuDNN's path computed by XLA; it and "chunked" run on a CPU too. Each number is
a relative error, ||got - expected|| / ||expected||. Columns:

out, dq, dk, dv   the error of the result, and of the gradients of q, k and v
dx                of the gradient of the layer's input, for an encoding that reads it: sums over the row of
                  what kernels give in bfloat16, whose roundings add up
no encoding       the smallest of the four for a reference without the encoding: a control, as a backend
                  without the bias or the rotation would give
no documents      the same for a reference whose documents are not kept apart

Exits with status 1 unless every error is below --limit, that of dx below 5 times as much, and every
control 4 times above it.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from bipe_jax import plan, segments
from bipe_jax.attention import attention, kernels
from bipe_jax.attention.scoring import Side
from bipe_jax.data.batches import annotate
from configs import quickstart

ENCODINGS = "rope,bipe_rope,alibi,bipe_alibi,fox,bipe_fox,xpos,bipe_xpos,pope"


def attend(config, backend: str, inputs, q, k, v, x):
    """Attention of one layer of the model, with the encodings of `position.relative`."""
    modules = config.encodings.make_layer(jax.random.key(0))
    layer = config.encodings.of_layer(0, modules, inputs, {})
    features = layer.features(x)
    q, k = layer.turn(q, k, features)
    acting = layer.scoring(features, inputs.get("document_ids"))
    documents = inputs.get("document_ids")
    if backend == "cudnn-xla":
        L, N = q.shape[1:3]
        side = Side(jnp.arange(L)[None], documents, [of_tokens for _, of_tokens in acting])
        encodings = [encoding for encoding, _ in acting]
        heads = jnp.arange(N)
        return kernels.cudnn(q, k, v, side, side, encodings, heads, implementation="xla")
    return attention(q, k, v, encodings=acting, document_ids=documents, backend=backend)


def out_and_gradients(config, backend, inputs, arrays, cotangent, dtype) -> list:
    """The list [out, dq, dk, dv], and dx for an encoding that reads the layer's input, in float64."""

    def run(arrays, cotangent):
        out, backward = jax.vjp(lambda *arrays: attend(config, backend, inputs, *arrays), *arrays)
        return out, *backward(cotangent)

    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        results = jax.jit(run)([x.astype(dtype) for x in arrays], cotangent.astype(dtype))
    results = [np.asarray(x, np.float64) for x in results]
    reads = any(module.reads_input for module in config.encodings.abstract.values())
    return results if reads else results[:-1]


def errors(got, expected) -> list[float]:
    norm = np.linalg.norm
    return [float(norm(g - e) / norm(e)) for g, e in zip(got, expected, strict=False)]


def check(encoding: str, args) -> dict:
    """The relative error of each column."""
    config = quickstart.get_config(encoding)
    config.model.heads, config.model.kv_heads = args.heads, args.kv_heads
    config.model.width = args.heads * args.width
    config = plan.make(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, args.length + 1), dtype=np.int32)
    documents = np.cumsum(rng.random(tokens.shape) < 4 / args.length, axis=1)  # 5 or so a row
    rule = segments.Rule(separators=(0, 1, 2, 3, 4, 5))  # some 11 tokens a segment
    inputs = annotate(tokens, rule, documents.astype(np.int32))

    shapes = [(2, args.length, n, args.width) for n in (args.heads, *[args.kv_heads] * 2)]
    shapes += [(2, args.length, args.heads * args.width), shapes[0]]
    *arrays, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    def reference(config, inputs):
        return out_and_gradients(config, "reference", inputs, arrays, cotangent, jnp.float32)

    got = out_and_gradients(config, args.backend, inputs, arrays, cotangent, jnp.bfloat16)
    deviations = dict(
        zip(("out", "dq", "dk", "dv", "dx"), errors(got, reference(config, inputs)), strict=False)
    )
    bare = config.replace({"position.relative": ()})
    deviations["no encoding"] = min(errors(got, reference(bare, inputs)))
    crossing = {name: x for name, x in inputs.items() if name != "document_ids"}
    deviations["no documents"] = min(errors(got, reference(config, crossing)))
    return deviations


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="cudnn", help="or cudnn-xla, or one of bipe_jax's")
    parser.add_argument("--encodings", default=ENCODINGS)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--limit", type=float, default=0.02)
    args = parser.parse_args()

    print(
        f"{args.backend}, 2 x {args.length} tokens, {args.heads} heads of {args.width}, "
        f"{args.kv_heads} of keys, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    good = True
    for encoding in args.encodings.split(","):
        deviations = check(encoding, args)
        controls = [deviations["no encoding"], deviations["no documents"]]
        right = max(deviations[name] for name in ("out", "dq", "dk", "dv")) < args.limit
        right &= deviations.get("dx", 0) < 5 * args.limit
        right &= min(controls) > 4 * args.limit
        good &= right
        shown = "  ".join(f"{name} {value:.5f}" for name, value in deviations.items())
        print(f"{encoding:12} {shown}  {'ok' if right else 'WRONG'}", flush=True)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
