"""Losses of tokens and labels, of numbers and of spans, and what a loss is divided by.

Everything is a sum, never a mean: sums of microbatches and devices add up, and the caller divides
once by the denominator that a `Normalisation` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.types import SPAN_BEGINS, SPAN_ENDS, Array, InputError

MEANS: Final = ("cross_entropy", "squared_error", "accuracy")  # sums that `weight` divides

# Why a custom gradient, for float32 logits [8, 114, 32128] (112 MiB) on 2 CPU cores: autodiff of
# logsumexp - take_along_axis and an argmax take 124 ms, this 66 ms (the argmax alone is 55 ms: its
# two-operand reduction doesn't vectorise). For bfloat16 logits autodiff keeps two float32 copies,
# this one keeps one: 112 instead of 224 MiB of temporaries. One-hot targets appear only as a
# comparison with an iota inside the backward pass's single elementwise loop. Both passes write the
# exponentials alike, so that XLA computes them once where both are in one program, as in `chunked`:
# a fifth of that loss with its products (1.16 s, 0.93). With the vocabulary split over devices it
# needs reductions of [batch, length] and never gathers logits.


@jax.custom_vjp
def _reduce_vocab(logits: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
    """(log Z, target logit, sum of logits, target is the argmax), each [batch, length]."""
    return _reduce_vocab_forward(logits, targets)[0]


def _reduce_vocab_forward(logits: Array, targets: Array) -> tuple[tuple[Array, ...], tuple]:
    targets = targets[..., None]
    highest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits.astype(jnp.float32) - highest.astype(jnp.float32))
    normaliser = jnp.sum(exponentials, axis=-1)
    log_z = jnp.log(normaliser) + highest[..., 0].astype(jnp.float32)
    target = jnp.take_along_axis(logits, targets, axis=-1)
    # argmax(logits) == target, where argmax means the first of equals.
    before = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < targets
    beaten = jnp.where(before, logits >= target, logits > target)
    total = jnp.sum(logits.astype(jnp.float32), axis=-1)
    outputs = (log_z, target[..., 0].astype(jnp.float32), total, ~jnp.any(beaten, axis=-1))
    return outputs, (logits, targets, highest, normaliser)


def _reduce_vocab_backward(residuals: tuple, cotangents: tuple) -> tuple[Array, None]:
    logits, targets, highest, normaliser = residuals
    g_log_z, g_target, g_total, _ = (g[..., None] for g in cotangents)
    exponentials = jnp.exp(logits.astype(jnp.float32) - highest.astype(jnp.float32))
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets
    gradient = g_log_z / normaliser[..., None] * exponentials
    gradient = gradient + jnp.where(hit, g_target, 0.0) + g_total
    return gradient.astype(logits.dtype), None


_reduce_vocab.defvjp(_reduce_vocab_forward, _reduce_vocab_backward)


def cross_entropy(
    logits: Array,
    targets: Array,
    weights: Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> dict[str, Array]:
    """Weighted sums over all positions, float32 scalars.

    With log Z = logsumexp(logits), q the smoothed targets (1 - s on the target, s / (V - 1) on
    every other token) and w the weights:

        loss           sum w (-sum_v q_v log p_v - H(q) + z_loss (log Z)^2)     what is minimised
        cross_entropy  sum w (-log p_target)             in nats, without smoothing and z-loss
        z_loss         sum w z_loss (log Z)^2            (part of `loss`)
        accuracy       sum w [argmax == target]          divide by `weight`
        weight         sum w

    Subtracting the entropy H(q) makes 0 the least possible smoothed loss. As in T5X; z-loss is from
    Mesh TensorFlow and appendix B of the ST-MoE paper (Zoph et al. 2022, arXiv:2202.08906).
    Positions of weight 0 get a gradient of exactly 0.

    Args:
      logits: [batch, length, vocab], any float dtype; reduced in float32.
      targets: int32 [batch, length], in [0, vocab).
      weights: float32 [batch, length].
      z_loss: the factor of (log Z)^2; T5X pretrains with 1e-4.
      label_smoothing: s above, in [0, 1).

    Raises:
      InputError: shapes that don't agree, or a constant out of its range.
    """
    if logits.shape[:-1] != targets.shape or weights.shape != targets.shape:
        raise InputError(
            f"cross_entropy got logits {logits.shape}, targets {targets.shape} and weights "
            f"{weights.shape}; expected [batch, length, vocab], [batch, length], [batch, length]"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise InputError(f"label_smoothing is {label_smoothing}; expected 0 <= label_smoothing < 1")
    if z_loss < 0.0:
        raise InputError(f"z_loss is {z_loss}; expected 0 or more (T5X pretrains with 1e-4)")
    log_z, target, total, correct = _reduce_vocab(logits, targets)
    weights = weights.astype(jnp.float32)
    entropy = log_z - target
    losses = entropy
    if label_smoothing:
        vocab = logits.shape[-1]
        on, off = 1.0 - label_smoothing, label_smoothing / (vocab - 1)
        least = -(on * np.log(on) + (vocab - 1) * off * np.log(off))
        losses = log_z - (on - off) * target - off * total - least
    penalty = z_loss * jnp.square(log_z)
    return {
        "loss": jnp.sum(weights * (losses + penalty)),
        "cross_entropy": jnp.sum(weights * entropy),
        "z_loss": jnp.sum(weights * penalty),
        "accuracy": jnp.sum(weights * correct),
        "weight": jnp.sum(weights),
    }


def squared_error(predicted: Array, targets: Array, weights: Array) -> dict[str, Array]:
    """Weighted sums over all slots, float32 scalars: `loss` and `squared_error`, alike; `weight`.

    Args:
      predicted: [batch, slots, 1], any float dtype.
      targets, weights: float32 [batch, slots].
    """
    if predicted.shape != (*targets.shape, 1) or weights.shape != targets.shape:
        raise InputError(
            f"squared_error got predictions {predicted.shape}, targets {targets.shape} and weights "
            f"{weights.shape}; expected [batch, slots, 1], [batch, slots], [batch, slots]: a "
            "SequenceHead with one label"
        )
    weights = weights.astype(jnp.float32)
    total = jnp.sum(weights * jnp.square(predicted[..., 0].astype(jnp.float32) - targets))
    return {"loss": total, "squared_error": total, "weight": jnp.sum(weights)}


def span_cross_entropy(
    logits: Array, targets: Array, weights: Array, segment_ids: Array | None = None
) -> dict[str, Array]:
    """Cross entropy over the slots of each example, of where an answer begins and where it ends.

    `loss` and `cross_entropy` are the sum of both ends' -log p over all examples (Devlin et al.
    2019, arXiv:1810.04805, section 4.2), `accuracy` that of the ends whose slot scores highest, and
    `weight` the number of ends: a mean is over ends, as in BERT. float32 scalars.

    Args:
      logits: [batch, slots, 2]: scores of beginning, and of ending, at a slot.
      targets: int32 [batch, slots], bits `types.SPAN_BEGINS` and `types.SPAN_ENDS`.
      weights: float32 [batch, slots]; slots without weight are no candidates.
      segment_ids: int32 [batch, slots], which example of a packed row, 0 for none; None: one a row.
    """
    if logits.shape != (*targets.shape, 2) or weights.shape != targets.shape:
        raise InputError(
            f"span_cross_entropy got logits {logits.shape}, targets {targets.shape} and weights "
            f"{weights.shape}; expected [batch, slots, 2], [batch, slots], [batch, slots]: a "
            "TokenHead with two labels"
        )
    used = weights > 0
    own = jnp.where(used, 1 if segment_ids is None else segment_ids, 0)
    scores = jnp.where(used[..., None], logits.astype(jnp.float32), -1e9)
    slots = targets.shape[-1] + 1

    def by_example(values: Array, reduce: Callable[..., Array]) -> Array:
        """Each slot's reduction over its own example, [slots, 2]."""
        return jax.vmap(lambda v, s: reduce(v, s, num_segments=slots)[s])(values, own)

    highest = jax.lax.stop_gradient(by_example(scores, jax.ops.segment_max))
    log_z = highest + jnp.log(by_example(jnp.exp(scores - highest), jax.ops.segment_sum))
    asked = jnp.stack([targets & SPAN_BEGINS, targets & SPAN_ENDS], axis=-1) > 0
    asked &= used[..., None]
    total = jnp.sum(jnp.where(asked, log_z - scores, 0.0))
    return {
        "loss": total,
        "cross_entropy": total,
        "accuracy": jnp.sum(asked & (scores == highest)).astype(jnp.float32),
        "weight": jnp.sum(asked).astype(jnp.float32),
    }


class Normalisation(Protocol):
    """(weights, segment ids or None), both [batch, length] -> (weights to use, denominator).

    The denominator is a float32 scalar; add it over microbatches and devices like every other sum,
    and divide once: the result doesn't depend on how a batch was split.
    """

    def __call__(self, weights: Array, segment_ids: Array | None = None) -> tuple[Array, Array]: ...


def by_real_tokens(weights: Array, segment_ids: Array | None = None) -> tuple[Array, Array]:
    """The mean over tokens: divides by the sum of the weights. The default."""
    del segment_ids
    return weights, jnp.sum(weights)


def by_total_tokens(weights: Array, segment_ids: Array | None = None) -> tuple[Array, Array]:
    """Divides by batch x length, padding included: a token counts the same in every batch."""
    del segment_ids
    return weights, jnp.asarray(weights.size, jnp.float32)


def by_sequence(weights: Array, segment_ids: Array | None = None) -> tuple[Array, Array]:
    """The mean over sequences of the mean over each one's tokens: short examples count fully.

    A sequence is a segment of a packed row (ids from 1; 0 = padding), or a row where
    `segment_ids` is None. Sequences without weight don't count.
    """
    if segment_ids is None:
        segment_ids = jnp.ones(weights.shape, jnp.int32)
    slots = weights.shape[-1] + 1  # a row holds at most `length` segments, and padding
    totals = (
        jax.vmap(lambda w, s: jax.ops.segment_sum(w, s, num_segments=slots))(weights, segment_ids)
        .at[:, 0]
        .set(0.0)
    )
    own = jnp.take_along_axis(totals, segment_ids, axis=-1)
    shares = jnp.where(own > 0, weights / jnp.where(own > 0, own, 1.0), 0.0)
    return shares, jnp.sum(totals > 0).astype(jnp.float32)
