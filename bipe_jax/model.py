# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""A Llama-like decoder: RMSNorm, SwiGLU, grouped-query attention, any positional encodings.

NNX modules declare the parameters; what runs are the pure functions at the end. Shape letters:
B batch, L length, N heads, K key/value heads, H head width, D width, F feed-forward width, V
vocabulary. Parameters are float32 and are cast to `model.dtype` where they are used; normalisation,
angles, biases and softmax are float32.

`inputs` is a dict of (B, L) integers: "tokens", the coordinates, and "document_ids" if documents are
kept apart in attention.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bipe_jax.attention import attention
from bipe_jax.attention.chunked import RESIDUAL
from bipe_jax.collectives import look_up
from bipe_jax.output import Output
from bipe_jax.plan import Plan
from bipe_jax.positions import LayerEncodings
from bipe_jax.sharding import (
    Declaration,
    P,
    constrain,
    context_shards,
    declarations,
    parameter,
    platform,
)

Params = dict[str, Any]  # a nested dict of arrays
Inputs = Mapping[str, jax.Array]
# (x, q, k, v, encodings, carried) -> (output of attention, other output), see `Decoder.__call__`.
Attend = Callable[..., tuple[jax.Array, Any]]
# (what a layer adds, 0 if that is attention's or 1 if the feed-forward's) -> the same with dropout
Drop = Callable[[jax.Array, int], jax.Array]

# What the forward pass keeps for the backward pass, by `model.remat`; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESIDUAL),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _weight(
    config: Plan, key: jax.Array, shape: tuple[int, ...], axes: P, inputs: int
) -> nnx.Param[Any]:
    """A matrix drawn from N(0, init_std), see `sharding.parameter`."""
    return parameter(config.model.init_std * jax.random.normal(key, shape), axes, inputs)


def _multiply(pattern: str, x: jax.Array, weight: jax.Array) -> jax.Array:
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


def _drop(x: jax.Array, rate: float, key: jax.Array, rows: jax.Array) -> jax.Array:
    """x (B, L, D) with a share of its numbers set to 0, and the others divided by the rest.

    What is dropped of a row depends on the key and on the row's number alone (Srivastava et al. 2014).
    """
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return constrain(jnp.where(kept, x / (1 - rate), 0), "hidden")


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis (Zhang & Sennrich 2019, equation 4)."""

    def __init__(self, config: Plan, width: int):
        self.scale = parameter(jnp.ones(width), P(None))
        self.epsilon = config.model.norm_epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * jnp.broadcast_to(self.scale[...], y.shape)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention.

    With `model.qk_norm` the queries and keys of each head are normalised before an encoding turns them, with
    a scale (H,) that the heads share (Dehghani et al. 2023; in this form in Qwen3, Yang et al. 2025).
    """

    def __init__(self, config: Plan, key: jax.Array):
        m = config.model
        H = m.width // m.heads
        keys = jax.random.split(key, 4)
        into, out_of = P("fsdp", "tensor", None), P("tensor", None, "fsdp")
        self.query = _weight(config, keys[0], (m.width, m.heads, H), into, 1)
        self.key = _weight(config, keys[1], (m.width, m.kv_heads, H), into, 1)
        self.value = _weight(config, keys[2], (m.width, m.kv_heads, H), into, 1)
        self.output = _weight(config, keys[3], (m.heads, H, m.width), out_of, 2)
        self.normalises = m.qk_norm
        if m.qk_norm:
            self.query_norm, self.key_norm = RMSNorm(config, H), RMSNorm(config, H)

    def __call__(
        self, x: jax.Array, attend: Attend, encodings: LayerEncodings, carried: Any
    ) -> tuple[jax.Array, Any]:
        q, k, v = (
            constrain(_multiply("td,dnh->tnh", x, w[...]), "heads")
            for w in (self.query, self.key, self.value)
        )
        if self.normalises:
            q, k = self.query_norm(q), self.key_norm(k)
        mixed, extra = attend(x, q, k, v, encodings, carried)
        return _multiply("tnh,nhd->td", mixed, self.output[...]), extra


class FeedForward(nnx.Module):
    """SwiGLU: (silu(x gate) * (x up)) down (Shazeer 2020, equation 6)."""

    def __init__(self, config: Plan, key: jax.Array):
        D, F = config.model.width, config.model.feed_forward
        keys = jax.random.split(key, 3)
        self.gate = _weight(config, keys[0], (D, F), P("fsdp", "tensor"), 1)
        self.up = _weight(config, keys[1], (D, F), P("fsdp", "tensor"), 1)
        self.down = _weight(config, keys[2], (F, D), P("tensor", "fsdp"), 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (_multiply("td,df->tf", x, w[...]) for w in (self.gate, self.up))
        hidden = constrain(jax.nn.silu(gate) * up, "feed_forward")
        return _multiply("tf,fd->td", hidden, self.down[...])


class Layer(nnx.Module):
    def __init__(self, config: Plan, key: jax.Array):
        keys = jax.random.split(key)
        self.attention_norm = RMSNorm(config, config.model.width)
        self.attention = Attention(config, keys[0])
        self.feed_forward_norm = RMSNorm(config, config.model.width)
        self.feed_forward = FeedForward(config, keys[1])
        self.relative = nnx.Dict()  # of the stacked layers, see `Decoder`

    def __call__(
        self, x: jax.Array, attend: Attend, encodings: LayerEncodings, carried: Any, drop: Drop
    ) -> tuple[jax.Array, Any]:
        mixed, extra = self.attention(self.attention_norm(x), attend, encodings, carried)
        x += drop(mixed, 0)
        x += drop(self.feed_forward(self.feed_forward_norm(x)), 1)
        return constrain(x, "hidden"), extra


class Table(nnx.Module):
    """The token embedding."""

    def __init__(self, config: Plan, key: jax.Array):
        shape = (config.model.vocab_size, config.model.width)
        self.table = _weight(config, key, shape, P("tensor", "fsdp"), 0)


class Kernel(nnx.Module):
    """The output kernel. Muon leaves it to Adam, as it does the embedding."""

    def __init__(self, config: Plan, key: jax.Array):
        shape = (config.model.width, config.model.vocab_size)
        self.kernel = _weight(config, key, shape, P("fsdp", "tensor"), 0)


class Decoder(nnx.Module):
    """Token embedding, absolute encodings, a stack of layers, final norm, output kernel.

    `layers` are the parameters of all layers, stacked, and so are those of `layers.relative`, the encodings
    that have parameters of each layer's own; `relative` has those that the layers share.
    """

    def __init__(self, config: Plan, key: jax.Array):
        embed_key, layers_key, output_key, position_key = jax.random.split(key, 4)
        layer_keys = jax.random.split(layers_key, config.model.layers)
        encodings = config.encodings
        self.config = config
        self.embed = Table(config, embed_key)
        self.absolute = nnx.Dict(encodings.make_absolute(position_key))
        self.relative = nnx.Dict(encodings.make_shared(jax.random.fold_in(position_key, 0)))
        self.layers = nnx.vmap(functools.partial(Layer, config))(layer_keys)
        self.layers.relative = nnx.Dict(encodings.make_stacked(jax.random.fold_in(position_key, 1)))
        self.norm = RMSNorm(config, config.model.width)
        if not config.model.tied_output:
            self.output = Kernel(config, output_key)

    def output_layer(self) -> Output:
        """The kernel in the compute dtype, and the soft-cap."""
        m = self.config.model
        kernel = self.embed.table[...].T if m.tied_output else self.output.kernel[...]
        return Output(constrain(kernel.astype(m.dtype), "kernel"), m.logit_softcap)

    def __call__(
        self,
        inputs: Inputs,
        attend: Attend,
        carried: Any = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs all layers.

        Args:
          inputs: "tokens" and the coordinates, (B, L) each; with a key also "rows" (B, L), the number of
            each row in the whole batch.
          attend: (x, q, k, v, encodings, carried) of a layer -> (the output of attention, (B, L, N, H),
            and any tree of arrays). x is the input of the projections, q, k and v their outputs, not
            turned yet; `encodings` is a `LayerEncodings`.
          carried: a tree of arrays with a leading axis of layers; `attend` gets its layer's slice.
          key: of the dropout of the embedding and of what each layer adds; None: there is none.

        Returns:
          (B, L, D) after the final norm, and the other output of `attend`, with a leading axis of layers.
        """
        config, encodings = self.config, self.config.encodings
        x = look_up(self.embed.table, inputs["tokens"], config.model.dtype)
        for entry in encodings.absolute:
            x += self.absolute[entry.name](inputs[entry.coordinate])
        x = constrain(x.astype(config.model.dtype), "hidden")
        keys = None
        if key is not None:
            of_embedding, of_layers = jax.random.split(key)
            x = _drop(x, config.model.dropout, of_embedding, inputs["rows"][:, 0])
            keys = jax.random.split(of_layers, config.model.layers)
        prepared = encodings.prepare(self.relative, inputs)
        graph, weights = self._layers_alone()
        stacked = {name: nnx.split(kind) for name, kind in self.layers.relative.items()}

        def run(number: int, x: jax.Array, of_layer: Any) -> tuple[jax.Array, Any]:
            weights, params, carried, key = of_layer
            own = {name: nnx.merge(stacked[name][0], state) for name, state in params.items()}
            relative = encodings.of_layer(number, {**self.relative, **own}, inputs, prepared)

            def drop(x: jax.Array, site: int) -> jax.Array:
                if key is None:
                    return x
                of_site = jax.random.fold_in(key, site)
                return _drop(x, config.model.dropout, of_site, inputs["rows"][:, 0])

            return nnx.merge(graph, weights)(x, attend, relative, carried, drop)

        period = encodings.period
        layers: list[Callable[[jax.Array, Any], tuple[jax.Array, Any]]] = []
        xs: list[Any] = []
        for number in range(period):
            layer = functools.partial(run, number)
            if config.model.remat != "none":
                layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.model.remat])
            layers.append(layer)
            params = {
                name: _each(state, having.index(number), len(having))
                for name, (_, state) in stacked.items()
                if number in (having := encodings.layers_of(name))
            }
            own = [_each(tree, number, period) for tree in (weights, carried, keys)]
            xs.append((own[0], params, *own[1:]))

        def run_period(x: jax.Array, of_period: list[Any]) -> tuple[jax.Array, list[Any]]:
            extras: list[Any] = []
            for layer, of_layer in zip(layers, of_period, strict=True):
                x, extra = layer(x, of_layer)
                extras.append(extra)
            return x, extras

        x, extras = jax.lax.scan(run_period, x, xs, unroll=_unrolls())
        return self.norm(x), jax.tree.map(_in_order, *extras)

    def _layers_alone(self) -> tuple[Any, Any]:
        """One layer's graph, and the parameters of the stacked layers, without `layers.relative`."""
        layer = nnx.eval_shape(lambda: Layer(self.config, jax.random.key(0)))
        return nnx.graphdef(layer), nnx.state(self.layers, lambda path, _: path[0] != "relative")


def _unrolls() -> bool:
    """Whether the layers are compiled one by one instead of as a loop.

    On a GPU a loop copies what each layer keeps into arrays of all layers, which takes a third of a step
    and half of its memory (benchmarks/RESULTS.md). Where parameters are sharded the loop stays: it gathers
    one layer's at a time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return platform(mesh) == "gpu" and mesh.shape.get("fsdp", 1) == 1


def _each(tree: Any, first: int, step: int) -> Any:
    """The layers first, first + step, ... of arrays with a leading axis of layers."""
    return jax.tree.map(lambda x: x[first::step], tree) if step > 1 else tree


def _in_order(*of_layers: jax.Array) -> jax.Array:
    """The outputs of each layer of a period, (periods, ...) each -> (layers, ...)."""
    if len(of_layers) == 1:
        return of_layers[0]
    together = jnp.stack(of_layers, axis=1)
    return together.reshape(-1, *together.shape[2:])


def attend_causally(config: Plan, inputs: Inputs) -> Attend:
    """The `attend` of whole blocks: each token sees itself and those before it in the block."""

    def attend(
        x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, encodings: LayerEncodings, _: Any
    ) -> tuple[jax.Array, None]:
        features = encodings.features(x)
        q, k = encodings.turn(q, k, features)
        ids, backend = inputs.get("document_ids"), config.model.attention
        scoring = encodings.scoring(features, ids)
        return attention(q, k, v, encodings=scoring, document_ids=ids, backend=backend), None

    return attend


def init(config: Plan, key: jax.Array) -> Params:
    """Fresh parameters: a nested dict of float32 arrays, those of the layers stacked along a leading axis."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, key), nnx.Param))


def declared(config: Plan) -> dict[str, Declaration]:
    """Name of each parameter, its parts joined by "/" -> its mesh axes, see `sharding.declarations`."""
    decoder = nnx.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    return declarations(nnx.state(decoder, nnx.Param), stacked="layers")


def run(
    config: Plan,
    params: Params,
    inputs: Inputs,
    attend: Attend,
    carried: Any = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Output, Any]:
    """The decoder with an `attend` of one's own, see `Decoder.__call__`.

    Returns:
      The final hidden states (B, L, D) and the output layer, both in `model.dtype`; and what `attend`
      gave besides.
    """
    decoder = _with_params(config, params)
    x, extra = decoder(inputs, attend, carried, key)
    return x, decoder.output_layer(), extra


def _with_params(config: Plan, params: Params) -> Decoder:
    abstract = nnx.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def prepare(config: Plan, params: Params, coordinates: Inputs) -> dict[str, Any]:
    """Features that are the same in all layers, of some coordinates, see `Encodings.prepare`."""
    return config.encodings.prepare(_with_params(config, params).relative, coordinates)


def hidden(
    config: Plan, params: Params, inputs: Inputs, key: jax.Array | None = None
) -> tuple[jax.Array, Output]:
    """The final hidden states (B, L, D) and the output layer, both in `model.dtype`.

    With a key, as in training, numbers are dropped as `model.dropout` says; see `Decoder.__call__`.
    """
    return run(config, params, inputs, attend_causally(config, inputs), key=key)[:2]


def apply(config: Plan, params: Params, inputs: Inputs) -> jax.Array:
    """Logits (B, L, V), float32. For short blocks: `loss` never holds all logits at once."""
    x, output = hidden(config, params, inputs)
    return output.logits(x)
