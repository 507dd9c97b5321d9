"""Adafactor in T5's flavour: second moments in the memory of their row and column means.

Shazeer & Stern 2018 (arXiv:1804.04235), with what T5X's version added: a parameter's logical axis
names say which of its dimensions are a row, a column or a batch, so that a stack of layers is
updated as each layer alone would be, and split heads as the joined matrix would be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import trees
from t5x_lite.train.schedules import Schedule, learning_rate_at
from t5x_lite.types import Array, Params

BATCH_AXES = frozenset({"layers"})  # every index of it is a parameter of its own
COLUMN_AXES = frozenset({"embed"})  # what is neither is part of the row


class AdafactorState(NamedTuple):
    """Step count and, in trees like the parameters, the running second moments (and first).

    Means are kept with dimensions of size 1 where they were taken, so that a leaf is sharded like
    its parameter but for those dimensions. A parameter that isn't factored has its full second
    moment in `v_row`, and in `v_col` 1 in place of every dimension.
    """

    count: Array  # int32 []
    v_row: Params  # float32, mean over the column's dimensions
    v_col: Params  # float32, mean over the row's dimensions
    momentum: Params | None


@dataclass(frozen=True)
class Factoring:
    """Which dimensions of one parameter are its rows, its columns, and neither (batches).

    `Factoring.of(("layers", "embed", "heads", "kv"), (8, 512, 6, 64))` has rows (2, 3), columns
    (1,), and batches (0,). Without rows and columns, second moments are kept in full.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batches: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, axes: Sequence[str | None], shape: Sequence[int], min_size: int = 128) -> Factoring:
        """The factoring of a parameter of `shape` whose dimensions are named `axes`.

        Unless names give both a row and a column, the last dimension is the column. Factored only
        if rows and columns both count at least `min_size` (128: T5X's; below it nothing is saved).
        """
        if len(axes) != len(shape):
            raise ValueError(f"axes {tuple(axes)} don't name the dimensions of {tuple(shape)}")
        batches = tuple(i for i, name in enumerate(axes) if name in BATCH_AXES)
        inner = tuple(i for i in range(len(shape)) if i not in batches)
        columns = tuple(i for i in inner if axes[i] in COLUMN_AXES)
        if not 0 < len(columns) < len(inner):
            columns = inner[-1:]
        rows = tuple(i for i in inner if i not in columns)
        if min(math.prod(shape[i] for i in rows), math.prod(shape[i] for i in columns)) < min_size:
            rows = columns = ()
        return cls(rows, columns, batches, len(shape))

    @property
    def factored(self) -> bool:
        return bool(self.rows)

    def mean(self, x: Array) -> Array:
        """Mean within each batch, dimensions kept."""
        return _mean(x, tuple(i for i in range(self.rank) if i not in self.batches))


def adafactor(
    learning_rate: Schedule | float,
    axes: Params,
    *,
    min_parameter_scale: float | None = 1e-3,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    beta1: float | None = None,
    momentum_dtype: Any = jnp.float32,
    epsilon: float = 1e-30,
    min_dim_size_to_factor: int = 128,
    weight_decay_rate: float = 0.0,
    decay_mask: Params | None = None,
) -> optax.GradientTransformation:
    """Adafactor as an optax transformation; its update already holds -learning_rate.

    For step t = 1, 2, ..., gradient G and parameter X (algorithm 4 of the paper, per layer):

        V_t = b V_{t-1} + (1 - b) (G^2 + epsilon)      b = 1 - t^-decay_rate
        U   = G / sqrt(V_t)                            V_t = R C / mean(R) if factored: R and C are
                                                       the means of V_t over columns and over rows
        U   = U / max(1, RMS(U) / clipping_threshold)
        X  -= learning_rate max(min_parameter_scale, RMS(X)) U + weight_decay_rate X

    Args:
      learning_rate: relative to a parameter's RMS; T5 pretrains with 1 / sqrt(max(t, 10^4)).
      axes: a tree like the parameters whose leaves are tuples of logical axis names, one name a
        dimension (it may hold more paths than the parameters).
      min_parameter_scale: None: the learning rate is absolute.
      decay_rate: of the second moments, as above.
      clipping_threshold: the largest RMS of an update; None: no clipping.
      beta1: decay of a first moment of the updates, kept in `momentum_dtype`; None: none kept.
      epsilon: added to the squared gradient.
      min_dim_size_to_factor: see `Factoring.of`.
      weight_decay_rate: the fraction of a parameter removed at each step. As in T5X it isn't
        multiplied by the learning rate.
      decay_mask: a tree like `axes` of booleans, which parameters decay; None: all of them.
    """
    names = trees.flatten(axes, is_leaf=is_axes)
    decays = dict.fromkeys(names, True) if decay_mask is None else trees.flatten(decay_mask)

    def factorings(params: Params) -> list[Factoring]:
        flat = trees.flatten(params)
        if missing := [path for path in flat if path not in names]:
            raise ValueError(f"adafactor was given no axes for the parameter '{missing[0]}'")
        return [
            Factoring.of(names[path], x.shape, min_dim_size_to_factor) for path, x in flat.items()
        ]

    def init(params: Params) -> AdafactorState:
        leaves, structure = jax.tree.flatten(params)
        plans = factorings(params)

        def zeros(reduced: list[tuple[int, ...]]) -> Params:
            return structure.unflatten(
                jnp.zeros([1 if i in dims else n for i, n in enumerate(x.shape)], jnp.float32)
                for x, dims in zip(leaves, reduced, strict=True)
            )

        return AdafactorState(
            count=jnp.zeros((), jnp.int32),
            v_row=zeros([plan.columns for plan in plans]),
            v_col=zeros(
                [plan.rows if plan.factored else tuple(range(plan.rank)) for plan in plans]
            ),
            momentum=None
            if beta1 is None
            else jax.tree.map(lambda x: jnp.zeros(x.shape, momentum_dtype), params),
        )

    def update(
        gradients: Params, state: AdafactorState, params: Params | None = None
    ) -> tuple[Params, AdafactorState]:
        if params is None:
            raise ValueError(
                "adafactor needs the parameters: call update(gradients, state, params)"
            )
        rate = learning_rate_at(learning_rate, state.count)
        mixing = (state.count.astype(jnp.float32) + 1.0) ** -decay_rate
        decay = 1.0 - mixing

        def one(
            plan: Factoring, path: str, g: Array, x: Array, v_row: Array, v_col: Array, m: Any
        ) -> tuple:
            # The three sums of squares are written as three different products, and the full-size
            # update appears once: then XLA on CPU fuses each into one loop over the gradient,
            # where a shared `square(g)` or `u` would be stored. Measured on [32128, 512]: 18
            # instead of 36 ms, and no temporary instead of 63 MiB.
            g = g.astype(jnp.float32)
            if plan.factored:
                row_mean = _mean(g * g, plan.columns) + epsilon
                column_mean = _mean(mixing * g * g, plan.rows) + mixing * epsilon
                v_row = decay * v_row + mixing * row_mean
                v_col = decay * v_col + column_mean
                inverse_row, inverse_col = _mean(v_row, plan.rows) / v_row, 1.0 / v_col
                u = g * jnp.sqrt(inverse_row) * jnp.sqrt(inverse_col)
                mean_square = plan.mean(inverse_row * _mean(inverse_col * g * g, plan.columns))
            else:
                v_row = decay * v_row + mixing * (jnp.square(g) + epsilon)
                u = g * jax.lax.rsqrt(v_row)
                mean_square = plan.mean(jnp.square(u))
            # One factor per layer: everything that multiplies the update, multiplied once.
            factor = -rate
            if clipping_threshold is not None:
                factor = factor / jnp.maximum(1.0, jnp.sqrt(mean_square) / clipping_threshold)
            if min_parameter_scale is not None:
                rms = jnp.sqrt(plan.mean(jnp.square(x.astype(jnp.float32))))
                factor = factor * jnp.maximum(min_parameter_scale, rms)
            u = u * factor
            if m is not None:
                assert beta1 is not None
                u = beta1 * m.astype(jnp.float32) + (1.0 - beta1) * u
                m = u.astype(momentum_dtype)
            if weight_decay_rate and decays[path]:
                u = u - weight_decay_rate * x.astype(jnp.float32)
            return u, v_row, v_col, m

        structure = jax.tree.structure(gradients)
        momentum = [None] * structure.num_leaves
        columns = [
            factorings(params),
            list(trees.flatten(params)),
            *(jax.tree.leaves(t) for t in (gradients, params, state.v_row, state.v_col)),
            momentum if state.momentum is None else jax.tree.leaves(state.momentum),
        ]
        results = [one(*row) for row in zip(*columns, strict=True)]
        updates, v_row, v_col, momentum = (
            structure.unflatten(leaf)
            for leaf in (zip(*results, strict=True) if results else [()] * 4)
        )
        return updates, AdafactorState(
            state.count + 1, v_row, v_col, None if state.momentum is None else momentum
        )

    return optax.GradientTransformation(init, update)


def is_axes(node: Any) -> bool:
    """Whether `node` is a leaf of an axes tree: a tuple of names, such as ("embed", "mlp")."""
    return type(node) is tuple and all(name is None or isinstance(name, str) for name in node)


def _mean(x: Array, dims: tuple[int, ...]) -> Array:
    return jnp.mean(x, axis=dims, keepdims=True)
