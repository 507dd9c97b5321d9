"""A stack of Transformer layers: what all families are made of.

Shapes: b batch, l length, e embed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.devices import fetched
from t5x_lite.kernels.plain import ATTENDED, ByDistance, Visibility
from t5x_lite.models import cache as kv_cache
from t5x_lite.models import layers, weights
from t5x_lite.models import positions as places
from t5x_lite.models.attention import MultiHeadAttention
from t5x_lite.models.cache import Cache, LayerCache
from t5x_lite.models.config import StackConfig
from t5x_lite.models.config_positions import Learned, RelativeBias, Rotary, Sinusoidal
from t5x_lite.sharding import constrain
from t5x_lite.types import Array, InputError, Params

_REMAT_POLICY = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(weights.PROJECTED, ATTENDED),
}


_FIRST = "0"  # the first layer's name where layers are apart


def apart(params: Params) -> Params:
    """A stack's parameters with `layers/0/...`, `layers/1/...` in place of stacked `layers/...`.

    What a loop over tokens reads fastest: one over stacked weights would copy each layer's out of
    the stack for every token.
    """
    if _FIRST in params["layers"]:
        return params
    count = len(jax.tree.leaves(params["layers"])[0])
    own = {str(i): jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(count)}
    return {**params, "layers": own}


def prefix_length(params: Params) -> int:
    """How many keys stand ahead of a stack's tokens in its self-attention: prefix tuning's."""
    own = params.get("layers", {})
    kernel = own.get(_FIRST, own).get("self_attention", {}).get("key", {}).get("kernel")
    rows = weights.prefix_rows(kernel)
    return 0 if rows is None else int(rows.shape[-3])


def check_length(config: StackConfig, length: int, prefix: int = 0) -> None:
    """Raises InputError for a row of more tokens, and prefix, than the stack learned positions."""
    if isinstance(config.positions, Learned) and length + prefix > config.positions.max_length:
        behind = f" behind a prefix of {prefix}" if prefix else ""
        raise InputError(
            f"a row of {length} tokens{behind} is longer than the {config.positions.max_length} "
            "positions that this model learned (Learned.max_length): shorten it"
        )


def make_norm(config: StackConfig, param_dtype: Any) -> Callable[[str], nn.Module]:
    """Makes norms of the stack's kind, by name."""
    return lambda name: layers.NORM[config.norm](config.norm_epsilon, param_dtype, name=name)


class Layer(nn.Module):
    """Self-attention, cross-attention if there is a memory, and feed-forward, each a residual."""

    config: StackConfig
    has_memory: bool
    param_dtype: Any
    stddev: float | None
    keeps: bool = False  # return keys and values, to start a cache with

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: LayerCache | None,
        memory: Array | None,
        self_visibility: Visibility,
        memory_visibility: Visibility,
        bias: Array | ByDistance | None,
        angles: places.Angles | None,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, LayerCache | None]:
        """`x [b, l, e] -> (x, keys and values)`.

        With a `cache`, those of `x` are written from place `index` on, those of the memory are read
        from it, and the updated cache is returned. Without, they come from `x` and `memory`, and
        are returned as projected if the layer `keeps` them.
        """
        config = self.config
        norm = make_norm(config, self.param_dtype)
        out_stddev = self.stddev
        if out_stddev is not None and config.residual != "post":
            # GPT-2's: the sum over all layers keeps its variance.
            out_stddev /= math.sqrt(2 * config.num_layers)
        written: dict[str, Any] = {}

        def attention(name: str) -> MultiHeadAttention:
            return MultiHeadAttention(
                config, x.shape[-1], self.param_dtype, self.stddev, out_stddev, name=name
            )

        def attend_self(y: Array) -> Array:
            attend = attention("self_attention")
            key_value = attend.key_value(y, angles)
            if cache is None:
                written["self"] = key_value
                return attend(y, key_value, self_visibility, bias, angles, deterministic)
            assert index is not None
            written["self"] = own = kv_cache.write(cache.self_attention, key_value, index)
            return attend.cached(y, own, self_visibility, bias, angles)

        def attend_memory(y: Array) -> Array:
            attend = attention("cross_attention")
            if cache is None:
                assert memory is not None
                written["memory"] = key_value = attend.key_value(memory)
                return attend(y, key_value, memory_visibility, None, None, deterministic)
            assert cache.cross_attention is not None
            written["memory"] = cache.cross_attention
            return attend.cached(y, cache.cross_attention, memory_visibility, None, None)

        def feed_forward(y: Array) -> Array:
            return layers.MLP(
                config.mlp_dim,
                config.mlp_activations,
                config.biases,
                config.dropout,
                self.param_dtype,
                self.stddev,
                out_stddev,
                name="mlp",
            )(y, deterministic)

        blocks = {"self_attention": attend_self, "mlp": feed_forward}
        if self.has_memory:
            blocks = {"self_attention": attend_self, "cross_attention": attend_memory} | blocks
        start = x
        for name, block in blocks.items():
            source = start if config.residual == "parallel" else x
            update = block(source if config.residual == "post" else norm(f"{name}_norm")(source))
            x = x + layers.Dropout(config.dropout, (-2,))(update, deterministic)
            if config.residual == "post":
                x = norm(f"{name}_norm")(x)
            x = constrain(x, "batch", "length", "activation_embed")
        if cache is None and not self.keeps:
            return x, None
        return x, LayerCache(written["self"], written.get("memory"))


class Stack(nn.Module):
    """Embedded tokens through `num_layers` layers in one loop over stacked parameters."""

    config: StackConfig
    causal: bool
    has_memory: bool
    param_dtype: Any
    stddev: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        visibility: Visibility,
        positions: Array | None = None,
        token_types: Array | None = None,
        cache: Cache | None = None,
        memory: Array | None = None,
        memory_visibility: Visibility = Visibility(),
        keeps: bool = False,
        deterministic: bool = True,
    ) -> tuple[Array, tuple[LayerCache, ...] | None]:
        """`x [b, l, e] -> ([b, l, e], each layer's keys and values)`; see `Layer` for those.

        `positions` and `token_types` are int32 `[b, l]`; None: 0, 1, 2, ..., and all of type 0.
        """
        config = self.config
        if keeps or cache is not None:  # prompts have any length
            config = dataclasses.replace(config, attention="plain")
        # Places of queries and keys in the row; under a cache the keys are all its places.
        query_places = key_places = jnp.arange(x.shape[1], dtype=jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(query_places[None], x.shape[:2])
        if cache is not None:
            key_places = cache.key_places(x.shape[1])
            query_places = cache.query_places(x.shape[1])
        if self.causal:
            visibility = dataclasses.replace(
                visibility,
                query_places=query_places,
                key_places=key_places,
                in_order=cache is None,
            )
        # A prefix takes the first positions of every text, as past keys do.
        prefix = prefix_length(self.variables.get("params", {}))
        x = self._embed(x, positions, token_types, prefix)
        bias: Array | ByDistance | None = None
        angles = None
        if isinstance(config.positions, RelativeBias):
            relative = places.RelativeBias(
                config.positions,
                config.num_heads,
                not self.causal,
                self.param_dtype,
                name="relative_bias",
            )
            if config.attention == "flash" and not prefix:
                bias = relative.by_distance(x.shape[1])
            else:
                dense = relative(query_places, key_places, x.dtype)
                if prefix:
                    # By place in the text, not in the row: packed texts are equally far from it.
                    ahead = jnp.arange(-prefix, 0, dtype=jnp.int32)[None]
                    ahead = relative(positions, ahead, x.dtype)
                    dense = jnp.broadcast_to(dense, (len(ahead), *dense.shape[1:]))
                    dense = jnp.concatenate([ahead, dense], axis=-1)
                rows = "batch" if len(dense) > 1 else None
                bias = constrain(dense, rows, "heads", None, None)
        if isinstance(config.positions, Rotary):
            angles = places.rotary_angles(config.positions, config.rotary_dim, positions, prefix)

        x = layers.Dropout(config.dropout, (-2,), name="drop_in")(x, deterministic)
        shared = visibility, memory_visibility, bias, angles
        x, written = self._run(config, x, cache, memory, *shared, keeps, deterministic)
        if config.residual != "post":
            x = make_norm(config, self.param_dtype)("final_norm")(x)
        return layers.Dropout(config.dropout, (-2,), name="drop_out")(x, deterministic), written

    def _run(
        self,
        config: StackConfig,
        x: Array,
        cache: Cache | None,
        memory: Array | None,
        visibility: Visibility,
        memory_visibility: Visibility,
        bias: Array | ByDistance | None,
        angles: places.Angles | None,
        keeps: bool,
        deterministic: bool,
    ) -> tuple[Array, tuple[LayerCache, ...] | None]:
        """`x` through the layers, in one loop, or one after the other if they are cached."""
        make = functools.partial(Layer, config, self.has_memory, self.param_dtype, self.stddev)
        shared = visibility, memory_visibility, bias, angles
        own = self.variables.get("params", {}).get("layers", {})
        if cache is not None or _FIRST in own:
            own, written = fetched(own), []
            for i in range(config.num_layers):
                params = own[str(i)] if _FIRST in own else jax.tree.map(lambda p, i=i: p[i], own)
                before = None if cache is None else cache.layers[i]
                index = None if cache is None else cache.index
                x, after = make(keeps, parent=None).apply(
                    {"params": params}, x, before, memory, *shared, index, deterministic
                )
                written.append(after)
            return x, tuple(written)
        layer: Any = Layer
        if config.remat != "none":
            layer = nn.remat(
                Layer,
                policy=_REMAT_POLICY[config.remat],
                prevent_cse=False,  # inside a scan nothing can be merged across turns
                static_argnums=(9,),  # deterministic, counting self
            )
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *(nn.broadcast,) * 7),
            length=config.num_layers,
            unroll=min(config.unroll, config.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # would trace a layer twice; nothing is broadcast out
        )
        x, stacked = scanned(
            config, self.has_memory, self.param_dtype, self.stddev, keeps, name="layers"
        )(x, None, memory, *shared, None, deterministic)
        if stacked is None:
            return x, None
        return x, tuple(
            jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(config.num_layers)
        )

    def _embed(
        self, x: Array, positions: Array, token_types: Array | None, prefix: int = 0
    ) -> Array:
        """What the stack adds to its tokens' embeddings before the first layer."""
        config = self.config
        positions = positions + prefix

        def table(rows: int, axis: str, name: str) -> layers.Embedding:
            stddev = 1.0 if self.stddev is None else self.stddev
            names = (axis, "embed")
            return layers.Embedding(rows, x.shape[-1], self.param_dtype, stddev, names, name=name)

        match config.positions:
            case Learned(max_length=most, offset=offset):
                check_length(config, x.shape[1], prefix)
                embedding = table(most + offset, "places", "position_embedding")
                x = x + embedding(positions + offset, x.dtype)
            case Sinusoidal(max_period=period):
                x = x + places.sinusoids(positions, x.shape[-1], period).astype(x.dtype)
        if config.num_token_types:
            embedding = table(config.num_token_types, "types", "token_type_embedding")
            if token_types is None:
                token_types = jnp.zeros(x.shape[:2], jnp.int32)
            x = x + embedding(token_types, x.dtype)
        if config.embedding_norm:
            x = make_norm(config, self.param_dtype)("embedding_norm")(x)
        return constrain(x, "batch", "length", "activation_embed")
