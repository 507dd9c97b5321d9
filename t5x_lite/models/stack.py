"""A stack of Transformer layers: what all families are made of.

Shapes: b batch, l length, e embed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.models import cache as kv_cache
from t5x_lite.models import layers
from t5x_lite.models import positions as places
from t5x_lite.models.attention import ATTENDED, MultiHeadAttention, Visibility
from t5x_lite.models.cache import LayerCache
from t5x_lite.models.config import StackConfig
from t5x_lite.models.config_positions import Learned, RelativeBias, Rotary, Sinusoidal
from t5x_lite.sharding import constrain
from t5x_lite.types import Array, InputError

_REMAT_POLICY = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
}


def make_norm(config: StackConfig, param_dtype: Any) -> Callable[[str], nn.Module]:
    """Makes norms of the stack's kind, by name."""
    return lambda name: layers.NORM[config.norm](config.norm_epsilon, param_dtype, name=name)


class Layer(nn.Module):
    """Self-attention, cross-attention if there is a memory, and feed-forward, each a residual."""

    config: StackConfig
    has_memory: bool
    param_dtype: Any
    stddev: float | None

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: LayerCache | None,
        memory: Array | None,
        self_visibility: Visibility,
        memory_visibility: Visibility,
        bias: Array | None,
        angles: places.Angles | None,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, LayerCache | None]:
        """`x [b, l, e] -> (x, what this call wrote to the cache)`.

        With a `cache`, keys and values of `x` are written from place `index` on; those of `memory`
        are written if a `memory` is given, and read from the cache otherwise.
        """
        config = self.config
        norm = make_norm(config, self.param_dtype)
        out_stddev = self.stddev
        if out_stddev is not None and config.residual != "post":
            # GPT-2's: the sum over all layers keeps its variance.
            out_stddev /= math.sqrt(2 * config.num_layers)
        written = {}

        def attention(name: str) -> MultiHeadAttention:
            return MultiHeadAttention(
                config, x.shape[-1], self.param_dtype, self.stddev, out_stddev, name=name
            )

        def attend_self(y: Array) -> Array:
            attend = attention("self_attention")
            written["self"] = key_value = attend.key_value(y, angles)
            if cache is not None:
                written["self"] = key_value = kv_cache.write(cache.self_attention, key_value, index)
            return attend(y, key_value, self_visibility, bias, angles, deterministic)

        def attend_memory(y: Array) -> Array:
            attend = attention("cross_attention")
            if memory is not None:
                written["memory"] = key_value = attend.key_value(memory)
            else:
                assert cache is not None
                assert cache.cross_attention is not None
                key_value = cache.cross_attention
            return attend(y, key_value, memory_visibility, None, None, deterministic)

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
        if cache is None:
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
        cache: LayerCache | None = None,
        memory: Array | None = None,
        memory_visibility: Visibility = Visibility(),
        index: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, LayerCache | None]:
        """`x [b, l, e] -> ([b, l, e], updated stacked cache)`.

        `positions` and `token_types` are int32 `[b, l]`; None: 0, 1, 2, ..., and all of type 0.
        """
        config = self.config
        # Places of queries and keys in the row; under a cache the keys are all its places.
        query_places = jnp.arange(x.shape[1], dtype=jnp.int32) + (0 if index is None else index)
        length = x.shape[1] if cache is None else cache.self_attention[0].shape[2]
        key_places = jnp.arange(length, dtype=jnp.int32)
        if self.causal:
            visibility = dataclasses.replace(
                visibility, query_places=query_places, key_places=key_places
            )
        if positions is None:
            positions = jnp.broadcast_to(query_places[None], x.shape[:2])
        x = self._embed(x, positions, token_types, length)
        bias = angles = None
        if isinstance(config.positions, RelativeBias):
            bias = places.RelativeBias(
                config.positions,
                config.num_heads,
                not self.causal,
                self.param_dtype,
                name="relative_bias",
            )(query_places, key_places, x.dtype)
            bias = constrain(bias, None, "heads", None, None)
        if isinstance(config.positions, Rotary):
            angles = places.rotary_angles(config.positions, config.rotary_dim, positions)

        x = layers.Dropout(config.dropout, (-2,), name="drop_in")(x, deterministic)
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
        )
        x, written = scanned(config, self.has_memory, self.param_dtype, self.stddev, name="layers")(
            x, cache, memory, visibility, memory_visibility, bias, angles, index, deterministic
        )
        if cache is not None and written.cross_attention is None:
            written = dataclasses.replace(written, cross_attention=cache.cross_attention)
        if config.residual != "post":
            x = make_norm(config, self.param_dtype)("final_norm")(x)
        return layers.Dropout(config.dropout, (-2,), name="drop_out")(x, deterministic), written

    def _embed(self, x: Array, positions: Array, token_types: Array | None, length: int) -> Array:
        """What the stack adds to its tokens' embeddings before the first layer."""
        config = self.config

        def table(rows: int, axis: str, name: str) -> layers.Embedding:
            stddev = 1.0 if self.stddev is None else self.stddev
            names = (axis, "embed")
            return layers.Embedding(rows, x.shape[-1], self.param_dtype, stddev, names, name=name)

        match config.positions:
            case Learned(max_length=most, offset=offset):
                if length > most:
                    raise InputError(
                        f"a row of {length} tokens is longer than the {most} positions that this "
                        "model learned (Learned.max_length): shorten it"
                    )
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
