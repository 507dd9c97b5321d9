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
from t5x_lite.data.objectives.base import Example

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
    """The encoder reads the inputs; the decoder writes the targets, starting from `start_id`.

        inputs   5 6 1                  encoder_input_tokens   5 6 1
        targets  7 8 1                  decoder_input_tokens   0 7 8    T5 starts from padding
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
        types.DECODER_INPUT_TOKENS: shift_right(targets, example.start_id),
        types.DECODER_TARGET_TOKENS: targets,
        types.DECODER_LOSS_WEIGHTS: np.ones(len(targets), dtype=np.float32),
    }


@layout(needs=("inputs", "masked_positions", "masked_targets"), streams=("encoder", "masked"))
def as_encoder(example: Example, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The encoder reads the inputs, and the head predicts at the masked places alone.

        inputs            101 5 103 7 102     encoder_input_tokens  101 5 103 7 102
        masked_positions  2                   masked_positions      2
        masked_targets    6                   masked_target_tokens  6
                                              masked_loss_weights   1    float32

    Numbers stand under `masked_target_values`, and spans under `masked_target_spans`, in the place
    of `masked_target_tokens`: `Example.asked_as`. With token types, `encoder_token_types` besides.
    Raises InputError for a stream longer than `lengths[stream]`.
    """
    inputs, positions, targets = example.inputs, example.masked_positions, example.masked_targets
    assert inputs is not None, "a Task checks that the objective makes inputs"
    assert positions is not None, "a Task checks that the objective makes masked_positions"
    assert targets is not None, "a Task checks that the objective makes masked_targets"
    _check_length("encoder", inputs, lengths)
    _check_length("masked", targets, lengths)
    streams = {types.ENCODER_INPUT_TOKENS: inputs}
    if example.token_types is not None:
        streams[types.ENCODER_TOKEN_TYPES] = example.token_types
    return {
        **streams,
        types.MASKED_POSITIONS: positions,
        example.asked_as: targets,
        types.MASKED_LOSS_WEIGHTS: np.ones(len(targets), dtype=np.float32),
    }


@layout(needs=("targets",), streams=("decoder",))
def as_decoder(example: Example, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A decoder alone writes the targets; inputs, if there are any, stand before them unweighted.

        inputs   5 6 1                  decoder_input_tokens   0 5 6 1 7 8
        targets  7 8 1                  decoder_target_tokens  5 6 1 7 8 1
                                        decoder_loss_weights   0 0 0 1 1 1    float32

    Targets without inputs that are one token too long lose their eos: `CausalLM` fills the row.
    Raises InputError for rows longer than `lengths["decoder"]`.
    """
    targets = example.targets
    assert targets is not None, "a Task checks that the objective makes targets"
    if example.inputs is None and len(targets) == lengths["decoder"] + 1:
        targets = targets[:-1]
    return _row(example.inputs, targets, example.start_id, lengths)


@layout(needs=("inputs", "targets"), streams=("decoder",))
def as_prefix_lm(example: Example, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A decoder alone reads the inputs in both directions, and writes the targets after them.

        inputs   5 6 1                  decoder_input_tokens   0 5 6 1 7 8
        targets  7 8 1                  decoder_target_tokens  5 6 1 7 8 1
                                        decoder_loss_weights   0 0 0 1 1 1    float32
                                        decoder_prefix         1 1 1 1 0 0    int32

    Raises InputError for rows longer than `lengths["decoder"]`.
    """
    inputs, targets = example.inputs, example.targets
    assert inputs is not None, "a Task checks that the objective makes inputs"
    assert targets is not None, "a Task checks that the objective makes targets"
    row = _row(inputs, targets, example.start_id, lengths)
    prefix: np.ndarray = np.zeros(len(row[types.DECODER_INPUT_TOKENS]), dtype=np.int32)
    # The start, and the inputs one place to the right: the last of them predicts the first target.
    prefix[: len(prefix) - len(targets) + 1] = 1
    return {**row, types.DECODER_PREFIX: prefix}


def put_ahead(streams: Mapping[str, np.ndarray], ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A layout's streams with a soft prompt's ids in front of what the model reads first.

    That is the encoder's stream, or a decoder's where there is no encoder. ids 96 97:

        decoder_input_tokens     96 97 0 5 6 1 7 8
        decoder_target_tokens    0 0 5 6 1 7 8 1
        decoder_loss_weights     0 0 0 0 0 1 1 1
        decoder_prefix           1 1 1 1 1 1 0 0      where there is one

    Token types are 0 there; masked positions move with their tokens. An example without a token,
    which only fills a batch up, stays one.
    """
    key = types.ENCODER_INPUT_TOKENS
    key = key if key in streams else types.DECODER_INPUT_TOKENS
    if not len(streams[key]):
        return dict(streams)
    stream = key.split("_", maxsplit=1)[0]
    new: dict[str, Any] = {key: ids, types.DECODER_PREFIX: np.ones(len(ids), np.int32)}
    nothing: np.ndarray = np.zeros(len(ids), np.int32)
    made = {
        name: np.concatenate([new.get(name, nothing), values]).astype(values.dtype)
        if name.startswith(f"{stream}_")
        else values
        for name, values in streams.items()
    }
    if types.MASKED_POSITIONS in made:
        made[types.MASKED_POSITIONS] = made[types.MASKED_POSITIONS] + np.int32(len(ids))
    return made


def _row(
    inputs: np.ndarray | None, targets: np.ndarray, start_id: int, lengths: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Inputs and targets in one row of the decoder."""
    if inputs is None:
        inputs = targets[:0]
    elif len(inputs) and inputs[0] == start_id:
        inputs = inputs[1:]  # the row starts with it anyway
    row = np.concatenate([inputs, targets])
    _check_length("decoder", row, lengths)
    weights: np.ndarray = np.zeros(len(row), dtype=np.float32)
    weights[len(inputs) :] = 1.0
    return {
        types.DECODER_INPUT_TOKENS: shift_right(row, start_id),
        types.DECODER_TARGET_TOKENS: row,
        types.DECODER_LOSS_WEIGHTS: weights,
    }


def _check_length(stream: str, tokens: np.ndarray, lengths: Mapping[str, int]) -> None:
    if len(tokens) > lengths[stream]:
        raise types.InputError(
            f"an example has {len(tokens)} {stream} tokens, more than lengths['{stream}'] = "
            f"{lengths[stream]}: cut its tokens to the objective's fit(lengths), or raise it"
        )
