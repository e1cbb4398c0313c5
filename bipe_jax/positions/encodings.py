# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportMissingTypeStubs=false
"""All positional encodings of a model, and those of one layer, which attention works with."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bipe_jax import segments
from bipe_jax.config import Config
from bipe_jax.errors import UserError
from bipe_jax.positions.draws import Draw, parse_draws
from bipe_jax.positions.kind import Absolute, Features, Relative
from bipe_jax.positions.registry import ABSOLUTE, RELATIVE, Entry, parse_entries


class LayerEncodings:
    """The relative encodings of one layer, with their parameters, for the tokens of a forward pass.

    Training, decoding and analysis all use it in the same order: `features`, `turn`, and attention with
    what `scoring` gives.
    """

    def __init__(
        self,
        config: Config,
        entries: Sequence[Entry],
        modules: Mapping[str, Relative],
        inputs: Mapping[str, jax.Array],
        prepared: Mapping[str, Features],
    ):
        self._config, self._entries, self._modules = config, entries, modules
        self._inputs, self._prepared = inputs, prepared

    def features(
        self, x: jax.Array | None, before: Mapping[str, Features] | None = None
    ) -> dict[str, Features]:
        """Name of an encoding -> the features of the tokens.

        Args:
          x: (B, L, D), what the layer's attention reads.
          before: features of the token before the first one, by name; zeros where there is none.
        """
        return {
            entry.name: self._prepared[entry.name]
            if entry.name in self._prepared
            else self._modules[entry.name].features(
                self._inputs[entry.coordinate], x, (before or {}).get(entry.name)
            )
            for entry in self._entries
        }

    def turn(
        self, q: jax.Array, k: jax.Array, features: Mapping[str, Features]
    ) -> tuple[jax.Array, jax.Array]:
        """Queries (B, L, N, H) and keys (B, L, K, H) of the same tokens, as attention is to have them.

        Kinds that turn features come first: one of them need not be linear, and temperatures scale what
        it gives.
        """
        turning = [e for e in self._entries if _turns(self._config, e)]
        for entry in (*turning, *(e for e in self._entries if e not in turning)):
            module, of_tokens = self._modules[entry.name], features[entry.name]
            q, k = module.queries(q, of_tokens), module.keys(k, of_tokens)
        return q, k

    def scoring(
        self, features: Mapping[str, Features], document_ids: jax.Array | None = None
    ) -> list[tuple[Relative, Features]]:
        """The encodings that act on logits, with their features: what `attention` takes.

        Args:
          document_ids: (B, L), where documents are kept apart.
        """

        def of_logits(module: Relative, of_tokens: Features) -> Features:
            if "factors" not in module.acts or document_ids is None:
                return of_tokens
            return module.across_documents(of_tokens, document_ids[:, 1:] != document_ids[:, :-1])

        return [
            (module, of_logits(module, features[entry.name]))
            for entry in self._entries
            if (module := self._modules[entry.name]).acts
        ]


@dataclasses.dataclass(frozen=True)
class Encodings:
    """All positional encodings of a model, without their parameters.

    Attributes:
      config: of the model.
      absolute, relative: the parsed entries.
      draws: how coordinates are drawn in training.
    """

    config: Config
    absolute: tuple[Entry, ...]
    relative: tuple[Entry, ...]
    draws: tuple[Draw, ...] = ()

    @functools.cached_property
    def abstract(self) -> dict[str, Relative]:
        """The relative encodings by name; their parameters have shapes alone."""
        return nnx.eval_shape(lambda: self.make_layer(jax.random.key(0)))

    @property
    def scoring(self) -> list[Relative]:
        """Those that act on logits, as `abstract` has them."""
        return [module for module in self.abstract.values() if module.acts]

    @property
    def scoring_coordinates(self) -> tuple[str, ...]:
        """The coordinates that encodings which act on logits need of each token that was seen."""
        names = [e.coordinate for e in self.relative if self.abstract[e.name].acts]
        return tuple(dict.fromkeys(names))

    @property
    def cacheable(self) -> bool:
        """Whether decoding may keep what a token got: it does not depend on later tokens."""
        return all(module.cacheable for module in self.abstract.values())

    @property
    def period(self) -> int:
        """The least number of layers after which the choice of encodings repeats; it divides them."""
        layers = self.config.model.layers
        return next(
            period
            for period in range(1, layers + 1)
            if layers % period == 0
            and all(
                (layer in entry.layers) == (layer % period in entry.layers)
                for entry in self.relative
                for layer in range(layers)
            )
        )

    def check_length(self, length: int) -> None:
        """Raises UserError if the model cannot be run on so many tokens."""
        for entry in self.absolute:
            kind = ABSOLUTE[entry.kind]
            longest = kind.longest(self.config, entry.coordinate, **entry.options)
            if longest is not None and length > longest:
                raise UserError(
                    f"the {entry.kind} table of {entry.coordinate} ends at {longest:,} tokens: the model "
                    f"has nothing for length {length:,}"
                )

    # How parameters are made. Keys of shared and layers' encodings are folded from others, so that the
    # rest of a model is drawn alike whatever its relative encodings.

    def make_absolute(self, key: jax.Array) -> dict[str, Absolute]:
        """The absolute encodings by name."""
        keys = jax.random.split(key, max(len(self.absolute), 1))
        return {
            entry.name: ABSOLUTE[entry.kind](self.config, entry.coordinate, key, **entry.options)
            for entry, key in zip(self.absolute, keys, strict=False)
        }

    def make_shared(self, key: jax.Array) -> dict[str, Relative]:
        """The relative encodings whose parameters serve all layers, by name."""
        return {
            entry.name: self._relative(entry, jax.random.fold_in(key, number))
            for number, entry in enumerate(self.relative)
            if entry.shared
        }

    def make_stacked(self, key: jax.Array) -> dict[str, Relative]:
        """The other relative encodings, by name: parameters stacked over the layers that have them."""

        def stacked(number: int, entry: Entry) -> Relative:
            keys = jax.random.split(jax.random.fold_in(key, number), len(entry.layers))
            return nnx.vmap(functools.partial(self._relative, entry))(keys)

        return {
            entry.name: stacked(number, entry)
            for number, entry in enumerate(self.relative)
            if not entry.shared
        }

    def make_layer(self, key: jax.Array) -> dict[str, Relative]:
        """All relative encodings by name, with parameters of one layer each."""
        return {
            entry.name: self._relative(entry, jax.random.fold_in(key, number))
            for number, entry in enumerate(self.relative)
        }

    def _relative(self, entry: Entry, key: jax.Array) -> Relative:
        return RELATIVE[entry.kind](self.config, entry.coordinate, key, **entry.options)

    # How the layers get them.

    def prepare(
        self, shared: Mapping[str, Relative], inputs: Mapping[str, jax.Array]
    ) -> dict[str, Features]:
        """The features that are the same in all layers, by name.

        Args:
          shared: from `make_shared`, with parameters.
          inputs: coordinates (B, L) by name; encodings of others are left out.
        """
        return {
            entry.name: shared[entry.name].features(inputs[entry.coordinate])
            for entry in self.relative
            if self._is_prepared(entry) and entry.coordinate in inputs
        }

    def _is_prepared(self, entry: Entry) -> bool:
        """Whether the features of an entry are the same in all layers."""
        kind = RELATIVE[entry.kind]
        return entry.shared and not kind.reads_input and not kind.running

    @property
    def key_width(self) -> int:
        """The width of the widest keys that any layer has, once they are turned."""
        m = self.config.model
        q, k = (
            jax.ShapeDtypeStruct((1, 1, heads, m.width // m.heads), jnp.dtype(m.dtype))
            for heads in (m.heads, m.kv_heads)
        )

        def widths(*arrays: jax.Array) -> list[jax.Array]:
            coordinate, x, q, k = arrays
            keys = [k]
            for layer in range(self.period):
                modules = self.make_layer(jax.random.key(0))
                inputs = {entry.coordinate: coordinate for entry in self.relative}
                of_layer = self.of_layer(layer, modules, inputs, {})
                keys.append(of_layer.turn(q, k, of_layer.features(x))[1])
            return keys

        keys = jax.eval_shape(
            widths,
            jax.ShapeDtypeStruct((1, 1), jnp.int32),
            jax.ShapeDtypeStruct((1, 1, m.width), jnp.dtype(m.dtype)),
            q,
            k,
        )
        return max(k.shape[-1] for k in keys)

    def features_of_layers(self, rows: int, length: int) -> dict[str, Features]:
        """Shapes of what layers compute for encodings that act on logits: (layers, B, L, ...), by name."""
        m = self.config.model
        coordinate = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        x = jax.ShapeDtypeStruct((rows, length, m.width), jnp.dtype(m.dtype))

        def features(entry: Entry) -> Features:
            def of_tokens(coordinate: jax.Array, x: jax.Array) -> Features:
                return self._relative(entry, jax.random.key(0)).features(coordinate, x)

            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((m.layers, *leaf.shape), leaf.dtype),
                jax.eval_shape(of_tokens, coordinate, x),
            )

        return {
            entry.name: features(entry)
            for entry in self.relative
            if self.abstract[entry.name].acts and not self._is_prepared(entry)
        }

    def of_layer(
        self,
        layer: int,
        modules: Mapping[str, Relative],
        inputs: Mapping[str, jax.Array],
        prepared: Mapping[str, Features],
    ) -> LayerEncodings:
        """The encodings of a layer, by its number modulo the period."""
        entries = [entry for entry in self.relative if layer in entry.layers]
        return LayerEncodings(self.config, entries, modules, inputs, prepared)

    def layers_of(self, name: str) -> tuple[int, ...]:
        """The layers of the first period that have a relative encoding."""
        entry = next(entry for entry in self.relative if entry.name == name)
        return tuple(layer for layer in entry.layers if layer < self.period)


def parse(config: Config, more: Iterable[str] = ()) -> Encodings:
    """The encodings that a config names.

    Args:
      more: names of coordinates that tokens have besides those of the config's levels.

    Raises:
      UserError: an entry is malformed, makes no sense, or cannot be combined with another.
    """
    coordinates = tuple(dict.fromkeys((*segments.coordinate_names(config), *more)))
    layers = config.model.layers
    absolute = parse_entries("position.absolute", config.position.absolute, coordinates, layers)
    relative = parse_entries("position.relative", config.position.relative, coordinates, layers)
    for entry in absolute:
        ABSOLUTE[entry.kind].check(config, entry.coordinate, **entry.options)
    for entry in relative:
        reason = RELATIVE[entry.kind].offsets_refused
        if reason and segments.restarts(entry.coordinate):
            raise UserError(
                f"position.relative: ({entry.kind!r}, {entry.coordinate!r}) {reason}, since it falls back to "
                "0 at each segment: use 'position' or 'segment'"
            )
        RELATIVE[entry.kind].check(config, entry.coordinate, **entry.options)
    _check_turns(config, relative)
    return Encodings(config, absolute, relative, parse_draws(config, coordinates))


def rotary(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that turn pairs of each head by angles, whose frequencies may be scaled."""
    return [entry for entry in entries if "scaling" in RELATIVE[entry.kind].options]


def _turns(config: Config, entry: Entry) -> frozenset[int]:
    """The features of a head that an entry turns."""
    return RELATIVE[entry.kind].turns(config, **entry.options)


def _check_turns(config: Config, entries: Sequence[Entry]) -> None:
    for number, entry in enumerate(entries):
        for other in entries[:number]:
            both = _turns(config, entry) & _turns(config, other)
            if both and set(entry.layers) & set(other.layers):
                raise UserError(
                    f"position.relative: {other.name} and {entry.name} would turn the same pairs of each "
                    "head, and their angles could not be told apart: keep one of them, or give them "
                    "different pairs, as in ('rope', 'offset', ('pairs', (0, 8)))"
                )


def written(entries: Iterable[Entry], layers: int) -> tuple[Any, ...]:
    """Entries as a config has them."""

    def common(entry: Entry) -> list[tuple[str, Any]]:
        options: list[tuple[str, Any]] = []
        if len(entry.layers) < layers:
            options.append(("layers", ",".join(map(str, entry.layers))))
        if entry.shared != RELATIVE[entry.kind].shared:
            options.append(("shared", entry.shared))
        return options

    return tuple((*entry.written(), *common(entry)) for entry in entries)
