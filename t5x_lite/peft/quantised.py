"""A weight as small codes and scales, multiplied by tile by tile.

No more of it than a tile is there in floating point at a time, neither in the forward pass nor for
the gradient of what it is multiplied with; its own gradient is not asked for. What the backward
pass keeps of it is the codes.

Shapes: n inputs, m outputs, s scales of an output, r rows; T tiles of k units of u inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from t5x_lite.models import weights
from t5x_lite.peft import codes as coding
from t5x_lite.types import Array

TILE = 2**18  # numbers, 1 MB in float32: what a core's cache holds


@flax.struct.dataclass
class QuantisedWeight(weights.StructuredWeight):
    """A kernel `[*in, *out]`, or an embedding `[vocab, embed]`, as `codes` have it.

    Blocks go along a kernel's inputs (heads and their width are one), and along an embedding's
    rows.
    """

    codes: Array  # as the weight; NF4 (uint8) has two in a byte, along the last input
    scales: Array  # float32 or 8-bit codes, [s, *out] or [vocab, s]
    ndim: int = flax.struct.field(pytree_node=False)  # of the weight, without the layer axis
    embedding: bool = flax.struct.field(pytree_node=False)
    groups: Array | None = None  # of scales in codes: float32 [groups]
    mean: Array | None = None  # of scales in codes: float32 []

    @property
    def kind(self) -> str:
        return "int8" if self.codes.dtype == jnp.int8 else "nf4"

    @property
    def block(self) -> int:
        """Numbers that share a scale."""
        stack = self._stack
        if self.embedding:
            return self.shape[-1] // self.scales.shape[-1]
        inputs = self.shape[stack : stack + self._in_axes]
        return math.prod(inputs) // self.scales.shape[stack]

    @property
    def shares_all(self) -> bool:
        """Whether all inputs of an output share a scale."""
        return self.scales.shape[-1 if self.embedding else self._stack] == 1

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        last = self.codes.ndim - 1 if self.embedding else self._stack + self._in_axes - 1
        shape[last] *= 2 if self.kind == "nf4" else 1
        return tuple(shape)

    @property
    def _stack(self) -> int:
        return self.codes.ndim - self.ndim

    @property
    def _in_axes(self) -> int:
        return self.codes.ndim - self.scales.ndim + 1

    def dense(self) -> Array:
        """In float32, whatever the base's dtype was."""
        if self._stack:
            return jax.vmap(lambda node: node.dense())(self)
        values = coding.values(self._matrix(), int(self.embedding))
        axis = int(self.embedding)
        scales = jnp.repeat(self._scales(), values.shape[axis] // self._scales().shape[axis], axis)
        return (values * scales).reshape(self.shape)

    def project(self, x: Array, in_axes: int) -> Array:
        lead, outputs = x.shape[: x.ndim - in_axes], self.shape[in_axes:]
        rows = x.reshape(-1, math.prod(self.shape[:in_axes]))
        return _multiply(self.embedding, rows, self).reshape(*lead, *outputs)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        scales = jnp.take(self._scales(), ids, axis=0, mode="fill", fill_value=jnp.nan)
        values = coding.values(jnp.take(self.codes, ids, axis=0, mode="clip"), ids.ndim)
        blocks = values.reshape(*scales.shape, -1) * scales[..., None]
        return blocks.reshape(values.shape).astype(dtype)

    def attend(self, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        return _multiply(False, rows, self).reshape(*x.shape[:-1], self.shape[0])

    def square_sums(self, in_axes: int) -> Array:
        tiles = Tiles(self)
        squares = lambda index: jnp.square(tiles.take(index))
        if not self.embedding:
            sums = tiles.sum(lambda index: jnp.sum(squares(index), axis=(0, 1)))
        else:
            sums = tiles.join(lambda index: jnp.sum(squares(index), axis=0)[None])
        return sums.reshape(self.shape[in_axes:])

    def _matrix(self) -> Array:
        """Codes `[n or n / 2, m]`, of an embedding `[m, n or n / 2]`."""
        if self.embedding:
            return self.codes
        return self.codes.reshape(math.prod(self.codes.shape[: self._in_axes]), -1)

    def _scales(self) -> Array:
        """Scales in float32: `[s, m]`, of an embedding `[m, s]`."""
        scales = self.scales
        if not self.embedding:
            scales = scales.reshape(scales.shape[0], -1)
        if self.groups is None:
            return scales
        if self.embedding:
            return coding.scales_of(scales.T, self.groups, self.mean).T
        return coding.scales_of(scales, self.groups, self.mean)


class Tiles:
    """A weight without its layer axis, cut along its inputs.

    A tile is every T-th unit, so that an axis that is split over devices stays split in each tile.
    """

    def __init__(self, weight: QuantisedWeight):
        codes, scales = weight._matrix(), weight._scales()
        self.last = weight.embedding  # whether inputs are the last axis
        outputs = codes.shape[1 - int(self.last)]
        inputs = codes.shape[int(self.last)] * (2 if weight.kind == "nf4" else 1)
        blocks = scales.shape[int(self.last)]
        self.unit = inputs // blocks if blocks > 1 else math.gcd(inputs, 64)
        units = inputs // self.unit
        most = max(1, TILE // (self.unit * outputs))  # units in a tile
        self.count = next(
            count for count in range(1, units + 1) if units % count == 0 and units // count <= most
        )
        cut = units // self.count, self.count
        if self.last:
            self.codes = codes.reshape(outputs, *cut, -1)
            self.scales = scales.reshape(outputs, *(cut if blocks > 1 else (1, 1)))
        else:
            self.codes = codes.reshape(*cut, -1, outputs)
            self.scales = scales.reshape(*(cut if blocks > 1 else (1, 1)), outputs)

    def take(self, index: Array | int) -> Array:
        """Tile number `index`: float32 `[k, u, m]`, of an embedding `[m, k, u]`."""
        axis = 2 if self.last else 1
        codes = jax.lax.dynamic_index_in_dim(self.codes, index, axis, keepdims=False)
        if self.scales.shape[axis] > 1:
            scales = jax.lax.dynamic_index_in_dim(self.scales, index, axis)
        else:
            scales = self.scales
        scales = jnp.moveaxis(scales, axis, -1) if self.last else scales
        return coding.values(codes, axis) * scales

    def sum(self, of: Callable[[Any], Array]) -> Array:
        """The sum of what `of` makes of each tile's number."""
        if self.count == 1:
            return of(0)
        shape = jax.eval_shape(of, jnp.int32(0))

        # Not a scan: a rematerialisation policy would look into it, and keep each tile's share.
        def add(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            index, total = carry
            return index + 1, total + of(index)

        start = jnp.int32(0), jnp.zeros(shape.shape, shape.dtype)
        return jax.lax.while_loop(lambda carry: carry[0] < self.count, add, start)[1]

    def join(self, of: Callable[[Any], Array]) -> Array:
        """`[r, n]` from what `of` makes of each tile's number, `[r, k, u]`."""
        if self.count == 1:
            parts = of(0)[None]
        else:
            _, parts = jax.lax.scan(
                lambda _, index: (None, of(index)), None, jnp.arange(self.count, dtype=jnp.int32)
            )
        return jnp.moveaxis(parts, 0, 2).reshape(parts.shape[1], -1)

    def cut(self, x: Array) -> Callable[[Any], Array]:
        """The part `[r, k, u]` of `x [r, n]` that meets a tile, by the tile's number."""
        parts = x.reshape(len(x), -1, self.count, self.unit)
        return lambda index: jax.lax.dynamic_index_in_dim(parts, index, 2, keepdims=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(turned: bool, x: Array, weight: QuantisedWeight) -> Array:
    """`x [r, n]` by the weight: `[r, m]`; turned, `x [r, m]` by its transpose: `[r, n]`."""
    tiles = Tiles(weight)

    def product(x: Array, index: Any, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
        tile = tiles.take(index).astype(x.dtype)
        return jax.lax.dot_general(x, tile, (axes, ((), ())), preferred_element_type=jnp.float32)

    if turned:
        outputs = ((1,), (0 if tiles.last else 2,))
        y = tiles.join(lambda index: product(x, index, outputs).astype(x.dtype))
    else:
        part, inputs = tiles.cut(x), ((1, 2), (1, 2) if tiles.last else (0, 1))
        y = tiles.sum(lambda index: product(part(index), index, inputs))
    return y.astype(x.dtype)


def _multiply_forward(
    turned: bool, x: Array, weight: QuantisedWeight
) -> tuple[Array, QuantisedWeight]:
    return _multiply(turned, x, weight), weight


def _multiply_backward(
    turned: bool, weight: QuantisedWeight, gradient: Array
) -> tuple[Array, None]:
    return _multiply(not turned, gradient, weight), None


_multiply.defvjp(_multiply_forward, _multiply_backward)
