"""The one Transformer: token embedding, an encoder and a decoder (either may be absent), a head.

Parameter paths are a public contract: docs/contracts.md lists them.

Shapes: b batch, l length, s slots, e embed, v vocab (or labels).
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.devices import fetched
from t5x_lite.kernels.plain import Visibility
from t5x_lite.models import cache as kv_cache
from t5x_lite.models import config_heads, heads, layers
from t5x_lite.models.cache import Cache
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_positions import Learned
from t5x_lite.models.stack import Stack, apart, check_length, make_norm, prefix_length
from t5x_lite.sharding import constrain
from t5x_lite.types import Array, Batch, Params


class Transformer(nn.Module):
    """Encoder, decoder or both, from tokens to a head's logits.

    `apply({"params": params}, batch)` is the call; `method="encode"` returns the encoder's hidden
    states, `method="states"` those that the head reads and `method="logits"` what an LMHead makes
    of some of them; `method="prefill"` and `method="extend"` decode over a cache.
    """

    config: ModelConfig

    def setup(self) -> None:
        config, dtype = self.config, self.config.storage_dtype
        stddev = config.initializer_stddev
        self.token_embedding = layers.Embedding(
            config.vocab_size, config.embed_dim, dtype, 1.0 if stddev is None else stddev
        )
        if config.encoder is not None:
            self.encoder = Stack(config.encoder, False, False, dtype, stddev)
        if config.decoder is not None:
            has_memory = config.encoder is not None
            self.decoder = Stack(config.decoder, True, has_memory, dtype, stddev)
        last = config.last_stack
        match config.head:
            case config_heads.LMHead() as head:
                norm = make_norm(last, dtype)
                self.lm_head = heads.LMHead(head, config.vocab_size, norm, dtype, stddev)
            case config_heads.SequenceHead() as head:
                self.sequence_head = heads.SequenceHead(head, last.dropout, dtype, stddev)
            case config_heads.TokenHead() as head:
                self.token_head = heads.TokenHead(head, last.dropout, dtype, stddev)
        if config.pair_head is not None:
            self.pair_head = heads.SequenceHead(config.pair_head, last.dropout, dtype, stddev)

    def __call__(self, batch: Batch, deterministic: bool = True) -> Array:
        """What the head makes of the last stack's states (the decoder's, if there is one).

        `[b, l, v]` for a head that answers at every token, `[b, s, v]` with `masked_positions` in
        the batch, and `[b, 1, v]` for one that answers once a sequence. An EmbeddingHead's answer
        is the vector itself.

        Args:
          batch: `encoder_input_tokens` and, with a decoder, `decoder_input_tokens`, `[b, l]`.
            Absent segment ids and positions mean one unpadded segment from 0.
          deterministic: False turns dropout on.
        """
        return self._answer(self.states(batch, deterministic), batch, deterministic)

    def states(self, batch: Batch, deterministic: bool = True) -> Array:
        """The last stack's last hidden states `[b, l, e]`."""
        if self.config.decoder is None:
            return self.encode(batch, deterministic)
        memory = memory_segments = None
        if self.config.encoder is not None:
            memory = self.encode(batch, deterministic)
            memory_segments = batch.get(types.ENCODER_SEGMENT_IDS)
        segments = batch.get(types.DECODER_SEGMENT_IDS)
        x, _ = self.decoder(
            self._embed(_require(batch, types.DECODER_INPUT_TOKENS)),
            Visibility(segments, segments, key_prefix=batch.get(types.DECODER_PREFIX)),
            positions=batch.get(types.DECODER_POSITIONS),
            memory=memory,
            memory_visibility=Visibility(segments, memory_segments),
            deterministic=deterministic,
        )
        return x

    def logits(self, states: Array) -> Array:
        """An LMHead's logits `[b, n, v]` of states `[b, n, e]`; reads `head_parameters` alone."""
        return self.lm_head(states, self.token_embedding.attend)

    def encode(self, batch: Batch, deterministic: bool = True) -> Array:
        """The encoder's last hidden states `[b, l, e]`."""
        segments = batch.get(types.ENCODER_SEGMENT_IDS)
        x, _ = self.encoder(
            self._embed(_require(batch, types.ENCODER_INPUT_TOKENS)),
            Visibility(segments, segments),
            positions=batch.get(types.ENCODER_POSITIONS),
            token_types=batch.get(types.ENCODER_TOKEN_TYPES),
            deterministic=deterministic,
        )
        return x

    def prefill(
        self,
        batch: Batch,
        capacity: int,
        *,
        cache_dtype: kv_cache.CacheDtype | None = None,
        window: int | None = None,
        branches: int = 1,
    ) -> tuple[Array, Cache]:
        """Runs the encoder and the decoder's first tokens, and starts a cache.

        Args:
          batch: as for the call, unpacked; `decoder_input_tokens [b, n]` are the first n tokens.
            Shorter prompts have padding on the left, with `decoder_segment_ids` 0. Places with
            `decoder_prefix` are seen from everywhere in the prompt.
          capacity: how many decoder tokens of a text the cache holds, n included.
          cache_dtype: what the cache keeps; None: the compute dtype. int8 keeps a scale for each
            token and head.
          window: how many tokens back each one sees, itself included; None: all. The cache needs no
            more places than that: it rolls over.
          branches: how many alternatives each text has behind the prompt (beams); see `Cache`.

        Returns:
          Logits `[b, n, v]` (`[b, s, v]` with `masked_positions`) and the cache.

        Raises InputError for a prompt or a capacity that is too long.
        """
        assert self.config.decoder is not None
        tokens = _require(batch, types.DECODER_INPUT_TOKENS)
        length = tokens.shape[1]
        if window is not None:
            capacity = min(capacity, window)
        elif length > capacity:
            raise types.InputError(
                f"a prompt of {length} tokens is longer than the cache's {capacity} places"
            )
        else:
            prefix = prefix_length(self.variables["params"]["decoder"])
            check_length(self.config.decoder, capacity, prefix)
            capacity = length + branches * (capacity - length)
        memory = memory_segments = None
        if self.config.encoder is not None:
            memory = self.encode(batch)
            memory_segments = batch.get(types.ENCODER_SEGMENT_IDS)
        segments = batch.get(types.DECODER_SEGMENT_IDS)
        real = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
        positions = jnp.maximum(jnp.cumsum(real > 0, axis=1, dtype=jnp.int32) - 1, 0)
        x, written = self.decoder(
            self._embed(tokens),
            Visibility(
                segments, segments, key_prefix=batch.get(types.DECODER_PREFIX), window=window
            ),
            positions=positions,
            memory=memory,
            memory_visibility=_everywhere(tokens, memory_segments),
            keeps=True,
        )
        assert written is not None
        if segments is not None:
            segments = kv_cache.placed(segments, capacity, 1, fill=1)
        return self._answer(x, batch), Cache(
            tuple(kv_cache.start(layer, capacity, cache_dtype) for layer in written),
            index=jnp.int32(length),
            positions=positions[:, -1] + 1,
            segment_ids=segments,
            memory_segment_ids=memory_segments,
            window=window,
            branches=(length, branches) if branches > 1 else None,
        )

    def extend(
        self, tokens: Array, cache: Cache, allowed: Array | None = None
    ) -> tuple[Array, Cache]:
        """Logits `[b, n, v]` of the next tokens `[b, n]`, and the cache with them written.

        With `allowed`, bool `[b, n, c]`, a token sees no other places than those; its own is one.

        A window's cache takes one token at a time: a second could overwrite what the first sees.
        """
        count = tokens.shape[1]
        if cache.window is not None and count > 1:
            raise types.InputError(f"a cache with a window takes one token at a time, not {count}")
        segments = cache.segment_ids
        if cache.window is not None and segments is not None:
            segments = kv_cache.write_places(segments, jnp.ones_like(tokens), cache.index, 1)
        branching = cache.branches is not None
        ahead = jnp.arange(count, dtype=jnp.int32)[None, :] * (0 if branching else 1)
        x, written = self.decoder(
            self._embed(tokens),
            dataclasses.replace(
                _everywhere(tokens, segments), window=cache.window, allowed=allowed
            ),
            positions=cache.positions[:, None] + ahead,
            cache=cache,
            memory_visibility=_everywhere(tokens, cache.memory_segment_ids),
        )
        assert written is not None
        return self._answer(x, {}), dataclasses.replace(
            cache,
            layers=written,
            index=cache.index + count,
            positions=cache.positions + (1 if branching else count),
            segment_ids=segments,
        )

    def _embed(self, tokens: Array) -> Array:
        x = self.token_embedding(tokens, self.config.compute_dtype)
        if self.config.embedding_scale != 1.0:
            x = x * np.asarray(self.config.embedding_scale, x.dtype)
        return constrain(x, "batch", "length", "activation_embed")

    def _answer(self, x: Array, batch: Batch, deterministic: bool = True) -> Array:
        """The head's answer to states `x [b, l, e]`, at the batch's slots if it has any."""
        slots = batch.get(types.MASKED_POSITIONS)
        encoder_alone = self.config.decoder is None
        segments = batch.get(
            types.ENCODER_SEGMENT_IDS if encoder_alone else types.DECODER_SEGMENT_IDS
        )
        match self.config.head:
            case config_heads.EmbeddingHead(pooling=pooling, normalise=unit):
                pooled = heads.pool(x, segments, slots, pooling)
                return heads.normalise(pooled) if unit else pooled.astype(jnp.float32)
            case config_heads.SequenceHead():
                return self.sequence_head(x, segments, slots, deterministic)
            case config_heads.TokenHead():
                return self.token_head(
                    x if slots is None else heads.at_slots(x, slots), deterministic
                )
        if slots is None:
            return self.logits(x)
        if self.config.pair_head is None:
            return self.logits(heads.at_slots(x, slots))
        pair = self.pair_head(x, segments, slots[:, :1], deterministic)
        return heads.beside_tokens(pair, self.logits(heads.at_slots(x, slots[:, 1:])))


def _everywhere(tokens: Array, key_segments: Array | None) -> Visibility:
    """Every token sees all of segment 1: unpacked rows. What padding sees does not matter."""
    if key_segments is None:
        return Visibility()
    return Visibility(jnp.ones((len(key_segments), tokens.shape[1]), jnp.int32), key_segments)


def head_parameters(config: ModelConfig, params: Params) -> Params:
    """The part of the parameters that an LMHead reads."""
    assert isinstance(config.head, config_heads.LMHead)
    names = ("lm_head", "token_embedding") if config.head.tied else ("lm_head",)
    return fetched({name: params[name] for name in names if name in params})


def for_decoding(params: Params) -> Params:
    """The same parameters as a loop over tokens reads them fastest; see `stack.apart`.

    Do this once before the loop: `prefill` and `extend` take both forms.
    """
    own = {name: part if name == "encoder" else fetched(part) for name, part in params.items()}
    return {**own, "decoder": apart(own["decoder"])}


def _require(batch: Batch, key: str) -> Array:
    if key not in batch:
        raise types.InputError(
            f"the model needs batch['{key}'], but the batch has {', '.join(sorted(batch))}: "
            "the task's layout does not fit this model"
        )
    return batch[key]


def dummy_batch(config: ModelConfig, rows: int = 1, length: int = 8) -> dict[str, Array]:
    """The smallest batch that reaches every parameter of this config: zeros `[rows, length]`."""
    stacks = [stack for stack in (config.encoder, config.decoder) if stack is not None]
    for stack in stacks:
        if isinstance(stack.positions, Learned):
            length = min(length, stack.positions.max_length)
    tokens = jnp.zeros((rows, length), jnp.int32)
    batch = {}
    if config.encoder is not None:
        batch[types.ENCODER_INPUT_TOKENS] = tokens
    if config.decoder is not None:
        batch[types.DECODER_INPUT_TOKENS] = tokens
    if config.pair_head is not None:
        batch[types.MASKED_POSITIONS] = jnp.zeros((rows, 2), jnp.int32)
    return batch


def init(model: Transformer, rng: Array) -> Params:
    """Fresh parameters as a tree of plain arrays; trace it with `jax.eval_shape` or `jax.jit`."""
    return nn.unbox(_init(model, rng)["params"])


def shapes(model: Transformer) -> Params:
    """The parameters as a tree of `jax.ShapeDtypeStruct`."""
    return nn.unbox(_traced(model))


def axes(model: Transformer) -> Params:
    """A tree like the parameters whose leaves are tuples of logical axis names."""
    specs = nn.get_partition_spec(_traced(model))
    return jax.tree.map(
        tuple, specs, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)
    )


@functools.lru_cache(maxsize=64)
def _traced(model: Transformer) -> Params:
    """Shapes in boxes that name their axes; traced once a model, for that takes seconds."""
    return jax.eval_shape(lambda: _init(model, jax.random.key(0)))["params"]


@functools.partial(jax.jit, static_argnums=0)  # so that shapes and initialisers trace it once
def _init(model: Transformer, rng: Array) -> Params:
    """Linen's, on rows that are too short for some kernels, on any machine: by plain attention."""
    config = model.config

    def plain(stack: StackConfig | None) -> StackConfig | None:
        return None if stack is None else dataclasses.replace(stack, attention="plain")

    encoder, decoder = plain(config.encoder), plain(config.decoder)
    model = Transformer(dataclasses.replace(config, encoder=encoder, decoder=decoder))
    made: Params = model.init({"params": rng}, dummy_batch(config))
    return made
