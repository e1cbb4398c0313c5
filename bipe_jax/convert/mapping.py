"""Our parameters <-> Llama's, with the names and shapes of Hugging Face, bit for bit.

| ours                             | theirs                                                   |
|----------------------------------|----------------------------------------------------------|
| embed/table                      | model.embed_tokens.weight                                |
| absolute/learned_COORDINATE/table| model.embeds.I.weight, I counts the learned tables       |
| layers/..., stacked in front     | model.layers.LAYER....; q_norm and k_norm as in Qwen3    |
| norm/scale                       | model.norm.weight                                        |
| output/kernel, if not tied       | lm_head.weight                                           |

A matrix of theirs is (outputs, inputs), with flattened heads; ours is (inputs, outputs). BiPE's authors
named the tables `model.embeds`.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from bipe_jax import model, sharding
from bipe_jax.errors import UserError
from bipe_jax.plan import Plan

# Ours -> theirs, and the number of our dimensions that are a matrix's inputs; 0: not transposed.
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"  # theirs
_EMBED = {"embed/table": (EMBEDDING, 0)}
_LAYER = {
    "layers/attention_norm/scale": ("input_layernorm.weight", 0),
    "layers/attention/query_norm/scale": ("self_attn.q_norm.weight", 0),
    "layers/attention/key_norm/scale": ("self_attn.k_norm.weight", 0),
    "layers/attention/query": ("self_attn.q_proj.weight", 1),
    "layers/attention/key": ("self_attn.k_proj.weight", 1),
    "layers/attention/value": ("self_attn.v_proj.weight", 1),
    "layers/attention/output": ("self_attn.o_proj.weight", 2),
    "layers/feed_forward_norm/scale": ("post_attention_layernorm.weight", 0),
    "layers/feed_forward/gate": ("mlp.gate_proj.weight", 1),
    "layers/feed_forward/up": ("mlp.up_proj.weight", 1),
    "layers/feed_forward/down": ("mlp.down_proj.weight", 1),
}
_END = {"norm/scale": ("model.norm.weight", 0), "output/kernel": (OUTPUT, 1)}


class Pair(NamedTuple):
    """One tensor of theirs, and the parameter of ours.

    Attributes:
      ours: the parameter's name, parts joined by "/".
      layer: index in the stacked parameter, or None.
      theirs: the tensor's name.
      shape: of theirs.
      transposed: whether ours, with heads flattened, is the transpose of theirs.
    """

    ours: str
    layer: int | None
    theirs: str
    shape: tuple[int, ...]
    transposed: bool


def abstract(config: Plan) -> dict:
    """The result of `model.init` as shapes and dtypes."""
    return jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))


def _by_name(params: dict) -> dict:
    return dict(zip(jax.tree.leaves(sharding.names(params)), jax.tree.leaves(params), strict=True))


def pairs(config: Plan) -> list[Pair]:
    """Every parameter of a config, in the order of the forward pass.

    Raises:
      UserError: a parameter has no name among theirs.
    """
    learned = [entry.name for entry in config.encodings.absolute if entry.kind == "learned"]
    tables = {
        f"absolute/{name}/table": (f"model.embeds.{i}.weight", 0) for i, name in enumerate(learned)
    }
    shapes = {name: leaf.shape for name, leaf in _by_name(abstract(config)).items()}
    if unknown := shapes.keys() - (_EMBED | tables | _LAYER | _END).keys():
        raise UserError(f"the parameter {min(unknown)!r} has no counterpart in Llama's checkpoints")

    def pair(name, theirs, inputs, layer=None):
        shape = shapes[name] if layer is None else shapes[name][1:]
        if inputs:
            shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        return Pair(name, layer, theirs, shape, bool(inputs))

    return [
        *(pair(name, *row) for name, row in (_EMBED | tables).items()),
        *(
            pair(name, f"model.layers.{layer}.{theirs}", inputs, layer)
            for layer in range(config.model.layers)
            for name, (theirs, inputs) in _LAYER.items()
            if name in shapes
        ),
        *(pair(name, *row) for name, row in _END.items() if name in shapes),
    ]


def _few(names: Iterable[str]) -> str:
    """The first three names, and the number of all."""
    names = sorted(names)
    more = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check(config: Plan, shapes: dict, where: str, ignored: str = "") -> None:
    """Raises UserError unless a checkpoint has exactly the tensors of a config.

    Args:
      config: a config of ours.
      shapes: name -> shape of each tensor of theirs.
      where: the checkpoint, for the error.
      ignored: a regular expression of names that are no parameters.
    """
    wanted = {pair.theirs: pair.shape for pair in pairs(config)}
    if missing := wanted.keys() - shapes.keys():
        raise UserError(f"{where} lacks tensors that its config asks for: {_few(missing)}")
    surplus = {name for name in shapes.keys() - wanted.keys() if not re.fullmatch(ignored, name)}
    if config.model.tied_output:
        surplus.discard(OUTPUT)  # `from_llama` compares it with the embedding
    if surplus:
        raise UserError(
            f"{where} has tensors that its config does not account for: {_few(surplus)}"
        )
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise UserError(
                f"{where}: {name} has the shape {tuple(shapes[name])}, but its config asks for {shape}"
            )


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array, aligned to 64 bytes so that JAX on a CPU uses it without a copy."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def from_llama(config: Plan, shapes: dict, read: Callable[[str], np.ndarray], where: str) -> dict:
    """Our parameters from their tensors, one after the other.

    Args:
      config: a config of ours that matches them, see `check`.
      shapes: name -> shape of each tensor of theirs.
      read: name -> tensor.
      where: the checkpoint, for the error.

    Returns:
      A nested dict of float32 NumPy arrays, of the structure of `model.init`.

    Raises:
      UserError: the config ties the output to the embedding, and the two matrices differ.
    """
    params = jax.tree.map(lambda leaf: _empty(leaf.shape), abstract(config))
    flat = _by_name(params)
    for pair in pairs(config):
        ours = flat[pair.ours] if pair.layer is None else flat[pair.ours][pair.layer]
        theirs = read(pair.theirs)
        ours[...] = theirs.T.reshape(ours.shape) if pair.transposed else theirs
    if (
        config.model.tied_output
        and OUTPUT in shapes
        and not np.array_equal(read(OUTPUT), flat["embed/table"])
    ):
        raise UserError(
            f"{where}: the config ties the output to the embedding, but {OUTPUT} differs from it"
        )
    return params


def to_llama(config: Plan, params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Yields their names and tensors (contiguous float32) from our parameters."""
    flat = {name: np.asarray(leaf, np.float32) for name, leaf in _by_name(params).items()}
    for pair in pairs(config):
        ours = flat[pair.ours] if pair.layer is None else flat[pair.ours][pair.layer]
        if pair.transposed:
            ours = ours.reshape(pair.shape[::-1]).T
        yield pair.theirs, np.ascontiguousarray(ours)
