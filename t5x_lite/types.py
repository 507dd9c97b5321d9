"""Array and batch aliases, the batch keys, and the error for bad input.

This module is where data and models meet, so it imports neither JAX nor Flax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np

Array: TypeAlias = Any  # jax.Array or np.ndarray
Batch: TypeAlias = Mapping[str, Array]
Params: TypeAlias = Any  # nested dict of arrays (or PEFT leaves)

ENCODER_INPUT_TOKENS: Final = "encoder_input_tokens"
ENCODER_SEGMENT_IDS: Final = "encoder_segment_ids"
ENCODER_POSITIONS: Final = "encoder_positions"
ENCODER_TOKEN_TYPES: Final = "encoder_token_types"
DECODER_INPUT_TOKENS: Final = "decoder_input_tokens"
DECODER_TARGET_TOKENS: Final = "decoder_target_tokens"
DECODER_LOSS_WEIGHTS: Final = "decoder_loss_weights"
DECODER_SEGMENT_IDS: Final = "decoder_segment_ids"
DECODER_POSITIONS: Final = "decoder_positions"
DECODER_PREFIX: Final = "decoder_prefix"
MASKED_POSITIONS: Final = "masked_positions"
MASKED_TARGET_TOKENS: Final = "masked_target_tokens"
MASKED_TARGET_VALUES: Final = "masked_target_values"
MASKED_TARGET_SPANS: Final = "masked_target_spans"
MASKED_LOSS_WEIGHTS: Final = "masked_loss_weights"

# What a slot is asked for, one of these: a token or label, a number, or where an answer lies.
SLOT_TARGETS: Final = (MASKED_TARGET_TOKENS, MASKED_TARGET_VALUES, MASKED_TARGET_SPANS)
SPAN_BEGINS: Final = 1  # bits of a span's target: the answer's first token, and its last
SPAN_ENDS: Final = 2
FLOAT_KEYS: Final = frozenset({DECODER_LOSS_WEIGHTS, MASKED_TARGET_VALUES, MASKED_LOSS_WEIGHTS})
BATCH_KEYS: Final = frozenset(
    {
        ENCODER_INPUT_TOKENS,
        ENCODER_SEGMENT_IDS,
        ENCODER_POSITIONS,
        ENCODER_TOKEN_TYPES,
        DECODER_INPUT_TOKENS,
        DECODER_TARGET_TOKENS,
        DECODER_LOSS_WEIGHTS,
        DECODER_SEGMENT_IDS,
        DECODER_POSITIONS,
        DECODER_PREFIX,
        MASKED_POSITIONS,
        MASKED_LOSS_WEIGHTS,
        *SLOT_TARGETS,
    }
)


class InputError(ValueError):
    """Bad input from a user: the message names the thing, what was expected, and the mend.

    Raised before compilation starts. Programs print the message alone and exit with code 2.
    """


def check_batch(batch: Batch, vocab_size: int | None = None) -> None:
    """Raises InputError unless `batch` keeps the batch contract.

    Checked: known keys, `[batch, length]` shapes that agree within a stream (encoder, decoder,
    masked slots) and in their number of rows, int32 tokens and float32 weights; with `vocab_size`,
    also that every token lies in `[0, vocab_size)` (host arrays only: it reads the values).
    """
    if not batch:
        raise InputError("the batch is empty: expected at least one of " + ", ".join(BATCH_KEYS))
    shape_of: dict[str, tuple[str, tuple[int, ...]]] = {}
    rows: tuple[str, int] | None = None
    for key, value in batch.items():
        if key not in BATCH_KEYS:
            known = ", ".join(sorted(BATCH_KEYS))
            raise InputError(f"batch key '{key}' is unknown; the keys are: {known}")
        want = np.float32 if key in FLOAT_KEYS else np.int32
        if value.dtype != want:
            raise InputError(f"batch['{key}'] is {value.dtype}; expected {np.dtype(want)}")
        if value.ndim != 2:
            raise InputError(f"batch['{key}'] has shape {value.shape}; expected [batch, length]")
        stream = key.split("_")[0]
        first_key, shape = shape_of.setdefault(stream, (key, tuple(value.shape)))
        if tuple(value.shape) != shape:
            raise InputError(
                f"batch['{key}'] has shape {tuple(value.shape)} but batch['{first_key}'] has "
                f"{shape}"
            )
        rows = rows or (key, value.shape[0])
        if value.shape[0] != rows[1]:
            raise InputError(
                f"batch['{key}'] has {value.shape[0]} rows but batch['{rows[0]}'] has {rows[1]}"
            )
        if vocab_size is not None and key.endswith("_tokens") and value.size:
            low, high = int(np.min(value)), int(np.max(value))
            if low < 0 or high >= vocab_size:
                raise InputError(
                    f"batch['{key}'] holds token ids {low}..{high}, outside the model's vocabulary "
                    f"of {vocab_size}: the vocabulary file and the model's vocab_size disagree"
                )
