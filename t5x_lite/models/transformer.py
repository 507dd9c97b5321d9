"""The one Transformer: token embedding, an encoder and a decoder (either may be absent), a head.

Parameter paths (a public contract; `layers` is a stacked first axis):
`token_embedding/embedding`, `{encoder,decoder}/relative_bias/embedding`,
`{encoder,decoder}/layers/{self_attention,cross_attention}/{query,key,value,out}/kernel`,
`{encoder,decoder}/layers/mlp/{wi_0,wi_1,wo}/kernel`, `{encoder,decoder}/layers/*_norm/scale`,
`{encoder,decoder}/final_norm/scale`, `lm_head/kernel`.

Shapes: b batch, l length, e embed, v vocab.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.models import cache as kv_cache
from t5x_lite.models import layers, positions
from t5x_lite.models.attention import ATTENDED, MultiHeadAttention, Visibility
from t5x_lite.models.cache import Cache, LayerCache
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.sharding import constrain
from t5x_lite.types import Array, Batch, Params

_REMAT_POLICY = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
}


class Layer(nn.Module):
    """One pre-norm layer: self-attention, cross-attention if there is a memory, feed-forward."""

    config: StackConfig
    has_memory: bool
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: LayerCache | None,
        memory: Array | None,
        self_visibility: Visibility,
        memory_visibility: Visibility,
        bias: Array,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, LayerCache | None]:
        """`x [b, l, e] -> (x, what this call wrote to the cache)`.

        With a `cache`, keys and values of `x` are written from place `index` on; those of `memory`
        are written if a `memory` is given, and read from the cache otherwise.
        """
        config = self.config
        embed_dim = x.shape[-1]

        def norm(name: str) -> layers.RMSNorm:
            return layers.RMSNorm(config.norm_epsilon, self.param_dtype, name=name)

        def attention(name: str) -> MultiHeadAttention:
            return MultiHeadAttention(
                config.num_heads,
                config.head_dim,
                embed_dim,
                config.dropout,
                self.param_dtype,
                name=name,
            )

        def add(x: Array, update: Array) -> Array:
            x = x + layers.Dropout(config.dropout, (-2,))(update, deterministic)
            return constrain(x, "batch", "length", "activation_embed")

        attend = attention("self_attention")
        y = norm("self_attention_norm")(x)
        written = key_value = attend.key_value(y)
        if cache is not None:
            written = key_value = kv_cache.write(cache.self_attention, key_value, index)
        x = add(x, attend(y, key_value, self_visibility, bias, deterministic))

        memory_written = None
        if self.has_memory:
            attend = attention("cross_attention")
            y = norm("cross_attention_norm")(x)
            if memory is not None:
                memory_written = key_value = attend.key_value(memory)
            else:
                assert cache is not None
                assert cache.cross_attention is not None
                key_value = cache.cross_attention
            x = add(x, attend(y, key_value, memory_visibility, None, deterministic))

        y = norm("mlp_norm")(x)
        mlp = layers.MLP(
            config.mlp_dim,
            config.mlp_activations,
            config.dropout,
            self.param_dtype,
            name="mlp",
        )
        x = add(x, mlp(y, deterministic))
        return x, None if cache is None else LayerCache(written, memory_written)


class Stack(nn.Module):
    """`num_layers` layers in one loop over stacked parameters, then a norm."""

    config: StackConfig
    causal: bool
    has_memory: bool
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Array,
        visibility: Visibility,
        cache: LayerCache | None = None,
        memory: Array | None = None,
        memory_visibility: Visibility = Visibility(),
        index: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, LayerCache | None]:
        """`x [b, l, e] -> ([b, l, e], updated stacked cache)`."""
        config = self.config
        # Places of queries and keys in the row; under a cache the keys are all its places.
        query_places = jnp.arange(x.shape[1], dtype=jnp.int32) + (0 if index is None else index)
        length = x.shape[1] if cache is None else cache.self_attention[0].shape[2]
        key_places = jnp.arange(length, dtype=jnp.int32)
        if self.causal:
            visibility = dataclasses.replace(
                visibility, query_places=query_places, key_places=key_places
            )
        bias = positions.RelativeBias(
            config.positions,
            config.num_heads,
            not self.causal,
            self.param_dtype,
            name="relative_bias",
        )(query_places, key_places, x.dtype)
        bias = constrain(bias, None, "heads", None, None)

        x = layers.Dropout(config.dropout, (-2,), name="drop_in")(x, deterministic)
        layer: Any = Layer
        if config.remat != "none":
            layer = nn.remat(
                Layer,
                policy=_REMAT_POLICY[config.remat],
                prevent_cse=False,  # inside a scan nothing can be merged across turns
                static_argnums=(8,),  # deterministic, counting self
            )
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *(nn.broadcast,) * 6),
            length=config.num_layers,
            unroll=min(config.unroll, config.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, written = scanned(config, self.has_memory, self.param_dtype, name="layers")(
            x, cache, memory, visibility, memory_visibility, bias, index, deterministic
        )
        if cache is not None and written.cross_attention is None:
            written = dataclasses.replace(written, cross_attention=cache.cross_attention)
        x = layers.RMSNorm(config.norm_epsilon, self.param_dtype, name="final_norm")(x)
        return layers.Dropout(config.dropout, (-2,), name="drop_out")(x, deterministic), written


class Transformer(nn.Module):
    """Encoder, decoder or both, from tokens to logits over the vocabulary.

    `apply({"params": params}, batch)` is the training call; `method="encode"` returns hidden
    states; `method="prefill"` and `method="extend"` decode over a `Cache`. Dropout needs
    `rngs={"dropout": key}` and `deterministic=False`.
    """

    config: ModelConfig

    def setup(self) -> None:
        config, dtype = self.config, self.config.storage_dtype
        self.token_embedding = layers.Embedding(config.vocab_size, config.embed_dim, dtype)
        if config.encoder is not None:
            self.encoder = Stack(config.encoder, False, False, dtype)
        if config.decoder is not None:
            self.decoder = Stack(config.decoder, True, config.encoder is not None, dtype)
        if config.head == "untied":
            self.lm_head = layers.Dense((config.vocab_size,), ("embed", "vocab"), dtype)

    def __call__(self, batch: Batch, deterministic: bool = True) -> Array:
        """Logits `[b, l, v]` for each place of the decoder (of the encoder, if there is no other).

        Args:
          batch: `encoder_input_tokens` and, with a decoder, `decoder_input_tokens`, `[b, l]`.
            Absent segment ids mean one unpadded segment.
          deterministic: False turns dropout on.
        """
        if self.config.decoder is None:
            return self._logits(self.encode(batch, deterministic))
        memory = memory_segments = None
        if self.config.encoder is not None:
            memory = self.encode(batch, deterministic)
            memory_segments = batch.get(types.ENCODER_SEGMENT_IDS)
        segments = batch.get(types.DECODER_SEGMENT_IDS)
        x, _ = self.decoder(
            self._embed(_require(batch, types.DECODER_INPUT_TOKENS)),
            Visibility(segments, segments, key_prefix=batch.get(types.DECODER_PREFIX)),
            memory=memory,
            memory_visibility=Visibility(segments, memory_segments),
            deterministic=deterministic,
        )
        return self._logits(x)

    def encode(self, batch: Batch, deterministic: bool = True) -> Array:
        """The encoder's last hidden states `[b, l, e]`."""
        segments = batch.get(types.ENCODER_SEGMENT_IDS)
        x, _ = self.encoder(
            self._embed(_require(batch, types.ENCODER_INPUT_TOKENS)),
            Visibility(segments, segments),
            deterministic=deterministic,
        )
        return x

    def prefill(self, batch: Batch, capacity: int) -> tuple[Array, Cache]:
        """Runs the encoder and the decoder's first tokens, and starts a cache.

        Args:
          batch: as for the call, unpacked; `decoder_input_tokens [b, n]` are the first n tokens,
            the same number in every row.
          capacity: how many decoder tokens the cache holds, n included.

        Returns:
          Logits `[b, n, v]` and the cache.
        """
        config = self.config.decoder
        assert config is not None
        tokens = _require(batch, types.DECODER_INPUT_TOKENS)
        shape = (config.num_layers, tokens.shape[0], capacity, config.num_heads, config.head_dim)
        empty = jnp.zeros(shape, self.config.compute_dtype)
        memory = memory_segments = None
        if self.config.encoder is not None:
            memory = self.encode(batch)
            memory_segments = batch.get(types.ENCODER_SEGMENT_IDS)
        cache = Cache(LayerCache((empty, empty)), jnp.int32(0), memory_segments)
        return self._decode(tokens, cache, memory)

    def extend(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """Logits `[b, n, v]` of the next tokens `[b, n]`, and the cache with them written."""
        return self._decode(tokens, cache, None)

    def _decode(self, tokens: Array, cache: Cache, memory: Array | None) -> tuple[Array, Cache]:
        memory_visibility = Visibility()
        if cache.memory_segment_ids is not None:
            # Unpacked rows hold one segment, numbered 1.
            ones = jnp.ones(tokens.shape, jnp.int32)
            memory_visibility = Visibility(ones, cache.memory_segment_ids)
        x, written = self.decoder(
            self._embed(tokens),
            Visibility(),
            cache=cache.layers,
            memory=memory,
            memory_visibility=memory_visibility,
            index=cache.index,
        )
        assert written is not None
        index = cache.index + tokens.shape[1]
        return self._logits(x), dataclasses.replace(cache, layers=written, index=index)

    def _embed(self, tokens: Array) -> Array:
        x = self.token_embedding(tokens, self.config.compute_dtype)
        return constrain(x, "batch", "length", "activation_embed")

    def _logits(self, x: Array) -> Array:
        if self.config.head == "tied":
            # The embedding has unit variance, so the projection is scaled as a kernel would be.
            logits = self.token_embedding.attend(x * np.asarray(x.shape[-1] ** -0.5, x.dtype))
        else:
            logits = self.lm_head(x)
        return constrain(logits, "batch", "length", "vocab")


def _require(batch: Batch, key: str) -> Array:
    if key not in batch:
        raise types.InputError(
            f"the model needs batch['{key}'], but the batch has {', '.join(sorted(batch))}: "
            "the task's layout does not fit this model"
        )
    return batch[key]


def dummy_batch(config: ModelConfig, rows: int = 1, length: int = 8) -> dict[str, Array]:
    """The smallest batch that a model of this config accepts: zeros `[rows, length]`."""
    tokens = jnp.zeros((rows, length), jnp.int32)
    batch = {}
    if config.encoder is not None:
        batch[types.ENCODER_INPUT_TOKENS] = tokens
    if config.decoder is not None:
        batch[types.DECODER_INPUT_TOKENS] = tokens
    return batch


def init(model: Transformer, rng: Array) -> Params:
    """Fresh parameters as a tree of plain arrays; trace it with `jax.eval_shape` or `jax.jit`."""
    return nn.unbox(model.init({"params": rng}, dummy_batch(model.config))["params"])


def axes(model: Transformer) -> Params:
    """A tree like the parameters whose leaves are tuples of logical axis names."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), dummy_batch(model.config))["params"]
    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(
        tuple, specs, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)
    )
