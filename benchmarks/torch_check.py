"""Checks that the PyTorch decoder is the same model, and its train step the same step.

python -m benchmarks.torch_check

Prints, for each encoding, the differences of its logits and its first training steps from bipe_jax's, on
the CPU in float32. `step.py --torch=...` does this before it times anything.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_decoder
from bipe_jax import model, plan, segments
from bipe_jax.data.batches import annotate
from bipe_jax.training.step import init_state, train_step
from configs import quickstart

# Rounding's, at most. Adam's first steps make much of the sign of gradients that are all but 0.
LIMITS = {"logits": 1e-4, "loss": 1e-3, "gradient_norm": 1e-3}


def load(decoder, params: dict) -> None:
    """Copies the parameters of bipe_jax's model."""

    def rows(x):  # (D, ...) of one layer -> the weight of a Linear
        return x.reshape(len(x), -1).T

    params = jax.tree.map(np.array, params)
    D = params["embed"]["table"].shape[1]
    pairs = [
        (decoder.embed.weight, params["embed"]["table"]),
        (decoder.norm.scale, params["norm"]["scale"]),
        (decoder.output.weight, params["output"]["kernel"].T),
    ]
    for coordinate, table in decoder.tables.items():
        pairs.append((table.weight, params["absolute"][f"learned_{coordinate}"]["table"]))
    for i, layer in enumerate(decoder.layers):
        p = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        a, f = p["attention"], p["feed_forward"]
        pairs += [
            (layer.attention_norm.scale, p["attention_norm"]["scale"]),
            (layer.feed_forward_norm.scale, p["feed_forward_norm"]["scale"]),
            (
                layer.attention.qkv.weight,
                np.concatenate([rows(a[n]) for n in ("query", "key", "value")]),
            ),
            (layer.attention.output.weight, a["output"].reshape(-1, D).T),
            (layer.feed_forward.gate_up.weight, np.concatenate([rows(f["gate"]), rows(f["up"])])),
            (layer.feed_forward.down.weight, f["down"].T),
        ]
    with torch.no_grad():
        for weight, value in pairs:
            weight.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def differences(config, variant="sdpa", steps=3) -> dict:
    """Largest differences from bipe_jax, on the CPU in float32, of a small model of the same build.

    Returns:
      "logits": absolute. "loss" and "gradient_norm": relative, over the first training steps.
    """
    heads = config.model.heads
    c = plan.make(config).replace({
        "steps": 10**6, "batch_size": 2, "accumulation": 1,
        "optimizer.learning_rate": 3e-3, "optimizer.weight_decay": 1.0,  # three steps show both
        "sequence_length": 48, "loss_chunk": 48,
        "model.layers": 2, "model.vocab_size": 512,
        "model.width": 16 * heads, "model.feed_forward": 40 * heads,
        "model.dtype": "float32", "model.attention": "reference", "model.remat": "none",
        "schedule.name": "linear", "schedule.warmup_steps": 0, "schedule.decay_steps": 0,
    })  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 512, (2, 49), dtype=np.int32)
    batch = annotate(tokens, segments.Rule(length=5))

    def spread(x):  # logits near 1, so that no part of the model hides behind small numbers
        noise = 0.1 * jax.random.normal(jax.random.key(1), x.shape)
        return x * c.model.width**-0.5 / c.model.init_std if x.ndim > 2 else x + noise

    with jax.default_device(jax.devices("cpu")[0]):
        state = init_state(c, jax.random.key(0))
        state["params"] = jax.tree.map(spread, state["params"])
        decoder = torch_decoder.Decoder(c, written_out=variant == "eager")
        load(decoder, state["params"])
        inputs = torch_decoder.to_torch(batch, "cpu")
        with torch.no_grad():
            logits = decoder.logits(inputs).numpy()
        expected = jax.jit(functools.partial(model.apply, c))(state["params"], batch)
        deviations = {
            "logits": float(jnp.abs(logits - expected).max()),
            "loss": 0,
            "gradient_norm": 0,
        }
        jax_step = jax.jit(functools.partial(train_step, c))
        torch_step = torch_decoder.make_step(c, decoder, variant)
        for _ in range(steps):
            state, values = jax_step(state, batch)
            for name, got in zip(("loss", "gradient_norm"), torch_step(inputs), strict=True):
                error = abs(float(got) / float(values[name]) - 1)
                deviations[name] = max(deviations[name], error)
    return deviations


# Those that the PyTorch decoder has.
ENCODINGS = ("bipe_rope", "bipe_alibi", "rope", "alibi", "sinusoidal", "nope")


def check(config, variant="sdpa") -> dict:
    """`differences`; ends the program if they are larger than LIMITS."""
    deviations = differences(config, variant)
    if not all(deviations[name] < limit for name, limit in LIMITS.items()):
        raise SystemExit(f"the PyTorch decoder ({variant}) is not the same model: {deviations}")
    return deviations


if __name__ == "__main__":
    for encoding in ENCODINGS:
        for variant in ("eager", "sdpa"):
            deviations = check(quickstart.get_config(encoding), variant)
            shown = "  ".join(f"{name} {value:.1e}" for name, value in deviations.items())
            print(f"{encoding:12} {variant:8} {shown}")
