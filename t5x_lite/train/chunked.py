"""A language model's loss with few of its logits at a time.

Logits `[b, l, v]` are a step's largest array: of T5 1.1 small on 8 x 512 -> 114, 112 MiB in
float32, and their gradient as much again. Here a row is read a few tokens at a time, and each
chunk's gradient is taken in the forward pass, while its logits are at hand. That the loss is a sum
makes it possible: what comes back in the backward pass is one number, which scales what was found.
So nothing is computed twice, as it would be if a checkpoint stood around each chunk.

Shapes: b batch, l length, c tokens of a chunk, e embed, v vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import sharding
from t5x_lite.types import Array, Params

Sums = dict[str, Array]
Read = Callable[[Params, Array], Array]  # (parameters, states [b, c, e]) -> logits [b, c, v]
Score = Callable[[Array, Array, Array], Sums]  # (logits, targets [b, c], weights [b, c]) -> sums


def chunk_length(rows: int, length: int, vocab: int, most_bytes: int) -> int:
    """How many tokens of every row are read at once, so that their float32 logits fit.

    Counted on one device, by the active partitioner. At least one; `length` where all fit.
    """
    local = sharding.local_size(("batch", None, "vocab"), (rows, length, vocab))
    chunks = min(length, math.ceil(4 * local / most_bytes))
    return math.ceil(length / max(chunks, 1))


def summed(
    read: Read,
    score: Score,
    params: Params,
    states: Array,
    targets: Array,
    weights: Array,
    chunk: int,
) -> Sums:
    """`score(read(params, states), targets, weights)`, of `chunk` tokens of each row at a time.

    Every sum must be one over tokens, and `sums["loss"]` is the only one with a gradient: in
    `states` and in what is differentiated of `params`; frozen parts of them cost nothing.

    Args:
      read, score: pure; they close over no arrays.
      states: `[b, l, e]`.
      targets, weights: `[b, l]`.
    """

    def parts(*arrays: Array) -> tuple[Array, ...]:
        """`[b, l, ...]` as `[chunks, b, c, ...]`; what is added at the end has no weight."""
        length = states.shape[1]
        chunks = math.ceil(length / chunk)

        def part(x: Array) -> Array:
            x = jnp.pad(x, [(0, 0), (0, chunks * chunk - length), *[(0, 0)] * (x.ndim - 2)])
            return jnp.swapaxes(x.reshape(len(x), chunks, chunk, *x.shape[2:]), 0, 1)

        return tuple(map(part, arrays))

    def zeros(params: Params, own: tuple[Array, ...]) -> Sums:
        shapes = jax.eval_shape(lambda: score(read(params, own[0][0]), own[1][0], own[2][0]))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    @jax.custom_vjp
    def total(params: Params, states: Array, targets: Array, weights: Array) -> Sums:
        def add(sums: Sums, part: tuple[Array, ...]) -> tuple[Sums, None]:
            x, wanted, weight = part
            return jax.tree.map(jnp.add, sums, score(read(params, x), wanted, weight)), None

        own = parts(states, targets, weights)
        return jax.lax.scan(add, zeros(params, own), own)[0]

    def forward(*primals: Any) -> tuple[Sums, tuple]:
        """The sums, and the gradient of their loss in what is differentiated."""
        leaves, treedef = jax.tree.flatten(primals[:2], is_leaf=_is_primal)
        varied = [leaf.perturbed for leaf in leaves]
        values = [leaf.value for leaf in leaves]
        (params, states), targets, weights = (
            treedef.unflatten(values),
            *(primal.value for primal in primals[2:]),
        )
        of_states = varied[-1]
        own = parts(states, targets, weights)

        def loss(chosen: list[Array], x: Array, wanted: Array, weight: Array) -> tuple[Array, Sums]:
            ours = iter(chosen)
            mixed = [
                next(ours) if v else value
                for v, value in zip(varied[:-1], values[:-1], strict=True)
            ]
            whole, _ = treedef.unflatten([*mixed, x])
            sums = score(read(whole, x), wanted, weight)
            return sums["loss"], sums

        chosen = [value for v, value in zip(varied[:-1], values[:-1], strict=True) if v]

        def add(carry: tuple, part: tuple[Array, ...]) -> tuple[tuple, Array | None]:
            sums, grads = carry
            arguments = (0, 1) if of_states else (0,)
            found, new = jax.grad(loss, argnums=arguments, has_aux=True)(chosen, *part)
            grads = [g + f.astype(g.dtype) for g, f in zip(grads, found[0], strict=True)]
            return (jax.tree.map(jnp.add, sums, new), grads), found[1] if of_states else None

        # Sums of many chunks: in float32, whatever the parameters are kept in.
        start = [jnp.zeros(value.shape, jnp.float32) for value in chosen]
        (sums, grads), by_chunk = jax.lax.scan(add, (zeros(params, own), start), own)
        grads = [g.astype(value.dtype) for g, value in zip(grads, chosen, strict=True)]
        d_states = None
        if of_states:
            whole = jnp.swapaxes(by_chunk, 0, 1).reshape(len(states), -1, *states.shape[2:])
            d_states = whole[:, : states.shape[1]]
        found_grads = iter(grads)
        every = [next(found_grads) if v else None for v in varied[:-1]]
        return sums, treedef.unflatten([*every, d_states])

    def backward(kept: tuple, cotangents: Any) -> tuple:
        scale = cotangents["loss"]
        if isinstance(scale, jax.custom_derivatives.SymbolicZero):
            return None, None, None, None
        d_params, d_states = jax.tree.map(lambda g: g * scale.astype(g.dtype), kept)
        return d_params, d_states, None, None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(params, states, targets, weights)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
