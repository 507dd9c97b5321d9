"""Layouts: which stream of the model each stream of an Example becomes.

A layout turns an `Example` into unpadded arrays under the batch keys; packing then places them in
rows. It is a function with two attributes that a Task checks when it is built: `needs`, the streams
of the Example that it reads, and `streams`, the model's streams whose lengths must be given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives import Example

F = TypeVar("F", bound=Callable[..., Any])


def layout(*, needs: tuple[str, ...], streams: tuple[str, ...]) -> Callable[[F], F]:
    """Marks a function `(example, lengths) -> {batch key: array}` as a layout."""

    def mark(function: F) -> F:
        function.needs = needs  # type: ignore[attr-defined]
        function.streams = streams  # type: ignore[attr-defined]
        return function

    return mark


def shift_right(tokens: np.ndarray, start_id: int = 0) -> np.ndarray:
    """`[7, 8, 1]` -> `[0, 7, 8]`: at each position, what the decoder has written before it."""
    shifted = np.empty_like(tokens)
    shifted[:1] = start_id
    shifted[1:] = tokens[:-1]
    return shifted


@layout(needs=("inputs", "targets"), streams=("encoder", "decoder"))
def as_encoder_decoder(example: Example, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The encoder reads the inputs; the decoder writes the targets, starting from padding (T5).

        inputs   5 6 1                  encoder_input_tokens   5 6 1
        targets  7 8 1                  decoder_input_tokens   0 7 8
                                        decoder_target_tokens  7 8 1
                                        decoder_loss_weights   1 1 1    float32

    Raises InputError for a stream longer than `lengths[stream]`.
    """
    inputs, targets = example.inputs, example.targets
    assert inputs is not None, "a Task checks that the objective makes inputs"
    assert targets is not None, "a Task checks that the objective makes targets"
    _check_length("encoder", inputs, lengths)
    _check_length("decoder", targets, lengths)
    return {
        types.ENCODER_INPUT_TOKENS: inputs,
        types.DECODER_INPUT_TOKENS: shift_right(targets),
        types.DECODER_TARGET_TOKENS: targets,
        types.DECODER_LOSS_WEIGHTS: np.ones(len(targets), dtype=np.float32),
    }


def _check_length(stream: str, tokens: np.ndarray, lengths: Mapping[str, int]) -> None:
    if len(tokens) > lengths[stream]:
        raise types.InputError(
            f"an example has {len(tokens)} {stream} tokens, more than lengths['{stream}'] = "
            f"{lengths[stream]}: cut its tokens to the objective's fit(lengths), or raise it"
        )
