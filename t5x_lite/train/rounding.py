"""Parameters in bfloat16 that still learn: how a float32 update gets into eight bits.

A bfloat16 number and the next are 2^-8 to 2^-7 of it apart, and what an optimizer adds is mostly
less than half of that: rounded to the nearest, nothing is added, however often. Two ways out:

- "stochastic": up or down at random, as often as the sum is near to either, so that its mean is
  right (Gupta et al. 2015, arXiv:1502.02551). Costs random numbers and no memory.
- "compensated": what rounding took away is kept, in bfloat16 too, and added to the next update
  (Kahan 1965; for this use Zamirai et al. 2020, arXiv:2010.06192). Costs two bytes a parameter.

In both, and in "nearest", an optimizer sees parameters and gradients as float32 and keeps its
state in float32: a second moment in bfloat16 would stand still as its parameter does.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import trees
from t5x_lite.peft import targets
from t5x_lite.types import Array, InputError, Params

Rounding = Literal["nearest", "stochastic", "compensated"]
ROUNDINGS: Final = ("nearest", "stochastic", "compensated")


class Compensated(NamedTuple):
    """An optimizer's state, and what its parameters in bfloat16 lack of their float32 sums."""

    optimizer: optax.OptState
    compensation: Params  # a tree of those parameters alone, bfloat16


def rounded(
    optimizer: optax.GradientTransformation, rounding: Rounding | None, name: str
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, whose updates `optax.apply_updates` puts into bfloat16 by `rounding`.

    Parameters in float32 are updated as ever, and get no compensation. With "stochastic",
    `update` takes `key`, by which a parameter's path draws its own numbers: the same on any mesh.
    For a parameter that falls below 2^-16 of what it was, float32's sum is the coarser rounding.

    Args:
      optimizer: of float32.
      rounding: None: all parameters are float32.
      name: the setting's, for errors, such as "AdamW.rounding".

    `init` raises InputError for bfloat16 parameters if `rounding` is None: none was chosen.
    """

    def init(params: Params) -> optax.OptState:
        held = _in_bfloat16(params)
        if held and rounding is None:
            raise InputError(
                f"the model's parameters are bfloat16 ({next(iter(held))} for one), in which most "
                f"updates are lost: set {name} to 'stochastic' or 'compensated' ('nearest' loses "
                "them), or ModelConfig.param_dtype to 'float32'"
            )
        state = optimizer.init(_float32(params))
        if rounding != "compensated":
            return state
        zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in held.items()}
        return Compensated(state, trees.unflatten(zeros))

    def update(
        gradients: Params,
        state: optax.OptState,
        params: Params | None = None,
        *,
        key: Array | None = None,
        **unused: object,
    ) -> tuple[Params, optax.OptState]:
        del unused  # other extra arguments of a chain
        inner = state.optimizer if isinstance(state, Compensated) else state
        wide = _float32(params)
        updates, inner = optimizer.update(_float32(gradients), inner, wide)
        held = _in_bfloat16(params)
        if not isinstance(state, Compensated):
            if rounding == "stochastic" and held:
                if key is None:
                    raise ValueError("stochastic rounding: call update(..., key=key)")
                updates = trees.map_with_path(
                    lambda path, update, x: (
                        _to_random(x, update, targets.key_of(key, path)) if path in held else update
                    ),
                    updates,
                    wide,
                )
            return updates, inner
        lacking = trees.flatten(state.compensation)
        updates = trees.map_with_path(
            lambda path, update: update + lacking[path] if path in held else update, updates
        )
        wide_flat, flat = trees.flatten(wide), trees.flatten(updates)
        compensation = {path: _lost(wide_flat[path], flat[path]) for path in held}
        return updates, Compensated(inner, trees.unflatten(compensation))

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic(x: Array, key: Array) -> Array:
    """float32 `x` as bfloat16, up or down at random, so that the mean over keys is `x`.

    16 random bits are added below the bits that stay: their carry is as likely as the bits cut
    off are large. Numbers that bfloat16 has stay as they are, and so do infinities and NaN; what
    is above its largest becomes that or infinity.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    chosen = jax.lax.bitcast_convert_type(cut, jnp.float32)
    return jnp.where(jnp.isfinite(x), chosen, x).astype(jnp.bfloat16)


def _to_random(x: Array, update: Array, key: Array) -> Array:
    """The update that takes `x`, a bfloat16 number in float32, to a neighbour of `x + update`."""
    new = stochastic(x + update, key).astype(jnp.float32)
    return jnp.where(jnp.isfinite(x), new - x, update)


def _lost(x: Array, update: Array) -> Array:
    """What `x + update` loses when it is rounded to bfloat16, in bfloat16; 0 of an infinity."""
    # Not by a cast there and back, which XLA may leave out.
    kept = jax.lax.reduce_precision(x + update, exponent_bits=8, mantissa_bits=7)
    lost = update - (kept - x)
    return jnp.where(jnp.isfinite(lost), lost, 0.0).astype(jnp.bfloat16)


def _in_bfloat16(params: Params) -> dict[str, Array]:
    return {path: x for path, x in trees.flatten(params).items() if x.dtype == jnp.bfloat16}


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
