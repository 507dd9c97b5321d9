"""Layouts by hand: which array each stream becomes, what is weighted, and what a prefix sees."""

import numpy as np
import pytest

from t5x_lite.data.layouts import (
    as_decoder,
    as_encoder,
    as_encoder_decoder,
    as_prefix_lm,
    shift_right,
)
from t5x_lite.data.objectives import CausalLM, Example
from t5x_lite.types import FLOAT_KEYS, InputError
from tests.data.toy import GPT, text


def ints(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def shown(streams: dict[str, np.ndarray]) -> dict[str, list[float]]:
    for key, value in streams.items():
        assert value.dtype == (np.float32 if key in FLOAT_KEYS else np.int32), key
    return {key: value.tolist() for key, value in streams.items()}


def test_encoder_decoder_starts_with_the_vocabularys_start():
    lengths = {"encoder": 12, "decoder": 8}
    streams = as_encoder_decoder(Example(ints(5, 6, 1), ints(7, 8, 1)), lengths)
    assert shown(streams) == {
        "encoder_input_tokens": [5, 6, 1],
        "decoder_input_tokens": [0, 7, 8],
        "decoder_target_tokens": [7, 8, 1],
        "decoder_loss_weights": [1, 1, 1],
    }
    streams = as_encoder_decoder(Example(ints(5), ints(0, 7, 2), start_id=2), lengths)
    assert streams["decoder_input_tokens"].tolist() == [2, 0, 7]
    assert shift_right(ints(), 5).tolist() == []


def test_encoder_by_hand():
    example = Example(
        inputs=ints(101, 5, 103, 7, 102), masked_positions=ints(2), masked_targets=ints(6)
    )
    want = {
        "encoder_input_tokens": [101, 5, 103, 7, 102],
        "masked_positions": [2],
        "masked_target_tokens": [6],
        "masked_loss_weights": [1],
    }
    lengths = {"encoder": 5, "masked": 1}
    assert shown(as_encoder(example, lengths)) == want
    typed = Example(
        example.inputs, None, example.masked_positions, example.masked_targets, ints(0, 0, 0, 1, 1)
    )
    assert shown(as_encoder(typed, lengths)) == {**want, "encoder_token_types": [0, 0, 0, 1, 1]}
    with pytest.raises(InputError, match=r"1 masked tokens, more than lengths\['masked'\] = 0"):
        as_encoder(example, {"encoder": 5, "masked": 0})
    with pytest.raises(InputError, match="5 encoder tokens"):
        as_encoder(example, {"encoder": 4, "masked": 1})


def test_decoder_by_hand():
    lengths = {"decoder": 6}
    example = Example(targets=ints(5, 6, 7), start_id=50)
    assert shown(as_decoder(example, lengths)) == {
        "decoder_input_tokens": [50, 5, 6],
        "decoder_target_tokens": [5, 6, 7],
        "decoder_loss_weights": [1, 1, 1],
    }
    pair = Example(ints(5, 6, 1), ints(7, 8, 1))
    want = {
        "decoder_input_tokens": [0, 5, 6, 1, 7, 8],
        "decoder_target_tokens": [5, 6, 1, 7, 8, 1],
        "decoder_loss_weights": [0, 0, 0, 1, 1, 1],
    }
    assert shown(as_decoder(pair, lengths)) == want
    assert shown(as_prefix_lm(pair, lengths)) == {**want, "decoder_prefix": [1, 1, 1, 1, 0, 0]}
    for layout in (as_decoder, as_prefix_lm):
        with pytest.raises(InputError, match="6 decoder tokens"):
            layout(pair, {"decoder": 5})


def test_a_start_at_the_inputs_beginning_is_the_rows_start():
    """Llama's bos: once, not twice."""
    pair = Example(ints(2, 5, 3), ints(7, 3), start_id=2)
    assert shown(as_prefix_lm(pair, {"decoder": 4})) == {
        "decoder_input_tokens": [2, 5, 3, 7],
        "decoder_target_tokens": [5, 3, 7, 3],
        "decoder_loss_weights": [0, 0, 1, 1],
        "decoder_prefix": [1, 1, 1, 0],
    }


@pytest.mark.parametrize("inputs", [[2, 5, 3], [5, 6, 7, 3], [5], []])
@pytest.mark.parametrize("targets", [[7, 3], [3], [7, 8, 9, 3]])
@pytest.mark.parametrize("start", [0, 2])
def test_no_target_can_be_seen_in_a_prefix(inputs, targets, start):
    row = as_prefix_lm(Example(ints(*inputs), ints(*targets), start_id=start), {"decoder": 99})
    prefix = row["decoder_prefix"].astype(bool)
    given = row["decoder_input_tokens"][prefix].tolist()
    assert given == [start, *(inputs[1:] if inputs[:1] == [start] else inputs)]
    weighted = row["decoder_loss_weights"] > 0
    assert row["decoder_target_tokens"][weighted].tolist() == targets
    # Only the place that predicts the first target is both: it sees inputs alone.
    assert (prefix & weighted).sum() == 1


def test_a_text_that_fills_the_row_was_cut_and_has_no_end():
    objective, lengths = CausalLM(GPT), {"decoder": 8}
    for size, ends in ((7, True), (8, False)):
        row = as_decoder(objective(text(size)), lengths)
        assert len(row["decoder_target_tokens"]) == 8
        assert (row["decoder_target_tokens"][-1] == 3) == ends
    with pytest.raises(InputError, match="10 decoder tokens"):
        as_decoder(objective(text(9)), lengths)
