"""Heads: from last hidden states to logits over tokens or labels, or to one vector a sequence.

A slot (`masked_positions [b, s]`, places in the row) is where a head predicts. A masked language
model asks at masked tokens only, so that the vocabulary's product, its most expensive one, runs on
15% of the places; a classifier asks once a sequence.

Shapes: b batch, l length, s slots, e embed, v vocab, n labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from t5x_lite.models import config_heads as config
from t5x_lite.models import layers, weights
from t5x_lite.sharding import constrain
from t5x_lite.types import Array

_NEVER = -1e9  # a logit that no softmax sees, and no float32 or bfloat16 overflows on


def at_slots(x: Array, slots: Array) -> Array:
    """The states `[b, s, e]` at places `slots [b, s]` of `x [b, l, e]`."""
    return jnp.take_along_axis(x, slots[..., None], axis=1)


def pool(x: Array, segments: Array | None, slots: Array | None, pooling: str) -> Array:
    """One state `[b, s, e]` for each slot's sequence: its first, its last, or the mean of all.

    Args:
      x: `[b, l, e]`.
      segments: int32 `[b, l]`, 0 is padding; None: every row is one sequence.
      slots: int32 `[b, s]`, a place of each sequence; None: one slot, the row's segment 1.
      pooling: "first", "last" or "mean".
    """
    if segments is None:
        segments = jnp.ones(x.shape[:2], jnp.int32)
    if slots is None:
        wanted = jnp.ones((x.shape[0], 1), jnp.int32)
    else:
        wanted = jnp.take_along_axis(segments, slots, axis=1)
    member = segments[:, None, :] == wanted[:, :, None]  # [b, s, l]
    if pooling == "first":
        return at_slots(x, jnp.argmax(member, axis=-1))
    if pooling == "last":
        return at_slots(x, x.shape[1] - 1 - jnp.argmax(member[..., ::-1], axis=-1))
    count = jnp.sum(member, axis=-1, keepdims=True, dtype=jnp.float32)
    summed = jnp.einsum("bsl,ble->bse", member.astype(jnp.float32), x.astype(jnp.float32))
    return (summed / jnp.maximum(count, 1.0)).astype(x.dtype)


def normalise(x: Array) -> Array:
    """`x [..., e]` in float32, of length 1."""
    x = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)


class LMHead(nn.Module):
    """Logits `[..., v]` of states `[..., e]`: transform, then the tied table or a kernel."""

    config: config.LMHead
    vocab_size: int
    norm: Callable[[str], nn.Module]  # makes a norm of the last stack's kind, by name
    param_dtype: Any
    stddev: float | None

    @nn.compact
    def __call__(self, x: Array, attend: Callable[[Array], Array]) -> Array:
        """`attend` multiplies states by the token embedding; called only where tied."""
        embed_dim = x.shape[-1]
        if self.config.transform is not None:
            dense = layers.Dense(
                (embed_dim,),
                ("embed", "mlp"),
                self.param_dtype,
                use_bias=True,
                stddev=self.stddev,
                name="transform",
            )
            x = self.norm("norm")(layers.ACTIVATION[self.config.transform](dense(x)))
        if self.config.tied:
            # An embedding of unit variance (T5's) is scaled as a kernel would be.
            scale = np.asarray(embed_dim**-0.5, x.dtype) if self.config.scaled else None
            logits = attend(x if scale is None else x * scale)
        else:
            shape = (embed_dim, self.vocab_size)
            logits = weights.project(
                x,
                layers.kernel(
                    self, shape, ("embed", "vocab"), self.param_dtype, stddev=self.stddev
                ),
            )
        if self.config.bias:
            logits = logits + layers.bias(
                self, ("vocab",), (self.vocab_size,), self.param_dtype, logits
            )
        return constrain(logits, "batch", "length", "vocab")


class SequenceHead(nn.Module):
    """Logits `[b, s, n]` of the labels of whole sequences."""

    config: config.SequenceHead
    dropout: float
    param_dtype: Any
    stddev: float | None

    @nn.compact
    def __call__(
        self, x: Array, segments: Array | None, slots: Array | None, deterministic: bool
    ) -> Array:
        """`x [b, l, e]`; `segments`, `slots`: see `pool`."""
        x = pool(x, segments, slots, self.config.pooling)
        drop = layers.Dropout(self.dropout, ())
        if self.config.activation is not None:
            features, names = (x.shape[-1],), ("embed", "mlp")
            dense = layers.Dense(
                features,
                names,
                self.param_dtype,
                use_bias=True,
                stddev=self.stddev,
                name="dense",
            )
            x = layers.ACTIVATION[self.config.activation](dense(drop(x, deterministic)))
        return _labels(self.config.num_labels, self.config.bias, self.param_dtype, self.stddev)(
            drop(x, deterministic)
        )


class TokenHead(nn.Module):
    """Logits `[..., n]` of each token's labels."""

    config: config.TokenHead
    dropout: float
    param_dtype: Any
    stddev: float | None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        x = layers.Dropout(self.dropout, ())(x, deterministic)
        return _labels(self.config.num_labels, self.config.bias, self.param_dtype, self.stddev)(x)


def _labels(num_labels: int, use_bias: bool, param_dtype: Any, stddev: float | None) -> nn.Module:
    return layers.Dense(
        (num_labels,),
        ("embed", "labels"),
        param_dtype,
        use_bias=use_bias,
        stddev=stddev,
        name="out",
    )


def beside_tokens(pair: Array, logits: Array) -> Array:
    """Logits of a pair `[b, 1, 2]` as slot 0 before those of tokens `[b, s - 1, v]`.

    Labels are then targets like tokens, and the loss does not know the difference.
    """
    padding = ((0, 0), (0, 0), (0, logits.shape[-1] - pair.shape[-1]))
    wide = jnp.pad(pair.astype(logits.dtype), padding, constant_values=_NEVER)
    return jnp.concatenate([wide, logits], axis=1)
