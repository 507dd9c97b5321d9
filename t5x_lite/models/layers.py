"""Dense projections, embeddings, RMSNorm, dropout and the feed-forward block.

Shapes: b batch, l length, e embed, m mlp. Parameters carry logical axis names; see `sharding`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.models import weights
from t5x_lite.sharding import constrain
from t5x_lite.types import Array

_ACTIVATION = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # the tanh form, as T5 1.1
    "silu": jax.nn.silu,
}


class Dense(nn.Module):
    """A projection `[..., *in] -> [..., *out]` by `kernel [*in, *out]`, without bias.

    Initialised from a truncated normal of variance `scale / fan_in` over all input dimensions.
    """

    features: Sequence[int]  # sizes of the output dimensions
    names: tuple[str, ...]  # logical axes of the kernel, inputs first
    param_dtype: Any
    in_axes: int = 1
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*x.shape[x.ndim - self.in_axes :], *self.features)
        init = nn.initializers.variance_scaling(
            self.scale,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(self.in_axes)),
            out_axis=tuple(range(self.in_axes, len(shape))),
        )
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.names), shape, self.param_dtype
        )
        return weights.project(x, kernel, self.in_axes)


class Embedding(nn.Module):
    """A table `embedding [vocab, embed]`, read by rows or, tied, as a projection to logits."""

    vocab_size: int
    embed_dim: int
    param_dtype: Any

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.embedding = self.param(
            "embedding", init, (self.vocab_size, self.embed_dim), self.param_dtype
        )

    def __call__(self, ids: Array, dtype: Any) -> Array:
        return weights.lookup(ids, self.embedding, dtype)

    def attend(self, x: Array) -> Array:
        return weights.attend(x, self.embedding)


class RMSNorm(nn.Module):
    """`x / rms(x) * scale` over the last axis, in float32 (Zhang & Sennrich 2019)."""

    epsilon: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale: Array = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        broadcast = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
        return (x32 * inverse * broadcast).astype(x.dtype)


class Dropout(nn.Module):
    """Drops with one mask along `shared_axes` (T5 shares it along the length of a row).

    Sharing is what T5 was trained with, and draws as many times fewer random numbers.
    """

    rate: float
    shared_axes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        if deterministic or self.rate == 0.0:
            return x
        return nn.Dropout(self.rate, broadcast_dims=self.shared_axes)(x, deterministic=False)


class MLP(nn.Module):
    """The feed-forward block: `wo(act_0(wi_0 x) * act_1(wi_1 x) * ...)`, `[b, l, e] -> same`."""

    mlp_dim: int
    activations: tuple[str, ...]
    dropout: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        hidden: Array = 1.0
        for index, activation in enumerate(self.activations):
            dense = Dense((self.mlp_dim,), ("embed", "mlp"), self.param_dtype, name=f"wi_{index}")
            hidden = hidden * _ACTIVATION[activation](dense(x))
        hidden = Dropout(self.dropout, (-2,))(hidden, deterministic)
        hidden = constrain(hidden, "batch", "length", "mlp")
        return Dense((x.shape[-1],), ("mlp", "embed"), self.param_dtype, name="wo")(hidden)
