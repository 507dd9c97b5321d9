"""Many LoRA adapters in one batch: row i goes through the adapter that `ids[i]` names.

    adapted = [math.apply(its_tree, base), code.apply(its_tree, base)]
    model.apply({"params": together(base, adapted, ids=[1, 0, -1])}, three_rows)

The base is held once and multiplied by once for all rows. Each row reads its own factors: a
projection costs `2 rank (inputs + outputs)` FLOPs a token, as with LoRA alone, and reads
`rows * rank * (inputs + outputs)` numbers, where one adapter for all would read `rows` times fewer.
At rank 8 that is the weight's own size for a batch of `width / 16` rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.peft import targets
from t5x_lite.peft.leaves import LowRank
from t5x_lite.types import Array, InputError, Params

NONE = -1  # the id of rows without an adapter


@flax.struct.dataclass
class ManyLowRank(weights.StructuredWeight):
    """`w + scales[i] * a[i] b[i]`, with i = `ids[row]`, never formed; `w` alone where i is -1.

    In a stack all have a leading layer axis. Rows are the first axis of what it is multiplied by.
    """

    w: Array | weights.StructuredWeight  # [*in, *out]
    a: Array  # [n, *in, rank]
    b: Array  # [n, rank, *out]
    scales: Array  # float32 [n]
    ids: Array  # int32 [rows]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def project(self, x: Array, in_axes: int) -> Array:
        y = weights.project(x, self.w, in_axes)
        a, b, scale = self._of_rows(x.dtype)
        rows, rank = len(self.ids), a.shape[-1]
        inputs = math.prod(x.shape[x.ndim - in_axes :])
        low = _times(x.reshape(rows, -1, inputs), a.reshape(rows, inputs, rank))
        up = _times(low, b.reshape(rows, rank, -1)) * scale
        return y + up.reshape(y.shape)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        y = weights.lookup(ids, self.w, dtype)
        _, b, scale = self._of_rows(dtype)
        rows = len(self.ids)
        own = jnp.maximum(self.ids, 0)[:, None]
        low = self.a[own, ids.reshape(rows, -1)].astype(dtype)
        return y + (_times(low, b) * scale).reshape(y.shape)

    def attend(self, x: Array) -> Array:
        y = weights.attend(x, self.w)
        a, b, scale = self._of_rows(x.dtype)
        rows = len(self.ids)
        low = _times(x.reshape(rows, -1, x.shape[-1]), jnp.swapaxes(b, 1, 2)) * scale
        return y + _times(low, jnp.swapaxes(a, 1, 2)).reshape(y.shape)

    def dense(self) -> Array:
        raise NotImplementedError("many adapters are many weights: merge one of them")

    def _of_rows(self, dtype: Any) -> tuple[Array, Array, Array]:
        """Each row's a `[rows, *in, rank]`, b `[rows, rank, *out]` and scale `[rows, 1, 1]`."""
        own = jnp.maximum(self.ids, 0)
        scale = jnp.where(self.ids < 0, 0.0, self.scales[own])
        return (
            self.a[own].astype(dtype),
            self.b[own].astype(dtype),
            scale.astype(dtype)[:, None, None],
        )


def together(base: Params, others: Sequence[Params], ids: Array) -> Params:
    """Parameters of one base with several LoRA adapters, for rows of these `ids`.

    Ranks are filled up with zeros to each weight's largest; an adapter may lack weights that others
    adapt.

    Args:
      base: the parameters without an adapter.
      others: for each adapter what its `apply` made of these very arrays.
      ids: int32 `[rows]`, numbers of `others`; -1: the base alone. `select` puts others there.

    Raises InputError for an adapter of another kind, on another base, or of a table that no row of
    the batch looks up by itself (relative biases, positions).
    """
    flat = trees.flatten(base, is_leaf=weights.is_node)
    found: dict[str, dict[int, LowRank]] = {}
    for number, params in enumerate(others):
        try:
            updates = low_ranks(base, params)
        except InputError as error:
            raise InputError(f"adapter {number} can't share a batch: {error}") from error
        for path, low in updates.items():
            found.setdefault(path, {})[number] = low
    for path, by_number in found.items():
        flat[path] = _joined(path, flat[path], by_number, len(others))
    return select(trees.unflatten(flat), ids)


def low_ranks(base: Params, adapted: Params) -> dict[str, LowRank]:
    """By path, what an adapter made of a base's weights.

    Raises InputError unless `adapted` has the base's very arrays, as they are or below low-rank
    updates, and each row of a batch reads those for itself.
    """
    flat = trees.flatten(base, is_leaf=weights.is_node)
    theirs = trees.flatten(adapted, is_leaf=weights.is_node)
    found = {}
    for path in dict.fromkeys((*theirs, *flat)):
        leaf, under = theirs.get(path), flat.get(path)
        if isinstance(leaf, LowRank) and _same(leaf.w, under):
            if path.endswith(("relative_bias/embedding", "position_embedding/embedding")):
                raise InputError(f"it adapts '{path}', which all rows share; train one without it")
            found[path] = leaf
        elif not _same(leaf, under):
            raise InputError(
                f"it makes of '{path}' something else than the same base with a low-rank update"
            )
    return found


def select(params: Params, ids: Array) -> Params:
    """The same parameters for rows of other adapters; those without adapters are left alone.

    Traceable, and of layers that are stacked or apart.
    """
    ids = jnp.asarray(ids, jnp.int32)

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, ManyLowRank):
            return leaf
        stack = leaf.scales.shape[:-1]
        return dataclasses.replace(leaf, ids=jnp.broadcast_to(ids, (*stack, *ids.shape)))

    return jax.tree.map(put, params, is_leaf=weights.is_node)


def count(params: Params) -> int:
    """How many adapters share the parameters."""
    nodes = jax.tree.leaves(params, is_leaf=weights.is_node)
    return max((n.scales.shape[-1] for n in nodes if isinstance(n, ManyLowRank)), default=0)


def _joined(path: str, w: Any, by_number: dict[int, LowRank], total: int) -> ManyLowRank:
    layers = 1 if targets.stacked(path) else 0
    rank = max(low.a.shape[-1] for low in by_number.values())
    some = next(iter(by_number.values()))

    def padded(leaf: Array, axis: int) -> Array:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, rank - leaf.shape[axis])
        return jnp.pad(leaf, widths)

    a, b, scales = [], [], []
    for number in range(total):
        low = by_number.get(number)
        own = some if low is None else low
        a.append(padded(own.a, own.a.ndim - 1))
        b.append(padded(own.b, layers))
        scales.append(0.0 if low is None else own.scale)
    stack = some.a.shape[:layers]
    return ManyLowRank(
        w=w,
        a=jnp.stack(a, axis=layers),
        b=jnp.stack(b, axis=layers),
        scales=jnp.broadcast_to(jnp.asarray(scales, jnp.float32), (*stack, total)),
        ids=jnp.full((*stack, 1), NONE, jnp.int32),
    )


def _times(x: Array, matrices: Array) -> Array:
    """`[rows, l, i]` times each row's own `[rows, i, o]`."""
    return jnp.einsum("rli,rio->rlo", x, matrices)


def _same(leaf: Any, other: Any) -> bool:
    """Whether two leaves hold the very same arrays."""
    mine, theirs = jax.tree.leaves(leaf), jax.tree.leaves(other)
    return len(mine) == len(theirs) and all(x is y for x, y in zip(mine, theirs, strict=True))
