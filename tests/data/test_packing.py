"""Layouts and packing: worked rows, nothing lost but what is counted, segments kept apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.layouts import as_encoder, as_encoder_decoder
from t5x_lite.data.objectives import Example
from t5x_lite.data.packing import Pack, Pad, efficiency, first_fit, measure_packing, sizes
from t5x_lite.types import InputError, check_batch

LENGTHS = {"encoder": 12, "decoder": 8}


def example(n: int, m: int, first: int = 3) -> dict[str, np.ndarray]:
    """Distinct tokens, so that any mix-up shows."""
    tokens = np.arange(first, first + n + m, dtype=np.int32)
    return as_encoder_decoder(Example(tokens[:n], tokens[n:]), LENGTHS)


def test_packed_rows_by_hand():
    lengths = {"encoder": 5, "decoder": 4}
    window = Pack(window=3, rows=2)([example(3, 1), example(2, 2, 20), example(3, 2, 40)], lengths)
    rows = window.rows
    assert rows["encoder_input_tokens"].tolist() == [[3, 4, 5, 20, 21], [40, 41, 42, 0, 0]]
    assert rows["encoder_segment_ids"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]
    assert rows["encoder_positions"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
    assert rows["decoder_target_tokens"].tolist() == [[6, 22, 23, 0], [43, 44, 0, 0]]
    assert rows["decoder_input_tokens"].tolist() == [[0, 0, 22, 0], [0, 43, 0, 0]]
    assert rows["decoder_loss_weights"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert rows["decoder_segment_ids"].tolist() == [[1, 2, 2, 0], [1, 1, 0, 0]]
    assert (window.placed, window.dropped) == (3, 0)
    check_batch(rows)


SLOTS = {"encoder": 8, "masked": 3}


def masked(*places: int, size: int, first: int = 3) -> dict[str, np.ndarray]:
    """Distinct tokens; what is asked for at place p is 100 more than the token there."""
    tokens = np.arange(first, first + size, dtype=np.int32)
    at = np.array(places, np.int32)
    return as_encoder(Example(tokens, None, at, tokens[at] + 100, tokens % 2), SLOTS)


def test_slots_point_into_the_packed_row_by_hand():
    examples = [masked(1, size=3), masked(0, 2, size=4, first=20), masked(1, 2, size=3, first=40)]
    rows = Pack(window=3, rows=2)(examples, SLOTS).rows
    assert {key: value.tolist() for key, value in rows.items()} == {
        "encoder_input_tokens": [[3, 4, 5, 20, 21, 22, 23, 0], [40, 41, 42, 0, 0, 0, 0, 0]],
        "encoder_token_types": [[1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]],
        "encoder_segment_ids": [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0, 0]],
        "encoder_positions": [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 0, 0, 0, 0, 0]],
        "masked_positions": [[1, 3, 5], [1, 2, 0]],
        "masked_target_tokens": [[104, 120, 122], [141, 142, 0]],
        "masked_loss_weights": [[1, 1, 1], [1, 1, 0]],
    }
    check_batch(rows)
    assert efficiency(rows) == {"encoder": 10 / 16, "masked": 5 / 6}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=12))
def test_slots_point_to_their_tokens_in_any_packing(shapes):
    rng = np.random.default_rng(len(shapes))
    examples = [
        masked(
            *sorted(rng.permutation(size)[: min(slots, size)].tolist()), size=size, first=200 * i
        )
        for i, (size, slots) in enumerate(shapes, start=1)
    ]
    for assembly in (Pack(len(shapes), max(len(shapes) // 2, 1)), Pad()):
        window = assembly(examples, SLOTS)
        check_batch(window.rows)
        used = window.rows["masked_loss_weights"] > 0
        seen = np.take_along_axis(
            window.rows["encoder_input_tokens"], window.rows["masked_positions"], axis=1
        )
        np.testing.assert_array_equal(window.rows["masked_target_tokens"][used], seen[used] + 100)
        assert not window.rows["masked_positions"][~used].any()
        assert not window.rows["masked_target_tokens"][~used].any()
        if not window.dropped:
            assert used.sum() == sum(len(e["masked_positions"]) for e in examples)


def test_slots_are_room_too():
    many, few = masked(0, 1, size=2), masked(size=2)
    assert first_fit(sizes([many, many, few, few]), 2, SLOTS) == [0, 1, 0, 0]
    assert Pack(3, 1)([many, many, few], SLOTS).dropped == 1


def test_an_example_needs_room_in_both_streams_of_one_row():
    lengths = {"encoder": 10, "decoder": 4}
    chosen = first_fit(sizes([example(6, 3), example(2, 2), example(6, 1)]), 2, lengths)
    assert chosen == [0, 1, 1]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=20),
    st.integers(1, 20),
)
def test_packing_loses_nothing_but_counted_overflow(shapes, rows):
    rows = min(rows, len(shapes))
    examples = [example(n, m, 100 * i + 3) for i, (n, m) in enumerate(shapes)]
    window = Pack(len(shapes), rows)(examples, LENGTHS)
    check_batch(window.rows)
    assert window.placed + window.dropped == len(examples)
    found = []
    for row in range(rows):
        for segment in range(1, window.rows["encoder_segment_ids"][row].max() + 1):
            here = {}
            for key in examples[0]:
                stream = key.split("_")[0]
                inside = window.rows[f"{stream}_segment_ids"][row] == segment
                here[key] = window.rows[key][row][inside].tolist()
                positions = window.rows[f"{stream}_positions"][row][inside]
                assert positions.tolist() == list(range(inside.sum()))
            found.append(here)
    assert len(found) == window.placed
    every = [{k: v.tolist() for k, v in e.items()} for e in examples]
    assert all(f in every for f in found)
    assert len({f["encoder_input_tokens"][0] for f in found}) == window.placed
    padding = window.rows["decoder_segment_ids"] == 0
    assert not window.rows["decoder_loss_weights"][padding].any()
    if rows == len(shapes):
        assert window.dropped == 0


def test_pad_is_pack_of_one():
    examples = [example(5, 4), example(12, 8, 50)]
    padded = Pad()(examples, LENGTHS).rows
    for i, one in enumerate(examples):
        packed = Pack(1, 1)([one], LENGTHS).rows
        assert padded.keys() == packed.keys()
        for key, value in packed.items():
            np.testing.assert_array_equal(padded[key][i : i + 1], value)


def test_measured_shares():
    window = Pack(4, 2)
    examples = [example(6, 4, 100 * i) for i in range(1, 9)]
    made = [window(examples[i : i + 4], LENGTHS) for i in (0, 4)]
    measured = measure_packing(sizes(examples), window, LENGTHS)
    assert measured == {"encoder": 1.0, "decoder": 1.0, "overflow": 0.0}
    assert efficiency(made[0].rows) == {"encoder": 1.0, "decoder": 1.0}
    small = Pack(4, 1)
    measured = measure_packing(sizes(examples), small, LENGTHS)
    assert measured["overflow"] == 0.5
    assert small(examples[:4], LENGTHS).dropped == 2
    assert efficiency(Pad()([example(6, 2)], LENGTHS).rows) == {"encoder": 0.5, "decoder": 0.25}


def test_input_errors():
    with pytest.raises(InputError, match=r"13 encoder tokens.*12"):
        example(13, 1)
    with pytest.raises(InputError, match="9 decoder tokens"):
        example(1, 9)
    for window, rows in ((4, 0), (4, 5), (0, 0)):
        with pytest.raises(InputError, match="rows <= window"):
            Pack(window, rows)
    with pytest.raises(InputError, match="don't fill a window"):
        measure_packing(sizes([example(1, 1)]), Pack(2, 1), LENGTHS)
