"""The only readers of parameters: projections, lookups, tied logits and vectors.

A weight is an array, or a `StructuredWeight`: a small pytree node (a low-rank update beside its
base, a quantised kernel) that knows how to be multiplied by. Layers call the functions here and
never look inside, so a fine-tuning transform swaps leaves and no layer changes.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_lite.devices import fetched
from t5x_lite.types import Array, InputError

# Rematerialisation policies know what a weight was multiplied to by this name.
PROJECTED = "projected"


class StructuredWeight(abc.ABC):
    """A parameter that is more than one array. Subclasses are pytrees.

    In a stack their arrays have a leading layer axis, which the loop over layers takes off.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the parameter that it stands for."""

    @abc.abstractmethod
    def dense(self) -> Array:
        """The same weight as one array in its base's dtype; for merging, never in a step."""

    @abc.abstractmethod
    def project(self, x: Array, in_axes: int) -> Array:
        """`x [..., in] -> [..., out]`; see `project`."""

    def lookup(self, ids: Array, dtype: Any) -> Array:
        """Rows of an embedding; see `lookup`."""
        raise NotImplementedError(f"{type(self).__name__} is no embedding")

    def attend(self, x: Array) -> Array:
        """`x` against every row of an embedding; see `attend`."""
        raise NotImplementedError(f"{type(self).__name__} is no embedding")

    def vector(self) -> Array:
        """A bias or a scale; see `vector`."""
        raise NotImplementedError(f"{type(self).__name__} is no vector")

    def square_sums(self, in_axes: int) -> Array:
        """See `square_sums`."""
        raise InputError(
            f"a {type(self).__name__} weight has no norm to be decomposed by: in Compose, put DoRA "
            "behind what else adapts the same weight"
        )


def is_node(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is more than an array; for `trees.flatten`."""
    return isinstance(leaf, StructuredWeight)


def parameter(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...], dtype: Any
) -> Any:
    """The module's parameter, on the device: `module.param`, or a `StructuredWeight` for it.

    Linen compares the shapes of a parameter's leaves with what `init` makes; a node's own arrays
    may have any, and it says what it stands for.
    """
    if module.has_variable("params", name):
        found: Any = module.get_variable("params", name)
        if isinstance(found, StructuredWeight):
            where = "/".join((*module.path, name))
            assert found.shape == tuple(shape), (where, found.shape, shape)
            return fetched(found)
    return fetched(module.param(name, init, shape, dtype))


def dense(weight: Array | StructuredWeight) -> Array:
    """A weight as one array."""
    return weight.dense() if isinstance(weight, StructuredWeight) else weight


def vector(weight: Array | StructuredWeight) -> Array:
    """A bias or a norm's scale, `[*out]`."""
    return weight.vector() if isinstance(weight, StructuredWeight) else weight


def square_sums(weight: Array | StructuredWeight, in_axes: int) -> Array:
    """The sums over inputs of a kernel's squares: `[*in, *out] -> float32 [*out]`."""
    if isinstance(weight, StructuredWeight):
        return weight.square_sums(in_axes)
    rows = weight.astype(jnp.float32).reshape(math.prod(weight.shape[:in_axes]), -1)
    return jnp.sum(jnp.square(rows), axis=0).reshape(weight.shape[in_axes:])


def project(x: Array, kernel: Array | StructuredWeight, in_axes: int = 1) -> Array:
    """`x` times `kernel`, in `x`'s dtype.

    Args:
      x: `[..., *in]`, with `in_axes` trailing dimensions to contract.
      kernel: `[*in, *out]`.
      in_axes: how many leading dimensions of the kernel are inputs: 1 for a projection from the
        embedding, 2 for one from `[heads, kv]`.

    Returns:
      `[..., *out]`.
    """
    if isinstance(kernel, StructuredWeight):
        return kernel.project(x, in_axes)
    # Rows in one axis: a step of T5 1.1 tiny takes 22% less CPU time than with [batch, length], for
    # which XLA:CPU writes gradients transposed before it multiplies them. The kernel keeps its
    # axes: the loop over layers would keep a reshaped copy of it for the backward pass.
    lead, inputs = x.shape[: x.ndim - in_axes], x.shape[x.ndim - in_axes :]
    dimensions = (tuple(range(1, in_axes + 1)), tuple(range(in_axes))), ((), ())
    product = jax.lax.dot_general(x.reshape(-1, *inputs), kernel.astype(x.dtype), dimensions)
    return product.reshape(*lead, *product.shape[1:])


def lookup(ids: Array, embedding: Array | StructuredWeight, dtype: Any) -> Array:
    """Rows `ids [...]` of `embedding [vocab, embed]`, as `[..., embed]` of `dtype`.

    A gather, not a one-hot product: at T5 small's shapes the product alone costs a quarter of the
    step. Ids outside the vocabulary are the caller's error and give NaN.
    """
    if isinstance(embedding, StructuredWeight):
        return embedding.lookup(ids, dtype)
    return jnp.take(embedding, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)


def attend(x: Array, embedding: Array | StructuredWeight) -> Array:
    """Tied logits: `x [..., embed]` against `embedding [vocab, embed]`, as `[..., vocab]`."""
    if isinstance(embedding, StructuredWeight):
        return embedding.attend(x)
    return jax.lax.dot_general(x, embedding.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def prefix_rows(weight: Any) -> Array | None:
    """Rows `[prefix, kv heads, kv]` that attention reads ahead of what `weight` projects, if any.

    Prefix tuning's: a node on the kernels of keys and of values carries them.
    """
    return _carried(weight, "prefix")


def prompt_rows(weight: Any) -> Array | None:
    """Rows `[prompt, embed]` of an embedding behind its vocabulary's, if any: prompt tuning's."""
    return _carried(weight, "prompt")


def draws(weight: Any) -> bool:
    """Whether a weight draws random numbers when it is multiplied by: LoRA's dropout."""
    return _carried(weight, "key") is not None


def _carried(weight: Any, name: str) -> Array | None:
    """An array of that name in a weight, or in one that it stands around."""
    if not isinstance(weight, StructuredWeight):
        return None
    parts = vars(weight)
    if name in parts:
        found: Array = parts[name]
        return found
    inner = (_carried(part, name) for part in parts.values())
    return next((rows for rows in inner if rows is not None), None)
