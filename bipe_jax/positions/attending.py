# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""One layer's attention under any encodings, for arrays of any size."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bipe_jax import config as configs
from bipe_jax.attention.chunked import reference, scores
from bipe_jax.attention.scoring import Side
from bipe_jax.errors import UserError
from bipe_jax.positions import encodings as all_encodings
from bipe_jax.positions.kind import Relative


def attend(
    relative: Sequence[Any],
    coordinates: Mapping[str, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    params: Mapping[str, Mapping[str, jax.Array]] | None = None,
    x: jax.Array | None = None,
    document_ids: jax.Array | None = None,
    seed: int = 0,
) -> dict[str, jax.Array]:
    """Causal attention of one layer. Pure and differentiable; for tests, notebooks and plots.

    It is built of the objects that the model's layers use. It computes in float32 at least, in float64
    if q is float64. All logits are made at once: (B, N, L, L).

    Args:
      relative: entries (kind, coordinate, (option, value), ...), as `config.position.relative` has them.
      coordinates: name -> (B, L) integers; also those of levels, such as "paragraph".
      q: (B, L, N, H). k, v: (B, L, K, H), with N a multiple of K.
      params: name of an encoding, such as "t5_position" -> its parameters by name. What is left out has
        its initial value, drawn from `seed`.
      x: (B, L, D), for kinds that read the layer's input.
      document_ids: (B, L) integers; tokens see only tokens of equal id. None: all before them.

    Returns:
      "logits" (B, N, L, L) before softmax, scaled by 1/sqrt(H), of no meaning where a key is not visible;
      "output" (B, L, N, H).

    Raises:
      UserError: an entry makes no sense, or `params` has names that the encodings do not have.
    """
    L, N, H = q.shape[1:]
    shape = {
        "model.heads": N,
        "model.kv_heads": k.shape[2],
        "model.width": N * H,
        "model.layers": 1,
    }
    changes = {**shape, "sequence_length": max(L, 2), "position.relative": tuple(relative)}
    config = configs.replace(configs.parse(configs.defaults()), changes)
    encodings = all_encodings.parse(config, coordinates)
    modules = encodings.make_layer(jax.random.key(seed))
    _set(modules, params or {})
    layer = encodings.of_layer(0, modules, coordinates, {})
    features = layer.features(x)
    q, k = layer.turn(q, k, features)
    acting = layer.scoring(features, document_ids)
    index = jnp.arange(L)[None]
    side = Side(index, document_ids, [of_tokens for _, of_tokens in acting])
    arguments = (side, side, [encoding for encoding, _ in acting], jnp.arange(N))
    logits = scores(q, k, *arguments)
    output = reference(q, k, v, *arguments)
    return {"logits": logits.reshape(logits.shape[0], N, L, L), "output": output}


def _set(modules: Mapping[str, Relative], params: Mapping[str, Mapping[str, jax.Array]]) -> None:
    """Puts values in the place of parameters."""
    for name, values in params.items():
        state = nnx.state(modules[name], nnx.Param) if name in modules else nnx.State({})
        paths = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
        variables = dict(nnx.to_flat_state(state))
        for parameter, value in values.items():
            if parameter not in paths:
                known = ", ".join(f"{n}: {_names(m)}" for n, m in modules.items())
                raise UserError(f"params has {name}/{parameter}, and the encodings have {known}")
            path = paths[parameter]
            shape = variables[path].shape
            if jnp.shape(value) != shape:
                raise UserError(
                    f"params: {name}/{parameter} has the shape {jnp.shape(value)}, and must have {shape}"
                )
            variables[path] = variables[path].replace(jnp.asarray(value))
        if variables:
            nnx.update(modules[name], nnx.from_flat_state(variables))


def _names(module: Relative) -> str:
    state = nnx.state(module, nnx.Param)
    return ", ".join("/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)) or "none"
