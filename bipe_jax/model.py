"""A Llama-like decoder: RMSNorm, SwiGLU, grouped-query attention, any positional encodings.

NNX modules declare the parameters; what runs are the pure functions at the end. Shape letters:
B batch, L length, N heads, K key/value heads, H head width, D width, F feed-forward width, V
vocabulary. Parameters are float32 and are cast to `model.dtype` where they are used; normalisation,
angles, biases and softmax are float32.

`inputs` is a dict of (B, L) integers: "tokens", the coordinates, and "document_ids" if documents are
kept apart in attention.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from bipe_jax import positions
from bipe_jax.attention import attention
from bipe_jax.attention.chunked import RESIDUAL
from bipe_jax.sharding import constrain, context_shards, look_up

# What the forward pass keeps for the backward pass, by `model.remat`; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESIDUAL),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Weight(nnx.Param):
    """A matrix drawn from N(0, init_std)."""


def _weight(config, key, *shape: int) -> Weight:
    return Weight(config.model.init_std * jax.random.normal(key, shape))


def _multiply(pattern: str, x, weight):
    """einsum over activations (B, L, ...) and a weight in their dtype; "t" in the pattern is a token.

    With one dimension for all tokens the weight's gradient is a product of two matrices; with two of
    them XLA first makes transposed copies of the activations on a CPU. Where the length is cut over
    devices the two cannot become one.
    """
    weight = weight.astype(x.dtype)
    if context_shards() > 1:
        return jnp.einsum(pattern.replace("t", "bl"), x, weight)
    tokens = x.shape[:2]
    y = jnp.einsum(pattern, x.reshape(-1, *x.shape[2:]), weight)
    return y.reshape(*tokens, *y.shape[1:])


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang & Sennrich 2019, equation 4)."""

    def __init__(self, config):
        self.scale = nnx.Param(jnp.ones(config.model.width))
        self.epsilon = config.model.norm_epsilon

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * jnp.broadcast_to(self.scale[...], y.shape)).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config, key):
        m = config.model
        H = m.width // m.heads
        keys = jax.random.split(key, 4)
        self.query = _weight(config, keys[0], m.width, m.heads, H)
        self.key = _weight(config, keys[1], m.width, m.kv_heads, H)
        self.value = _weight(config, keys[2], m.width, m.kv_heads, H)
        self.output = _weight(config, keys[3], m.heads, H, m.width)

    def __call__(self, x, attend, given):
        q, k, v = (
            constrain(_multiply("td,dnh->tnh", x, w[...]), "heads")
            for w in (self.query, self.key, self.value)
        )
        mixed, found = attend(q, k, v, given)
        return _multiply("tnh,nhd->td", mixed, self.output[...]), found


class FeedForward(nnx.Module):
    """SwiGLU: (silu(x gate) * (x up)) down (Shazeer 2020, equation 6)."""

    def __init__(self, config, key):
        D, F = config.model.width, config.model.feed_forward
        keys = jax.random.split(key, 3)
        self.gate = _weight(config, keys[0], D, F)
        self.up = _weight(config, keys[1], D, F)
        self.down = _weight(config, keys[2], F, D)

    def __call__(self, x):
        gate, up = (_multiply("td,df->tf", x, w[...]) for w in (self.gate, self.up))
        hidden = constrain(jax.nn.silu(gate) * up, "feed_forward")
        return _multiply("tf,fd->td", hidden, self.down[...])


class Layer(nnx.Module):
    def __init__(self, config, key):
        keys = jax.random.split(key)
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, keys[0])
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config, keys[1])

    def __call__(self, x, attend, given):
        mixed, found = self.attention(self.attention_norm(x), attend, given)
        x += mixed
        x += self.feed_forward(self.feed_forward_norm(x))
        return constrain(x, "hidden"), found


class Table(nnx.Module):
    def __init__(self, config, key):
        self.table = _weight(config, key, config.model.vocab_size, config.model.width)


class Kernel(nnx.Module):
    def __init__(self, config, key):
        self.kernel = _weight(config, key, config.model.width, config.model.vocab_size)


class Decoder(nnx.Module):
    """Token embedding, absolute encodings, a stack of layers, final norm, output kernel."""

    def __init__(self, config, key):
        embed_key, layers_key, output_key, position_key = jax.random.split(key, 4)
        entries = positions.absolute(config)
        position_keys = jax.random.split(position_key, max(len(entries), 1))
        self.config = config
        self.embed = Table(config, embed_key)
        self.absolute = nnx.Dict(
            {
                entry.name: positions.ABSOLUTE[entry.kind](
                    config, entry.coordinate, entry_key, **entry.options
                )
                for entry, entry_key in zip(entries, position_keys, strict=False)
            }
        )
        layer_keys = jax.random.split(layers_key, config.model.layers)
        self.layers = nnx.vmap(functools.partial(Layer, config))(layer_keys)
        self.norm = RMSNorm(config)
        if not config.model.tied_output:
            self.output = Kernel(config, output_key)

    def output_kernel(self):
        """(D, V), in the compute dtype."""
        tied = self.config.model.tied_output
        kernel = self.embed.table[...].T if tied else self.output.kernel[...]
        return constrain(kernel.astype(self.config.model.dtype), "kernel")

    def __call__(self, inputs, attend, given=None):
        """Runs all layers.

        Args:
          inputs: "tokens" and the coordinates, (B, L) each.
          attend: (q, k, v, of this layer's `given`) -> (what attention gives, (B, L, N, H), and any
            tree of arrays). q, k and v are as projected, not turned yet.
          given: a tree of arrays that have the layers in front.

        Returns:
          (B, L, D) after the final norm, and what `attend` gave besides, layers in front.
        """
        config = self.config
        x = look_up("embed/table", self.embed.table[...], inputs["tokens"])
        for entry in positions.absolute(config):
            x += self.absolute[entry.name](inputs[entry.coordinate])
        x = constrain(x.astype(config.model.dtype), "hidden")
        graph, weights = nnx.split(self.layers)

        def layer(x, of_layer):
            weights, given = of_layer
            return nnx.merge(graph, weights)(x, attend, given)

        if config.model.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.model.remat])
        x, found = jax.lax.scan(layer, x, (weights, given))
        return self.norm(x), found


def attend_causally(config, inputs):
    """The `attend` of whole blocks: each token sees itself and those before it in the block."""
    encodings = positions.relative_encodings(config)
    prepared = [encoding.prepare(inputs[coordinate]) for coordinate, encoding in encodings]

    def attend(q, k, v, _):
        biases = []
        for (_, encoding), features in zip(encodings, prepared, strict=True):
            if encoding.rotates:
                q, k = encoding.rotate(q, features), encoding.rotate(k, features)
            else:
                biases.append((encoding, features))
        ids, backend = inputs.get("document_ids"), config.model.attention
        return attention(q, k, v, biases=biases, document_ids=ids, backend=backend), None

    return attend


def init(config, key) -> dict:
    """Fresh parameters: a nested dict of float32 arrays, those of the layers stacked in front."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, key), nnx.Param))


def run(config, params: dict, inputs: dict, attend, given=None):
    """The decoder with an `attend` of one's own, see `Decoder.__call__`.

    Returns:
      The final hidden states (B, L, D), the output kernel (D, V), both in `model.dtype`; and what
      `attend` gave besides.
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, params)
    decoder = nnx.merge(graph, state)
    x, found = decoder(inputs, attend, given)
    return x, decoder.output_kernel(), found


def hidden(config, params: dict, inputs: dict) -> tuple[jax.Array, jax.Array]:
    """The final hidden states (B, L, D) and the output kernel (D, V), both in `model.dtype`."""
    return run(config, params, inputs, attend_causally(config, inputs))[:2]


def logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, L, D) and (D, V), from `hidden` -> (B, L, V) float32."""
    return jnp.einsum("bld,dv->blv", x, kernel, preferred_element_type=jnp.float32)


def apply(config, params: dict, inputs: dict) -> jax.Array:
    """Logits (B, L, V), float32. For short blocks: `loss` never holds all logits at once."""
    return logits(*hidden(config, params, inputs))
