"""`x w + (x a) b` as one product of matrices, for TPUs.

Multiplied apart, the second product reads and writes all of what the first has written, and takes
as long as the first where the model is narrow: a TPU multiplies 128 numbers at a time, and a rank
of 8 fills a sixteenth of that. With `x a` beside x and b under w, the sum is one product over
inputs and rank, which XLA:TPU makes without writing either pair; it rounds the sum once and not
each part. Gradients with respect to x are joined alike. The product is joined where the weight has
one axis of inputs, the gradient where it has one of outputs: else there are two products, as for
attention's output and for the gradient of its queries, which are over heads and their sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import jax
import jax.numpy as jnp

from t5x_lite import sharding
from t5x_lite.types import Array

_FEATURES: Final = ("activation_embed", "heads", "kv", "mlp", "vocab")  # axes of activations


def pays(x: Array, in_axes: int) -> bool:
    """Whether to join, for x of `[..., length, *in]`: on TPUs, features whole, length above 1.

    Where features are split, as over `model`, x would have to be gathered to get `x a` beside it. A
    product with single tokens, as decoding makes, takes as long as reading w, which would be
    written anew first.
    """
    length = max(x.shape[: x.ndim - in_axes][-1:], default=1)
    return sharding.platform() == "tpu" and length > 1 and not sharding.splits(*_FEATURES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(in_axes: int, x: Array, w: Array, a: Array, b: Array) -> Array:
    """`[..., *out]` of `x [..., *in]`, `w [*in, *out]`, `a [*in, rank]` and `b [rank, *out]`.

    All of one dtype. The gradient with respect to w is left out of programs that don't ask for it.
    Without forward-mode derivatives (`jax.jvp`), other than of its gradient.
    """
    return _forward(in_axes, x, w, a, b)[0]


def _forward(
    in_axes: int, x: Array, w: Array, a: Array, b: Array
) -> tuple[Array, tuple[Array, ...]]:
    inputs, last = range(in_axes), range(x.ndim - in_axes, x.ndim)
    low = _dot(x, a, last, inputs)
    if in_axes == 1:
        y = _dot(_beside(x, low), _together(w, b, 0), last, inputs)
    else:
        y = _dot(x, w, last, inputs) + _dot(low, b, (low.ndim - 1,), (0,))
    return y, (x, low, w, a, b)


def _backward(in_axes: int, kept: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    x, low, w, a, b = kept
    out_axes = w.ndim - in_axes
    lead, last = range(g.ndim - out_axes), range(g.ndim - out_axes, g.ndim)
    outputs = range(in_axes, w.ndim)
    low_g = _dot(g, b, last, range(1, b.ndim))
    if out_axes == 1:
        x_g = _dot(_beside(g, low_g), _together(w, a, in_axes), last, outputs)
    else:
        x_g = _dot(g, w, last, outputs) + _dot(low_g, a, (low_g.ndim - 1,), (in_axes,))
    return x_g, _dot(x, g, lead, lead), _dot(x, low_g, lead, lead), _dot(low, g, lead, lead)


project.defvjp(_forward, _backward)


def _beside(x: Array, low: Array) -> Array:
    return jnp.concatenate([x, low], axis=-1)


def _together(w: Array, low: Array, axis: int) -> Array:
    # Gathered first, as for any product with it: parts joined while split would have to move.
    return jnp.concatenate([sharding.whole(part, axis) for part in (w, low)], axis=axis)


def _dot(x: Array, y: Array, over_x: Sequence[int], over_y: Sequence[int]) -> Array:
    return jax.lax.dot_general(x, y, ((tuple(over_x), tuple(over_y)), ((), ())))
