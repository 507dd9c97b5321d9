"""What a model is asked, from text to rows to records, for each family."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.decode import modes
from t5x_lite.models.config_heads import TokenHead
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import InputError
from tests import common
from tests.data.toy import ToyVocabulary

# 96 ids, as the models: 0 pad, 1 unk, 2 bos, 3 eos, 4 mask, 88 to 95 sentinels.
BERT = ToyVocabulary(size=96, num_sentinels=8)
T5 = dataclasses.replace(BERT, bos_id=None, mask_id=None, start_id=0)


def mode(family, name=None, vocabulary=BERT, input_tokens=12, **changes):
    config = common.FAMILIES[family]
    kind = modes.choose(config, name)
    return kind(Transformer(config), vocabulary, input_tokens, 4, **changes)


def ask(asked, texts):
    """Records, and the rows that were asked."""
    _, params = common.build(asked.model.config)
    encoded = [asked.encode(text) for text in texts]
    batch = asked.rows([*encoded, np.zeros(0, np.int32)])  # one row fills the batch up
    answers = jax.device_get(modes.program(asked)(params, batch))
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], answers) for i in range(len(texts))]
    records = [
        asked.record(text, ids, answer)
        for text, ids, answer in zip(texts, encoded, rows, strict=True)
    ]
    return records, encoded, batch, params


def test_masks_get_the_models_most_probable_tokens():
    asked = mode("bert", candidates=3)
    assert asked.model.config.pair_head is not None  # whose slot no mask may take
    texts = ["7 <mask> 8", "<mask> 9 <mask> 10 <mask>"]
    records, encoded, batch, params = ask(asked, texts)
    assert encoded[0].tolist() == [2, 7, 4, 8, 3]
    assert batch[types.MASKED_POSITIONS].shape == (3, 4)  # three masks: the next power of two
    logits = asked.model.apply(
        {"params": params}, {k: v for k, v in batch.items() if k.startswith("encoder")}
    )
    places = (1, 3, 5)  # bos, mask, 9, mask, 10, mask
    for place, found in zip(places, records[1]["masks"], strict=True):
        share = np.asarray(jax.nn.softmax(logits[1, place]))
        best = np.argsort(-share)[:3]
        assert [one["piece"] for one in found] == [BERT.piece(int(token)) for token in best]
        np.testing.assert_allclose([one["probability"] for one in found], share[best], rtol=1e-4)
    assert records[0]["prediction"].startswith("7")
    assert records[0]["inputs"] == texts[0]


def test_a_guess_of_eos_does_not_end_the_text():
    asked = mode("bert")
    ids = asked.encode("7 <mask> 8")
    record = asked.record("7 <mask> 8", ids, (np.array([[3]]), np.array([[0.5]])))
    assert record["prediction"] == "7 8"
    assert record["masks"] == [[{"piece": "<3>", "probability": 0.5}]]


def test_a_decoder_goes_on_from_its_prompt():
    records, encoded, batch, _ = ask(mode("gpt2"), ["7 8 9", "10"])
    assert encoded[0].tolist() == [3, 7, 8, 9]  # from start_id
    assert batch[types.DECODER_INPUT_TOKENS][1].tolist() == [0] * 10 + [3, 10]
    assert batch[types.DECODER_INPUT_TOKENS][2].tolist() == [0] * 11 + [3]
    assert set(records[0]) == {"inputs", "prediction"}


def test_a_decoder_fills_the_middle():
    asked = mode("gpt2", "infill")
    ids = asked.encode("7 <mask> 8 9")
    assert ids.tolist() == [3, 95, 7, 94, 8, 9, 93]  # start, prefix, suffix, middle
    record = asked.record("7 <mask> 8 9", ids, np.array([5, 6, 3, 0]))
    assert record["prediction"] == "7 5 6 8 9"
    assert record["filled"] == ["5 6"]


def test_an_encoder_decoder_answers():
    records, encoded, _, _ = ask(mode("t5_1_0", vocabulary=T5), ["7 8"])
    assert encoded[0].tolist() == [7, 8, 3]
    assert set(records[0]) == {"inputs", "prediction"}


def test_sentinels_gaps_are_spliced():
    asked = mode("t5_1_0", "infill", T5)
    text = "7 <mask> 8 <mask>"
    ids = asked.encode(text)
    assert ids.tolist() == [7, 95, 8, 94, 3]
    # In another order, with a sentinel that was not asked for, and text before the first.
    answer = np.array([11, 94, 6, 93, 12, 95, 5, 5, 3, 9])
    record = asked.record(text, ids, answer)
    assert record == {"inputs": text, "prediction": "7 5 5 8 6", "filled": ["5 5", "6"]}
    assert asked.record(text, ids, np.array([95, 5, 3]))["filled"] == ["5", ""]


def test_a_mask_token_has_the_text_written_anew():
    asked = mode("bart", "infill")
    ids = asked.encode("7 <mask> 8")
    assert ids.tolist() == [2, 7, 4, 8, 3]
    record = asked.record("7 <mask> 8", ids, np.array([2, 7, 5, 8, 3]))
    assert record == {"inputs": "7 <mask> 8", "prediction": "7 5 8"}


def test_spaces_before_a_gap_go_and_those_behind_stay():
    assert modes.gaps("a <mask> b  <mask>.") == ["a", " b", "."]


@pytest.mark.parametrize(
    ("text", "fillings", "expected"),
    [
        ("a <mask> b", ["c"], "a c b"),  # SentencePiece writes no space before a text
        ("a <mask> b", [" c"], "a c b"),  # bytes and byte-level BPE do
        ("a <mask> b", [""], "a b"),
        ("<mask>d<mask>.", [" c", "e"], " cde."),
        ("a <mask> <mask>", ["<mask>", " b"], "a <mask> b"),  # what was written is no gap
    ],
)
def test_fillings_are_spliced_with_one_space(text, fillings, expected):
    assert modes.spliced(text, fillings) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 0}, "infer.candidates=0: expected at least 1"),
        ({"candidates": 97}, "infer.candidates=97: the model knows no more than 96"),
        ({"new_tokens": 0}, "infer.max_tokens=0"),
        ({"input_tokens": 0}, "infer.max_input_tokens=0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(mode("bert"), **changes)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("bert", "generate", "mode='generate' is not for an encoder alone, which does: fill_mask"),
        ("gpt2", "fill_mask", "not for a decoder alone, which does: generate, infill"),
        ("bart", "fill_mask", "not for an encoder-decoder"),
    ],
)
def test_a_mode_that_the_model_cannot_do_is_refused(family, name, message):
    with pytest.raises(InputError, match=message):
        modes.choose(common.FAMILIES[family], name)


def test_a_model_without_a_head_for_tokens_is_refused():
    config = dataclasses.replace(
        common.FAMILIES["bert"], head=TokenHead(num_labels=2), pair_head=None
    )
    with pytest.raises(InputError, match="this model has a TokenHead"):
        modes.choose(config, None)


@pytest.mark.parametrize(
    ("asked", "text", "message"),
    [
        (lambda: mode("bert"), "7 8", "has 0 times <mask>: expected one or more"),
        (lambda: mode("gpt2", "infill"), "<mask> 7 <mask>", "2 times <mask>: expected 1"),
        (lambda: mode("bert", vocabulary=T5), "<mask>", "needs a vocabulary with a mask"),
        (
            lambda: mode("gpt2", "infill", dataclasses.replace(BERT, num_sentinels=2)),
            "7 <mask> 8",
            "the vocabulary has 2",
        ),
        (lambda: mode("bart", input_tokens=4), "7 8 9", "5 tokens with the specials"),
    ],
)
def test_a_text_that_the_mode_cannot_take_is_refused(asked, text, message):
    with pytest.raises(InputError, match=message):
        asked().encode(text)


def test_rows_longer_than_the_learned_positions_are_refused():
    modes.check_lengths(common.FAMILIES["gpt2"], 16, 17)
    with pytest.raises(InputError, match="33 decoder tokens, but the model learned 32"):
        modes.check_lengths(common.FAMILIES["gpt2"], 16, 18)
    with pytest.raises(InputError, match="33 encoder tokens"):
        modes.check_lengths(common.FAMILIES["bart"], 33, 8)
    modes.check_lengths(common.FAMILIES["llama"], 1000, 1000)
