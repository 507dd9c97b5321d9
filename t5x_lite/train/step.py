"""The training step and the evaluation step: pure functions of explicit inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import flax.struct
import jax
import jax.numpy as jnp
import optax

from t5x_lite import trees, types
from t5x_lite.devices import fetched
from t5x_lite.models import config_heads, heads
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.transformer import Transformer, head_parameters
from t5x_lite.models.weights import draws, is_node
from t5x_lite.peft.transform import Transform
from t5x_lite.train import chunked
from t5x_lite.train.losses import (
    Normalisation,
    by_real_tokens,
    cross_entropy,
    span_cross_entropy,
    squared_error,
)
from t5x_lite.types import Array, Batch, InputError, Params

Sums = dict[str, Array]
ROUNDING: Final = 2**32 - 1  # of a step's keys that which rounds parameters: no microbatch's


@flax.struct.dataclass
class TrainState:
    """What a step changes. Frozen parameters are a separate argument and not part of it."""

    step: Array  # int32 scalar: steps taken; with the seed, the whole random state
    params: Params  # trainable leaves only
    opt_state: optax.OptState


@dataclass(frozen=True)
class Loss:
    """What is minimised, its regularisers, and what it is divided by.

    The batch says what it asks for: tokens or labels (cross entropy), numbers (squared error), or
    spans (cross entropy over the places of an example). Regularisers are for tokens and labels.
    """

    z_loss: float = 0.0  # factor of (log Z)^2; T5X pretrains with 1e-4
    label_smoothing: float = 0.0
    normalisation: Normalisation = by_real_tokens
    logits_bytes: int = 2**28  # of float32 logits at once on a device; 0: all of them

    def __post_init__(self) -> None:
        if self.logits_bytes < 0:
            raise InputError(
                f"Loss.logits_bytes={self.logits_bytes}: expected a number of bytes, or 0 for all "
                "logits at once"
            )

    def of(
        self, model: Transformer, params: Params, batch: Batch, rng: Array | None = None
    ) -> Sums:
        """The sums of a model's answer; `rng` turns dropout on.

        A language model's logits are made and scored in chunks: see `chunked`.
        """
        variables, deterministic = {"params": params}, rng is None
        rngs = {} if rng is None else {"dropout": rng}
        targets, weights, segments = asked(batch)
        chunk = self._chunk(model.config, params, batch, targets.shape)
        if chunk >= targets.shape[1]:
            return self(model.apply(variables, batch, deterministic, rngs=rngs), batch)
        states = model.apply(variables, batch, deterministic, method="states", rngs=rngs)
        if types.MASKED_POSITIONS in batch:
            states = heads.at_slots(states, batch[types.MASKED_POSITIONS])
        used, denominator = self.normalisation(weights, segments)
        sums = chunked.summed(
            lambda own, x: model.apply({"params": own}, x, method="logits"),
            self._of_tokens,
            head_parameters(model.config, params),
            states,
            targets,
            used,
            chunk,
        )
        return {**sums, "denominator": denominator, "tokens": count_tokens(batch)}

    def _chunk(
        self, config: ModelConfig, params: Params, batch: Batch, shape: tuple[int, ...]
    ) -> int:
        """Of how many of a row's answers logits are made at once."""
        rows, length = shape
        of_tokens = slot_targets(batch) in (None, types.MASKED_TARGET_TOKENS)
        alone = isinstance(config.head, config_heads.LMHead) and config.pair_head is None
        if not (of_tokens and alone and self.logits_bytes):
            return length
        own = trees.flatten(head_parameters(config, params), is_leaf=is_node)
        if any(map(draws, own.values())):  # each chunk would draw the same numbers
            return length
        return chunked.chunk_length(rows, length, config.vocab_size, self.logits_bytes)

    def _of_tokens(self, logits: Array, targets: Array, weights: Array) -> Sums:
        return cross_entropy(
            logits, targets, weights, z_loss=self.z_loss, label_smoothing=self.label_smoothing
        )

    def __call__(self, logits: Array, batch: Batch) -> Sums:
        """Sums over the batch: those of the function in `losses`, `denominator` and `tokens`.

        `denominator` divides the loss that is minimised, `weight` the metrics; `tokens` counts
        what was processed, without padding.
        """
        targets, weights, segments = asked(batch)
        if types.MASKED_TARGET_SPANS in batch:
            sums = span_cross_entropy(logits, targets, weights, segments)
            return {**sums, "denominator": sums["weight"], "tokens": count_tokens(batch)}
        used, denominator = self.normalisation(weights, segments)
        if types.MASKED_TARGET_VALUES in batch:
            sums = squared_error(logits, targets, used)
        else:
            sums = self._of_tokens(logits, targets, used)
        return {**sums, "denominator": denominator, "tokens": count_tokens(batch)}


def asked(batch: Batch) -> tuple[Array, Array, Array | None]:
    """What the model is asked: targets, weights, and segment ids or None, each `[rows, answers]`.

    At the masked slots where the batch has them, at the decoder's tokens otherwise.
    """
    key = slot_targets(batch)
    if key is None:
        segments = batch.get(types.DECODER_SEGMENT_IDS)
        return batch[types.DECODER_TARGET_TOKENS], batch[types.DECODER_LOSS_WEIGHTS], segments
    segments = batch.get(types.ENCODER_SEGMENT_IDS)
    if segments is not None:
        segments = jnp.take_along_axis(segments, batch[types.MASKED_POSITIONS], axis=1)
        # Numbered by their first slots, for a row may have more segments than slots.
        alike = segments[:, :, None] == segments[:, None, :]
        segments = (jnp.argmax(alike, axis=2).astype(jnp.int32) + 1) * (segments > 0)
    return batch[key], batch[types.MASKED_LOSS_WEIGHTS], segments


def slot_targets(batch: Batch) -> str | None:
    """The key of what the batch's slots are asked for; None: it has none."""
    return next((key for key in types.SLOT_TARGETS if key in batch), None)


def count_tokens(batch: Batch) -> Array:
    """Tokens of all streams that are not padding, as a float32 scalar."""
    total = jnp.float32(0)
    for tokens_key, segments_key in (
        (types.ENCODER_INPUT_TOKENS, types.ENCODER_SEGMENT_IDS),
        (types.DECODER_INPUT_TOKENS, types.DECODER_SEGMENT_IDS),
    ):
        if segments_key in batch:
            total += jnp.sum(batch[segments_key] > 0).astype(jnp.float32)
        elif tokens_key in batch:
            total += batch[tokens_key].size
    return total


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    *,
    model: Transformer,
    transform: Transform,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    microbatches: int,
    seed: int,
) -> tuple[TrainState, Sums]:
    """One optimizer step on one global batch.

    Gradients and metrics are summed over microbatches and divided once, so that neither their
    number nor uneven padding changes the result: in float32, whatever the parameters are. Dropout
    is keyed by (seed, step, microbatch), stochastic rounding by (seed, step, path).

    Args:
      state: donated by the caller.
      frozen: the transform's frozen parameters: neither donated nor differentiated.
      batch: `[rows, length]` arrays; rows divisible by `microbatches`.

    Returns:
      The next state, and the sums of `Loss` with `gradient_norm` and `step` (of the state before).
    """
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def summed_loss(params: Params, part: Batch, index: Array) -> tuple[Array, Sums]:
        key = jax.random.fold_in(rng, index)
        sums = loss.of(model, transform.apply(params, frozen, key), part, key)
        return sums["loss"], sums

    def gradient(part: Batch, index: Array) -> tuple[Params, Sums]:
        return jax.grad(summed_loss, has_aux=True)(state.params, part, index)

    if microbatches == 1:
        grads, sums = gradient(batch, jnp.int32(0))
    else:
        # Row i goes to microbatch i % microbatches: rows stay on the devices that hold them.
        parts = {
            key: value.reshape(-1, microbatches, *value.shape[1:]).swapaxes(0, 1)
            for key, value in batch.items()
        }

        def accumulate(total: tuple, part: tuple) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, gradient(*part)), None

        first = jax.tree.map(lambda part: part[0], parts)
        shapes = jax.eval_shape(gradient, first, jnp.int32(0))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, _wide(shape.dtype)), shapes)
        (grads, sums), _ = jax.lax.scan(
            accumulate, zeros, (parts, jnp.arange(microbatches, dtype=jnp.int32))
        )

    denominator = jnp.maximum(sums["denominator"], 1e-9)  # a batch of padding alone changes nothing
    grads = jax.tree.map(lambda grad: grad / denominator.astype(_wide(grad.dtype)), grads)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        grads, fetched(state.opt_state), state.params, key=jax.random.fold_in(rng, ROUNDING)
    )
    params = optax.apply_updates(state.params, updates)
    metrics = {**sums, "gradient_norm": optax.global_norm(grads), "step": state.step}
    return TrainState(state.step + 1, params, opt_state), metrics


def _wide(dtype: Any) -> Any:
    """The dtype to add up numbers of `dtype` in."""
    return jnp.promote_types(dtype, jnp.float32)


def eval_step(
    params: Params, frozen: Params, batch: Batch, *, model: Transformer, transform: Transform
) -> Sums:
    """Teacher-forced sums on one batch, as `Loss` makes them without regularisers."""
    return Loss().of(model, transform.apply(params, frozen), batch)


def check_trainable_batch(batch: Batch) -> None:
    """Raises InputError unless a batch has what a loss needs."""
    if slot_targets(batch) is None and types.DECODER_TARGET_TOKENS not in batch:
        raise InputError(
            f"training needs batch['{types.DECODER_TARGET_TOKENS}'] or "
            f"batch['{types.MASKED_TARGET_TOKENS}'], but the task's layout makes "
            f"{', '.join(sorted(batch))}"
        )
