"""Attention with a bias by distance, T5's, on TPUs: our kernel in Pallas.

The bias of a head is a row of numbers, one a distance between key and query: `[heads, q + k - 1]`.
A tile of logits wants a Toeplitz matrix of them, which the chip makes by rolling one row, each line
by one place more than the line above. So neither bias nor logits `[heads, q, k]` reach memory, in
either direction: the gradient of a tile's diagonals is summed by rolling back.

Softmax in tiles by its running maximum (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al.
2022, arXiv:2205.14135); the backward pass recomputes each tile's weights from the sums it kept.

Shapes: b batch, h heads, l length of queries and keys, d head width, t tile, n = 2 l.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5x_lite.kernels.plain import HIDDEN
from t5x_lite.types import Array

LANES: Final = 128
_ROWS = 8  # of a register: the least that a row of numbers takes
_TILES = (512, 256, 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(
    query: Array,
    key: Array,
    value: Array,
    by_distance: Array,
    query_segments: Array,
    key_segments: Array,
    causal: bool,
    interpret: bool,
) -> Array:
    """Attention of packed rows with a bias by distance.

    Args:
      query, key, value: `[b, h, l, d]`, scaled as the model wants it.
      by_distance: float32 `[h, n]`; place `l - 1 + distance` is for keys so far after the query,
        and the last is not used.
      query_segments, key_segments: int32 `[b, l]`.
      causal: whether keys after the query are hidden.
      interpret: run by jax, anywhere, slowly.

    Returns:
      `[b, h, l, d]` in the query's dtype.
    """
    arguments = query, key, value, by_distance, query_segments, key_segments
    return _forward(*arguments, causal, interpret)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    by_distance: Array,
    query_segments: Array,
    key_segments: Array,
    causal: bool,
    interpret: bool,
) -> tuple[Array, tuple]:
    batch, heads, length, dim = query.shape
    tile = _tile(length)
    count = length // tile
    grid = (batch, heads, count, count)
    specs = _specs(tile, dim, length)
    attended, sums = pl.pallas_call(
        functools.partial(_forward_kernel, tile=tile, length=length, causal=causal),
        grid=grid,
        in_specs=[specs[name] for name in ("q", "k", "k", "bias", "q_segments", "k_segments")],
        out_specs=[specs["q"], specs["q_sums"]],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, heads, _ROWS, length), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((tile, LANES), jnp.float32),
            pltpu.VMEM((tile, LANES), jnp.float32),
            pltpu.VMEM((tile, dim), jnp.float32),
        ],
        compiler_params=_parallel(2),
        cost_estimate=_cost(query, 2),
        interpret=interpret,
        name="relative_attention",
    )(query, key, value, *_rows(by_distance, query_segments, key_segments))
    kept = query, key, value, by_distance, query_segments, key_segments, attended, sums
    return attended, kept


def _backward(causal: bool, interpret: bool, kept: tuple, gradient: Array) -> tuple:
    query, key, value, by_distance, query_segments, key_segments, attended, sums = kept
    batch, heads, length, dim = query.shape
    tile = _tile(length)
    count = length // tile
    # sum_k weights * d_weights of each query, without the weights.
    means = jnp.sum(gradient.astype(jnp.float32) * attended.astype(jnp.float32), axis=-1)
    means = jnp.broadcast_to(means[:, :, None], sums.shape)
    arrays = query, key, value, *_rows(by_distance, query_segments, key_segments)
    arrays = (*arrays, gradient, sums, means)
    names = ("q", "k", "k", "bias", "q_segments", "k_segments", "q", "q_sums", "q_sums")
    settings = {"tile": tile, "length": length, "causal": causal}

    def run(
        kernel: Callable[..., None], specs: dict[str, Any], outputs: dict[str, Any], **more: Any
    ) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, **settings),
            grid=(batch, heads, count, count),
            in_specs=[specs[name] for name in names],
            out_specs=[specs[name] for name in outputs],
            out_shape=list(outputs.values()),
            compiler_params=_parallel(2),
            interpret=interpret,
            **more,
        )(*arrays)

    d_query, d_bias = run(
        _query_kernel,
        _specs(tile, dim, length),
        {
            "q": jax.ShapeDtypeStruct(query.shape, query.dtype),
            "d_bias": jax.ShapeDtypeStruct((batch, heads, _ROWS, 2 * length), jnp.float32),
        },
        scratch_shapes=[pltpu.VMEM((tile, dim), jnp.float32)],
        cost_estimate=_cost(query, 3),
        name="relative_attention_dq",
    )
    key_specs = _specs(tile, dim, length, by_key=True)
    key_specs["v"] = key_specs["k"]
    d_key, d_value = run(
        _key_kernel,
        key_specs,
        {
            "k": jax.ShapeDtypeStruct(key.shape, key.dtype),
            "v": jax.ShapeDtypeStruct(value.shape, value.dtype),
        },
        scratch_shapes=[pltpu.VMEM((tile, dim), jnp.float32)] * 2,
        cost_estimate=_cost(query, 4),
        name="relative_attention_dkv",
    )
    d_by_distance = jnp.sum(d_bias[:, :, 0], axis=0).astype(by_distance.dtype)
    return d_query, d_key, d_value, d_by_distance, None, None


attend.defvjp(_forward, _backward)


def _forward_kernel(
    q: Any, k: Any, v: Any, bias: Any, q_segments: Any, k_segments: Any, out: Any, out_sums: Any,
    highest: Any, total: Any, summed: Any, *, tile: int, length: int, causal: bool,
) -> None:  # fmt: skip
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _() -> None:
        highest[...] = jnp.full_like(highest, 2 * HIDDEN)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(_visible(i, j, causal))
    def _() -> None:
        logits = _logits(q, k, bias, q_segments, k_segments, i, j, tile, length, causal)
        before = highest[:, :1]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - now)
        kept = jnp.exp(before - now)
        total[...] = jnp.broadcast_to(
            kept * total[:, :1] + jnp.sum(weights, axis=1, keepdims=True), total.shape
        )
        highest[...] = jnp.broadcast_to(now, highest.shape)
        summed[...] = kept * summed[...] + _dot(weights.astype(v.dtype), v[0, 0])

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        out[0, 0] = (summed[...] / total[:, :1]).astype(out.dtype)
        out_sums[0, 0] = (highest[...] + jnp.log(total[...])).T[:_ROWS]


def _query_kernel(
    q: Any, k: Any, v: Any, bias: Any, q_segments: Any, k_segments: Any, gradient: Any, sums: Any,
    means: Any, d_query: Any, d_bias: Any, summed: Any, *, tile: int, length: int, causal: bool,
) -> None:  # fmt: skip
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when((i == 0) & (j == 0))
    def _() -> None:
        d_bias[...] = jnp.zeros_like(d_bias)

    @pl.when(j == 0)
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)

    @pl.when(_visible(i, j, causal))
    def _() -> None:
        logits = _logits(q, k, bias, q_segments, k_segments, i, j, tile, length, causal)
        _, d_logits = _weights(logits, v, gradient, sums, means)
        summed[...] += _dot(d_logits.astype(k.dtype), k[0, 0])
        place = pl.ds(pl.multiple_of((j - i) * tile + length - tile, LANES), 2 * tile)
        d_bias[0, 0, :, place] += jnp.broadcast_to(_diagonals(d_logits), (_ROWS, 2 * tile))

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        d_query[0, 0] = summed[...].astype(d_query.dtype)


def _key_kernel(
    q: Any, k: Any, v: Any, bias: Any, q_segments: Any, k_segments: Any, gradient: Any, sums: Any,
    means: Any, d_key: Any, d_value: Any, summed: Any, summed_value: Any, *, tile: int, length: int,
    causal: bool,
) -> None:  # fmt: skip
    j, i = pl.program_id(2), pl.program_id(3)  # keys without, queries within

    @pl.when(i == 0)
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)
        summed_value[...] = jnp.zeros_like(summed_value)

    @pl.when(_visible(i, j, causal))
    def _() -> None:
        logits = _logits(q, k, bias, q_segments, k_segments, i, j, tile, length, causal)
        weights, d_logits = _weights(logits, v, gradient, sums, means)
        summed[...] += _dot(d_logits.astype(q.dtype), q[0, 0], over_rows=True)
        summed_value[...] += _dot(weights.astype(v.dtype), gradient[0, 0], over_rows=True)

    @pl.when(i == pl.num_programs(3) - 1)
    def _() -> None:
        d_key[0, 0] = summed[...].astype(d_key.dtype)
        d_value[0, 0] = summed_value[...].astype(d_value.dtype)


def _logits(
    q: Any, k: Any, bias: Any, q_segments: Any, k_segments: Any, i: Any, j: Any, tile: int,
    length: int, causal: bool,
) -> Array:  # fmt: skip
    """A tile's logits, float32 `[t, t]`."""
    # Line r, column c want place (j t + c) - (i t + r) + l - 1; the row begins t - 1 before r = 0.
    place = pl.ds(pl.multiple_of((j - i) * tile + length - tile, LANES), 2 * tile)
    toeplitz = _toeplitz(bias[0, :, place])
    logits = _dot(q[0, 0], k[0, 0], over_columns=True) + toeplitz
    own, others = q_segments[0, :, :1], k_segments[0, :1, :]
    visible = own == others
    if causal:
        lines = jax.lax.broadcasted_iota(jnp.int32, (tile, tile), 0) + i * tile
        columns = jax.lax.broadcasted_iota(jnp.int32, (tile, tile), 1) + j * tile
        visible &= columns <= lines
    return jnp.where(visible, logits, HIDDEN)


def _weights(logits: Array, v: Any, gradient: Any, sums: Any, means: Any) -> tuple[Array, Array]:
    """A tile's weights and its logits' gradient, from what the forward pass kept."""
    weights = jnp.exp(logits - sums[0, 0].T[:, :1])
    d_weights = _dot(gradient[0, 0], v[0, 0], over_columns=True)
    d_logits = weights * (d_weights - means[0, 0].T[:, :1])
    return weights, jnp.where(logits <= HIDDEN, 0.0, d_logits)


def _toeplitz(rows: Array) -> Array:
    """A tile `[t, t]` from one row of numbers `[8, 2 t]`, which is there once a line.

    Line r has gone on by r places: of so many lines as there are, the next as many are the same,
    rolled by their number. (One roll with a stride would do, but not on a v4.)
    """
    size = rows.shape[1] // 2
    lines = pltpu.roll(rows, size + 1, 1)
    number = jax.lax.broadcasted_iota(jnp.int32, lines.shape, 0)
    for bit in (1, 2, 4):
        lines = jnp.where(number & bit != 0, pltpu.roll(lines, bit, 1), lines)
    while len(lines) < size:
        lines = jnp.concatenate([lines, pltpu.roll(lines, len(lines), 1)], axis=0)
    return lines[:, :size]


def _diagonals(tile: Array) -> Array:
    """Sums of a tile's diagonals `[1, 2 t]`, where `_logits` read what they are gradients of.

    Line r goes back by r places: the lower half of the lines by half of them, and is added to the
    upper half, which goes on alike.
    """
    size = len(tile)
    lines = jnp.concatenate([tile, jnp.zeros_like(tile)], axis=1)
    while len(lines) > 1:
        half = len(lines) // 2
        lines = lines[:half] + pltpu.roll(lines[half:], 2 * size - half, 1)
    return pltpu.roll(lines, size - 1, 1)


def _visible(i: Any, j: Any, causal: bool) -> Any:
    """Whether any query of tile i sees any key of tile j, as far as causality goes."""
    return j <= i if causal else True


def _dot(x: Array, y: Array, over_columns: bool = False, over_rows: bool = False) -> Array:
    """`x y`, `x y^T` or `x^T y`, float32."""
    axes = ((0,), (0,)) if over_rows else ((1,), (1,)) if over_columns else ((1,), (0,))
    # Products of float32 are of float32: a TPU's are of bfloat16 otherwise.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _specs(tile: int, dim: int, length: int, by_key: bool = False) -> dict[str, Any]:
    """Blocks of the arrays, by what they are of; `by_key`: the grid's third axis is of keys."""

    def spec(shape: tuple[int, ...], place: Callable[[Any, Any, Any, Any], tuple]) -> Any:
        def index(b: Any, h: Any, x: Any, y: Any) -> tuple:
            return place(b, h, y, x) if by_key else place(b, h, x, y)

        return pl.BlockSpec(shape, index)

    return {
        "q": spec((1, 1, tile, dim), lambda b, h, i, j: (b, h, i, 0)),
        "k": spec((1, 1, tile, dim), lambda b, h, i, j: (b, h, j, 0)),
        "bias": spec((1, _ROWS, 2 * length), lambda b, h, i, j: (h, 0, 0)),
        "q_segments": spec((1, tile, LANES), lambda b, h, i, j: (b, i, 0)),
        "k_segments": spec((1, _ROWS, tile), lambda b, h, i, j: (b, 0, j)),
        "q_sums": spec((1, 1, _ROWS, tile), lambda b, h, i, j: (b, h, 0, i)),
        "d_bias": spec((1, 1, _ROWS, 2 * length), lambda b, h, i, j: (b, h, 0, 0)),
    }


def _rows(by_distance: Array, query_segments: Array, key_segments: Array) -> tuple[Array, ...]:
    """Rows of numbers as the chip's registers have them: repeated along an axis of its own."""
    heads, places = by_distance.shape
    batch, length = query_segments.shape
    return (
        jnp.broadcast_to(by_distance.astype(jnp.float32)[:, None], (heads, _ROWS, places)),
        jnp.broadcast_to(query_segments[:, :, None], (batch, length, LANES)),
        jnp.broadcast_to(key_segments[:, None], (batch, _ROWS, length)),
    )


def _tile(length: int) -> int:
    return next(tile for tile in _TILES if length % tile == 0)


def _parallel(axes: int) -> Any:
    kinds = ("parallel",) * axes + ("arbitrary",) * (4 - axes)
    return pltpu.CompilerParams(dimension_semantics=kinds)


def _cost(query: Array, products: int) -> pl.CostEstimate:
    batch, heads, length, dim = query.shape
    pairs = batch * heads * length * length
    return pl.CostEstimate(
        flops=2 * products * pairs * dim,
        bytes_accessed=4 * query.size * query.dtype.itemsize,
        transcendentals=pairs,
    )
