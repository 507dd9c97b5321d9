"""Dense projections, embeddings, norms, dropout and the feed-forward block.

Shapes: b batch, l length, e embed, m mlp. Parameters carry logical axis names; see `sharding`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.models import weights
from t5x_lite.sharding import constrain
from t5x_lite.types import Array

ACTIVATION = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # the tanh form: T5 1.1, GPT-2
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),  # BERT, RoBERTa, BART
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Dense(nn.Module):
    """A projection `[..., *in] -> [..., *out]` by `kernel [*in, *out]`, and `bias [*out]` if asked.

    Fresh kernels are normal with `stddev`, or where that is None from a truncated normal of
    variance `scale / fan_in` over all input dimensions; biases are zero.
    """

    features: Sequence[int]  # sizes of the output dimensions
    names: tuple[str, ...]  # logical axes of the kernel, inputs first
    param_dtype: Any
    in_axes: int = 1
    scale: float = 1.0
    use_bias: bool = False
    stddev: float | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*x.shape[x.ndim - self.in_axes :], *self.features)
        weight = kernel(
            self, shape, self.names, self.param_dtype, self.in_axes, self.scale, self.stddev
        )
        y = checkpoint_name(weights.project(x, weight, self.in_axes), weights.PROJECTED)
        if not self.use_bias:
            return y
        return y + bias(self, self.names[self.in_axes :], self.features, self.param_dtype, y)


def kernel(
    module: nn.Module,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    dtype: Any,
    in_axes: int = 1,
    scale: float = 1.0,
    stddev: float | None = None,
) -> Array | weights.StructuredWeight:
    """The module's parameter `kernel [*in, *out]`; see `Dense` for how it starts."""
    if stddev is None:
        init = nn.initializers.variance_scaling(
            scale,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(in_axes)),
            out_axis=tuple(range(in_axes, len(shape))),
        )
    else:
        init = nn.initializers.normal(stddev)
    boxed = nn.with_logical_partitioning(init, names)
    found: Array | weights.StructuredWeight = weights.parameter(
        module, "kernel", boxed, shape, dtype
    )
    return found


def bias(
    module: nn.Module, names: tuple[str, ...], shape: Sequence[int], dtype: Any, y: Array
) -> Array:
    """The module's parameter `bias [*shape]` from zeros, shaped and typed to be added to `y`."""
    init = nn.with_logical_partitioning(nn.initializers.zeros, names)
    parameter = weights.vector(weights.parameter(module, "bias", init, tuple(shape), dtype))
    return parameter.astype(y.dtype).reshape((1,) * (y.ndim - len(shape)) + parameter.shape)


class Embedding(nn.Module):
    """A table `embedding [vocab, embed]`, read by rows or, tied, as a projection to logits."""

    vocab_size: int
    embed_dim: int
    param_dtype: Any
    stddev: float = 1.0
    names: tuple[str, str] = ("vocab", "embed")

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.names)
        self.embedding = weights.parameter(
            self, "embedding", init, (self.vocab_size, self.embed_dim), self.param_dtype
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
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * _scale(self, x)).astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean) / std * scale + bias` over the last axis, in float32 (Ba et al. 2016)."""

    epsilon: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon) * _scale(self, x)
        return (y + bias(self, ("embed",), x.shape[-1:], self.param_dtype, y)).astype(x.dtype)


def _scale(module: Any, x: Array) -> Array:
    """The norm's parameter `scale [e]` from ones, in float32, shaped to multiply `x [..., e]`."""
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    scale = weights.vector(
        weights.parameter(module, "scale", init, x.shape[-1:], module.param_dtype)
    )
    return scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)


NORM = {"rms": RMSNorm, "layer": LayerNorm}


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
    biases: tuple[str, ...]
    dropout: float
    param_dtype: Any
    stddev: float | None = None
    out_stddev: float | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        hidden: Array = 1.0
        for index, activation in enumerate(self.activations):
            dense = Dense(
                (self.mlp_dim,),
                ("embed", "mlp"),
                self.param_dtype,
                use_bias="wi" in self.biases,
                stddev=self.stddev,
                name=f"wi_{index}",
            )
            hidden = hidden * ACTIVATION[activation](dense(x))
        hidden = Dropout(self.dropout, (-2,))(hidden, deterministic)
        hidden = constrain(hidden, "batch", "length", "mlp")
        return Dense(
            (x.shape[-1],),
            ("mlp", "embed"),
            self.param_dtype,
            use_bias="wo" in self.biases,
            stddev=self.out_stddev,
            name="wo",
        )(hidden)
