"""Leaves that stand where a weight stood: what fine-tuning adds, beside the frozen base."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp

from t5x_lite.models import weights
from t5x_lite.types import Array


@flax.struct.dataclass
class LowRank(weights.StructuredWeight):
    """`w + scale * a b` that is never formed: `x w + scale * (x a) b` (Hu et al. 2021, 4.1).

    With a leading layer axis on all three inside a stack, which the loop over layers takes off.
    Forming the sum in the forward pass would cost as much as full fine-tuning: its gradient is of
    the weight's size.
    """

    w: Array | weights.StructuredWeight  # [*in, *out], frozen
    a: Array  # [*in, rank]
    b: Array  # [rank, *out]
    scale: float = flax.struct.field(pytree_node=False)

    def project(self, x: Array, in_axes: int) -> Array:
        update = weights.project(weights.project(x, self.a, in_axes), self.b)
        return weights.project(x, self.w, in_axes) + self._scaled(update)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        update = weights.project(weights.lookup(ids, self.a, dtype), self.b)
        return weights.lookup(ids, self.w, dtype) + self._scaled(update)

    def attend(self, x: Array) -> Array:
        update = weights.attend(weights.attend(x, self.b), self.a)
        return weights.attend(x, self.w) + self._scaled(update)

    def _scaled(self, update: Array) -> Array:
        return update * jnp.asarray(self.scale, update.dtype)
