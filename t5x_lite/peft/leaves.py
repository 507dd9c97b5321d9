"""Leaves that stand where a weight stood: what fine-tuning adds, beside the frozen base.

Inside a stack, a leaf's arrays have a leading layer axis, which the loop over layers takes off.
`ndim` is a weight's number of dimensions without it.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.models import weights
from t5x_lite.peft import joined
from t5x_lite.types import Array


@flax.struct.dataclass
class LowRank(weights.StructuredWeight):
    """`w + scale * a b` that is never formed: `x w + scale * (x a) b` (Hu et al. 2021, 4.1).

    One product on TPUs; see `joined`.

    Forming the sum in the forward pass would cost as much as full fine-tuning: its gradient is of
    the weight's size.

    With `key`, what `a` reads is dropped out at `dropout`, each number by itself.
    """

    w: Array | weights.StructuredWeight  # [*in, *out], frozen
    a: Array  # [*in, rank]
    b: Array  # [rank, *out]
    scale: float = flax.struct.field(pytree_node=False)
    key: Array | None = None  # uint32, a random key's data
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def project(self, x: Array, in_axes: int) -> Array:
        array = not isinstance(self.w, weights.StructuredWeight)
        if array and self._keeps_all and joined.pays(x, in_axes):
            parts: tuple[Array, ...] = (self.w, self.a, self._scaled(self.b))
            return joined.project(in_axes, x, *(part.astype(x.dtype) for part in parts))
        update = weights.project(weights.project(self._dropped(x), self.a, in_axes), self.b)
        return weights.project(x, self.w, in_axes) + self._scaled(update)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        update = weights.project(self._dropped(weights.lookup(ids, self.a, dtype)), self.b)
        return weights.lookup(ids, self.w, dtype) + self._scaled(update)

    def attend(self, x: Array) -> Array:
        update = weights.attend(weights.attend(self._dropped(x), self.b), self.a)
        return weights.attend(x, self.w) + self._scaled(update)

    def dense(self) -> Array:
        return merge_low_rank(weights.dense(self.w), self.a, self.b, self.scale)

    def _scaled(self, update: Array) -> Array:
        return update * jnp.asarray(self.scale, update.dtype)

    @property
    def _keeps_all(self) -> bool:
        return self.key is None or self.dropout == 0.0

    def _dropped(self, x: Array) -> Array:
        if self._keeps_all:
            return x
        kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - self.dropout, x.dtype), 0)


@flax.struct.dataclass
class Decomposed(weights.StructuredWeight):
    """`magnitude * (w + scale * a b) / norm`, a norm for each column (Liu et al. 2024, eq. 5).

    Neither the sum nor its norm is formed: of a column, with c = `w^T a`,
    `|w + s a b|^2 = |w|^2 + 2 s c b + s^2 b^T (a^T a) b`. The norm counts as a constant in the
    gradient, as the paper's 4.3 has it.
    """

    low: LowRank
    magnitude: Array  # [*out]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low.shape

    def project(self, x: Array, in_axes: int) -> Array:
        y = _kept(self.low.project(x, in_axes))
        return y * _alongside(self._ratio(in_axes), y)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        rows = self.low.lookup(ids, dtype)
        return rows * _alongside(self._ratio(1), rows)

    def attend(self, x: Array) -> Array:
        return self.low.attend(x * _alongside(self._ratio(1), x))

    def dense(self) -> Array:
        w = self.low.dense()
        stacked = self.low.a.ndim + self.low.b.ndim - 2 - w.ndim
        in_axes = w.ndim - self.magnitude.ndim
        ratio = jax.vmap(lambda node: node._ratio(in_axes))(self) if stacked else None
        ratio = self._ratio(in_axes) if ratio is None else ratio
        return (w.astype(jnp.float32) * _beside_inputs(ratio, w.ndim, stacked)).astype(w.dtype)

    def _ratio(self, in_axes: int) -> Array:
        """`magnitude / norm`, float32 `[*out]`."""
        norm = jnp.sqrt(column_squares(self.low, in_axes))
        return self.magnitude.astype(jnp.float32) / jax.lax.stop_gradient(norm)


def column_squares(low: LowRank, in_axes: int) -> Array:
    """`|w + scale * a b|^2` of each column: float32 `[*out]`."""
    a, b = low.a.astype(jnp.float32), low.b.astype(jnp.float32)
    rank = a.shape[-1]
    rows, flat = a.reshape(-1, rank), b.reshape(rank, -1)
    across = weights.project(jnp.moveaxis(a, -1, 0), low.w, in_axes).reshape(rank, -1)
    inner = jnp.matmul(rows.T, rows, precision="highest")
    mixed = 2 * low.scale * jnp.sum(across * flat, axis=0)
    own = low.scale**2 * jnp.sum(flat * jnp.matmul(inner, flat, precision="highest"), axis=0)
    base = weights.square_sums(low.w, in_axes)
    # Rounding may leave a small negative number where the update cancels a column.
    return jnp.maximum(base + (mixed + own).reshape(base.shape), 1e-12)


@flax.struct.dataclass
class Rescaled(weights.StructuredWeight):
    """A kernel whose outputs, or inputs, are multiplied by a vector; or a bias times it."""

    w: Array | weights.StructuredWeight  # [*in, *out] or [*out], frozen
    multiplier: Array  # [*out] or [*in]
    inputs: bool = flax.struct.field(pytree_node=False)
    ndim: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def project(self, x: Array, in_axes: int) -> Array:
        if self.inputs:
            return weights.project(x * _alongside(self.multiplier, x), self.w, in_axes)
        y = _kept(weights.project(x, self.w, in_axes))
        return y * _alongside(self.multiplier, y)

    def vector(self) -> Array:
        w = weights.vector(self.w)
        return w * self.multiplier.astype(w.dtype)

    def dense(self) -> Array:
        w = weights.dense(self.w)
        if self.inputs:
            multiplier = self.multiplier.reshape(
                *self.multiplier.shape, *[1] * (w.ndim - self.multiplier.ndim)
            )
        else:
            multiplier = _beside_inputs(self.multiplier, w.ndim, w.ndim - self.ndim)
        return (w.astype(jnp.float32) * multiplier).astype(w.dtype)


@flax.struct.dataclass
class Bottlenecked(weights.StructuredWeight):
    """`y + up(f(down(y)))` of a projection's result y, before its bias (Houlsby et al. 2019).

    The bias of the projection comes after it; `down`'s own can make up for that.
    """

    w: Array | weights.StructuredWeight  # [*in, e], frozen
    down: Array  # [e, size]
    down_bias: Array  # [size]
    up: Array  # [size, e]
    up_bias: Array  # [e]
    activation: Any = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def project(self, x: Array, in_axes: int) -> Array:
        y = weights.project(x, self.w, in_axes)
        hidden = weights.project(y, self.down)
        hidden = self.activation(hidden + _alongside(self.down_bias, y))
        return y + weights.project(hidden, self.up) + _alongside(self.up_bias, y)

    def dense(self) -> Array:
        raise NotImplementedError("a bottleneck is no linear map")


def merge_low_rank(w: Array, a: Array, b: Array, scale: float) -> Array:
    """`w + scale * a b` in float32, back in `w`'s dtype; shapes as in `LowRank`, stacked or not."""
    stacked = a.ndim + b.ndim - 2 - w.ndim  # 1 if all three have a leading layer axis

    def product(a: Array, b: Array) -> Array:
        return jnp.tensordot(a, b, axes=1, precision="highest")

    update = jax.vmap(product)(a, b) if stacked else product(a, b)
    return (w.astype(jnp.float32) + scale * update.astype(jnp.float32)).astype(w.dtype)


def _kept(y: Array) -> Array:
    """What a product gave, kept for the backward pass: a factor's gradient reads it again."""
    return checkpoint_name(y, weights.PROJECTED)


def _alongside(vector: Array, y: Array) -> Array:
    """`[*out]` shaped and typed to meet `y [..., *out]`."""
    return vector.astype(y.dtype).reshape((1,) * (y.ndim - vector.ndim) + vector.shape)


def _beside_inputs(vector: Array, ndim: int, stacked: int) -> Array:
    """`[layers?, *out]` with axes of size 1 for the inputs: `ndim` axes in all."""
    ones = [1] * (ndim - vector.ndim)
    return vector.reshape(*vector.shape[:stacked], *ones, *vector.shape[stacked:])
