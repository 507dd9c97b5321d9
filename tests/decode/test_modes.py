"""What a model is asked, from text to rows to records, for each family."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.decode import modes
from t5x_lite.decode.asking import Asking
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.modes import gaps
from t5x_lite.decode.modes.asker import Asker
from t5x_lite.models.config_heads import EmbeddingHead, SequenceHead, TokenHead
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError
from tests import common
from tests.data.toy import ToyVocabulary
from tests.train import harness

# 96 ids, as the models: 0 pad, 1 unk, 2 bos, 3 eos, 4 mask, 88 to 95 sentinels.
BERT = ToyVocabulary(size=96, num_sentinels=8)
T5 = dataclasses.replace(BERT, bos_id=None, mask_id=None, start_id=0)
SLOW_GPT2 = pytest.param("gpt2", marks=pytest.mark.slow)
LABELLED = {
    "classify": SequenceHead(num_labels=3),
    "tag": TokenHead(num_labels=3),
    "embed": EmbeddingHead(),
}


def config_of(family, head=None):
    config = common.FAMILIES[family]
    return config if head is None else dataclasses.replace(config, head=head, pair_head=None)


def loaded_of(family, vocabulary=BERT, head=None, params=None, **changes):
    model = Transformer(config_of(family, head))
    return Loaded(model, params, vocabulary, harness.one_device(), **changes)


def mode(family, name=None, vocabulary=BERT, *, head=None, asking=Asking(), **changes):
    options = modes.Options(**{"max_input_tokens": 12, "max_tokens": 4} | changes)
    return modes.make(loaded_of(family, vocabulary, head, asking=asking), name, options)


def item(text, **fields):
    return {"inputs": text, **fields}


def encode(asked, text, **fields):
    return asked.encode(item(text, **fields)).ids.tolist()


def record(asked, text, answer):
    return asked.record(item(text), asked.encode(item(text)), answer)


def ask(asked, texts):
    """Records, and the batch that was asked."""
    params = harness.host_params(asked.loaded.model.config)
    asked = dataclasses.replace(asked, loaded=dataclasses.replace(asked.loaded, params=params))
    items = [item(one) if isinstance(one, str) else one for one in texts]
    rows = [asked.encode(one) for one in items]
    answers = Asker(asked, len(texts) + 1).batch(rows, range(len(texts)))  # one row fills it up
    found = [asked.record(*parts) for parts in zip(items, rows, answers, strict=True)]
    return found, asked.rows([*rows, None], 8), params


def test_masks_get_the_models_most_probable_tokens():
    # Rows of the table above the vocabulary are no tokens, however probable.
    vocabulary = dataclasses.replace(BERT, size=60, num_sentinels=0)
    asked = mode("bert", vocabulary=vocabulary, candidates=60)
    assert asked.loaded.model.config.pair_head is not None  # whose slot no mask may take
    texts = ["7 <mask> 8", "<mask> 9 <mask> 10 <mask>"]
    assert encode(asked, texts[0]) == [2, 7, 4, 8, 3]
    records, batch, params = ask(asked, texts)
    assert batch[types.MASKED_POSITIONS].shape == (3, 4)  # three masks: the next power of two
    logits = jax.jit(asked.loaded.model.apply)(
        {"params": params}, {k: v for k, v in batch.items() if k.startswith("encoder")}
    )
    places = (1, 3, 5)  # bos, mask, 9, mask, 10, mask
    for place, found in zip(places, records[1]["masks"], strict=True):
        share = np.asarray(jax.nn.softmax(logits[1, place, :60]))
        best = np.argsort(-share)
        assert [one["piece"] for one in found] == [BERT.piece(int(token)) for token in best]
        np.testing.assert_allclose([one["probability"] for one in found], share[best], rtol=1e-4)
    assert records[0]["prediction"].startswith("7")


def test_a_guess_of_eos_does_not_end_the_text():
    found = record(mode("bert"), "7 <mask> 8", (np.array([[3]]), np.array([[0.5]])))
    assert found["prediction"] == "7 8"
    assert found["masks"] == [[{"piece": "<3>", "probability": 0.5}]]


def test_a_decoder_goes_on_from_its_prompt():
    asked = mode("gpt2")
    rows = [asked.encode(item(text)) for text in ("7 8 9", "10")]
    # From start_id, padded on the left; a row that only fills the batch up has the start alone.
    assert asked.rows([*rows, None], 8)[types.DECODER_INPUT_TOKENS].tolist() == [
        [0, 0, 0, 0, 3, 7, 8, 9],
        [0, 0, 0, 0, 0, 0, 3, 10],
        [0, 0, 0, 0, 0, 0, 0, 3],
    ]


def test_a_decoder_is_asked_as_it_was_trained():
    for prompt, expected in (
        ("continue", [3, 7, 8]),
        ("wrapped", [3, 2, 7, 8, 3]),
        ("prefix", [3, 2, 7, 8, 3]),
    ):
        asked = mode("gpt2", asking=Asking(prompt=prompt))
        row = asked.encode(item("7 8"))
        assert row.ids.tolist() == expected
        prefix = asked.rows([row, None], 6).get(types.DECODER_PREFIX)
        if prompt == "prefix":
            assert prefix.tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
        else:
            assert prefix is None
        # What somebody asks for goes before.
        assert encode(mode("gpt2", asking=Asking(prompt=prompt), prompt="continue"), "7") == [3, 7]
    llama = dataclasses.replace(BERT, start_id=2)  # which starts from bos: no second one
    assert encode(mode("llama", vocabulary=llama, prompt="wrapped"), "7 8") == [2, 7, 8, 3]


def test_a_decoder_fills_the_middle():
    asked = mode("gpt2", "infill")
    assert encode(asked, "7 <mask> 8 9") == [3, 95, 7, 94, 8, 9, 93]  # prefix, suffix, middle
    found = record(asked, "7 <mask> 8 9", np.array([5, 6, 3, 0]))
    assert found == {"prediction": "7 5 6 8 9", "filled": ["5 6"]}
    marks = mode("gpt2", "infill", asking=Asking(gaps="middle", middle=(20, 21, 22)))
    assert encode(marks, "7 <mask> 8 9") == [3, 20, 7, 21, 8, 9, 22]


def test_an_encoder_decoder_answers():
    asked = mode("t5_1_0", vocabulary=T5)
    assert encode(asked, "7 8") == [7, 8, 3]
    assert encode(mode("t5_1_0", vocabulary=T5, prefix="9 "), "7 8") == [9, 7, 8, 3]
    for name, token in (("R", 90), ("S", 89), ("X", 88)):  # the last three of the sentinels
        assert encode(mode("t5_1_0", vocabulary=T5, mode_token=name), "7 8") == [token, 7, 8, 3]
    filled = mode("t5_1_0", "infill", vocabulary=T5, mode_token="S")
    assert encode(filled, "7 8 <mask>") == [89, 7, 8, 95, 3]


def test_any_end_ends_a_text():
    loaded = loaded_of("t5_1_0", T5, end_ids=(9, 11))
    asked = modes.make(loaded, None, modes.Options(max_input_tokens=8))
    assert record(asked, "7", np.array([5, 6, 11, 8])) == {"prediction": "5 6"}


def test_sentinels_gaps_are_spliced():
    asked = mode("t5_1_0", "infill", T5)
    text = "7 <mask> 8 <mask>"
    assert encode(asked, text) == [7, 95, 8, 94, 3]
    # In another order, with a sentinel that was not asked for, and text before the first.
    answer = np.array([11, 94, 6, 93, 12, 95, 5, 5, 3, 9])
    assert record(asked, text, answer) == {"prediction": "7 5 5 8 6", "filled": ["5 5", "6"]}
    assert record(asked, text, np.array([95, 5, 3]))["filled"] == ["5", ""]


def test_a_mask_token_has_the_text_written_anew():
    asked = mode("bart", "infill")
    assert encode(asked, "7 <mask> 8") == [2, 7, 4, 8, 3]
    assert record(asked, "7 <mask> 8", np.array([2, 7, 5, 8, 3])) == {"prediction": "7 5 8"}


def test_gaps_are_marked_as_in_training_whatever_the_vocabulary_has():
    asked = mode("bart", "infill", asking=Asking(gaps="sentinels"))  # with a mask, and a bos
    assert encode(asked, "7 <mask> 8") == [7, 95, 8, 3]  # as `denoising_example`: without
    asked = mode("gpt2", "infill", asking=Asking(prompt="prefix", gaps="sentinels"))
    assert encode(asked, "7 <mask> 8") == [3, 7, 95, 8, 3]
    with pytest.raises(InputError, match="reads a mask in the place of a gap, but its vocabulary"):
        encode(mode("t5_1_0", "infill", T5, asking=Asking(gaps="mask")), "7 <mask>")


@pytest.mark.parametrize("family", [SLOW_GPT2, "t5_1_0"])
def test_a_vector_is_the_heads_or_pooled_states(family):
    vocabulary = T5 if family == "t5_1_0" else BERT
    records, batch, params = ask(mode(family, "embed", vocabulary, pooling="last"), ["7 8 9", "10"])
    model = Transformer(config_of(family))
    method = "states" if family == "gpt2" else "encode"
    states = jax.jit(lambda p, b: model.apply({"params": p}, b, method=method))(params, batch)
    key = types.DECODER_SEGMENT_IDS if family == "gpt2" else types.ENCODER_SEGMENT_IDS
    lengths = batch[key].sum(axis=1)
    for row, found in enumerate(records):
        np.testing.assert_allclose(
            found["embedding"], states[row, lengths[row] - 1], rtol=1e-4, atol=1e-5
        )


def test_an_embedding_head_is_the_models_answer():
    head = EmbeddingHead(pooling="mean", normalise=True)
    asked = mode("bert", head=head)
    assert asked.name == "embed"
    records, batch, params = ask(asked, ["7 8 9", "10"])
    expected = jax.jit(asked.loaded.model.apply)({"params": params}, batch)
    for row, found in enumerate(records):
        np.testing.assert_allclose(found["embedding"], expected[row, 0], rtol=1e-4, atol=1e-5)
        assert np.linalg.norm(found["embedding"]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("family", [SLOW_GPT2, "bart"])
def test_a_text_gets_a_label(family):
    asked = mode(family, head=SequenceHead(num_labels=3, pooling="last"))
    assert asked.name == "classify"
    records, batch, params = ask(asked, ["7 8 9", "10"])
    logits = jax.jit(asked.loaded.model.apply)({"params": params}, batch)[:, 0]
    for row, found in enumerate(records):
        share = np.asarray(jax.nn.softmax(logits[row]))
        assert found["prediction"] == str(np.argmax(share))
        np.testing.assert_allclose(list(found["probabilities"].values()), share, rtol=1e-4)
    if family == "bart":  # its decoder reads the text one place later
        assert batch[types.DECODER_INPUT_TOKENS][0].tolist() == [3, 2, 7, 8, 9, 0, 0, 0]
    if family == "gpt2":  # its tokenizer puts nothing before a text
        assert batch[types.DECODER_INPUT_TOKENS][0].tolist() == [7, 8, 9, 0, 0, 0, 0, 0]


def test_labels_have_their_names_and_one_label_is_a_number():
    loaded = loaded_of("bert", head=SequenceHead(num_labels=2), labels=("bad", "good"))
    asked = modes.make(loaded, None, modes.Options(max_input_tokens=8))
    assert record(asked, "7", np.array([0.25, 0.75])) == {
        "prediction": "good",
        "probabilities": {"bad": 0.25, "good": 0.75},
    }
    value = mode("bert", head=SequenceHead(num_labels=1))
    assert record(value, "7", np.array([2.5])) == {"prediction": 2.5}


def test_a_pair_is_read_as_in_training():
    asked = mode("bert", head=SequenceHead(num_labels=2))
    row = asked.encode(item("7 8", pair="9"))
    batch = asked.rows([row, None], 8)
    assert batch[types.ENCODER_INPUT_TOKENS][0].tolist() == [2, 7, 8, 3, 9, 3, 0, 0]
    assert batch[types.ENCODER_TOKEN_TYPES][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    plain = dataclasses.replace(
        common.FAMILIES["bert"].encoder, num_token_types=0
    )  # RoBERTa's have none
    config = dataclasses.replace(config_of("bert", SequenceHead(num_labels=2)), encoder=plain)
    roberta = dataclasses.replace(loaded_of("bert"), model=Transformer(config))
    asked = modes.make(roberta, None, modes.Options(max_input_tokens=8))
    batch = asked.rows([asked.encode(item("7 8", pair="9"))], 8)
    assert batch[types.ENCODER_INPUT_TOKENS][0].tolist() == [2, 7, 8, 3, 3, 9, 3, 0]
    assert types.ENCODER_TOKEN_TYPES not in batch
    with pytest.raises(InputError, match="a pair of texts is for an encoder alone"):
        mode("gpt2", head=SequenceHead(num_labels=2)).encode(item("7", pair="8"))


def test_words_get_the_labels_of_their_first_tokens():
    loaded = loaded_of("bert", head=TokenHead(num_labels=2), labels=("O", "X"))
    asked = modes.make(loaded, None, modes.Options(max_input_tokens=12))
    text = " 7  8 9"
    row = asked.encode(item(text))
    assert row.ids.tolist() == [2, 7, 8, 9, 3]
    answer = np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.0, 1.0]])
    found = asked.record(item(text), row, answer)
    assert found["prediction"] == ["O", "X", "O"]
    assert found["words"][1] == {
        "word": "8",
        "start": 4,
        "end": 5,
        "label": "X",
        "probability": 0.8,
    }
    for one in found["words"]:
        assert text[one["start"] : one["end"]] == one["word"]


def scored(asked, row):
    """The sum of log-probabilities of a decoder's row, by a plain call."""
    model, params = asked.loaded.model, harness.host_params(asked.loaded.model.config)
    tokens = np.concatenate([row.ids, row.targets])
    batch = {types.DECODER_INPUT_TOKENS: tokens[None, :-1]}
    first = len(row.ids) - 1
    if asked.prompt == "prefix":
        seen = np.arange(len(tokens) - 1) <= first
        batch[types.DECODER_PREFIX] = seen[None].astype(np.int32)
    logprobs = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, batch)[0])
    return sum(float(logprobs[place, tokens[place + 1]]) for place in range(first, len(tokens) - 1))


@pytest.mark.parametrize(
    ("prompt", "fields", "ids", "targets"),
    [
        ("prefix", {"targets": "9"}, [3, 2, 7, 8, 3], [2, 9, 3]),
        pytest.param(None, {"targets": " 9"}, [3, 7, 8], [9], marks=pytest.mark.slow),
    ],
)
def test_a_score_is_the_sum_of_log_probabilities(prompt, fields, ids, targets):
    asked = mode("gpt2", "score", prompt=prompt)
    row = asked.encode(item("7 8", **fields))
    assert (row.ids.tolist(), row.targets.tolist()) == (ids, targets)
    (found, _), _, _ = ask(asked, [item("7 8", **fields), item("7", targets="8 9 10")])
    assert found["log_likelihood"] == pytest.approx(scored(asked, row), rel=1e-4)
    assert found["tokens"] == len(targets)
    assert found["perplexity"] == pytest.approx(np.exp(-found["log_likelihood"] / len(targets)))


def test_what_is_scored_is_the_text_or_its_targets():
    row = mode("gpt2", "score").encode(item("7 8"))
    assert (row.ids.tolist(), row.targets.tolist()) == ([3], [7, 8])
    row = mode("gpt2", "score", mode_token="R").encode(item("7 8", targets="9"))
    assert (row.ids.tolist(), row.targets.tolist()) == ([3, 90, 7, 8], [9])
    row = mode("t5_1_0", "score", T5, mode_token="R").encode(item("7 8", targets="9"))
    assert (row.ids.tolist(), row.targets.tolist()) == ([90, 7, 8, 3], [9, 3])
    row = mode("bart", "score").encode(item("7 8", targets="9"))
    assert (row.ids.tolist(), row.targets.tolist()) == ([2, 7, 8, 3], [2, 9, 3])
    with pytest.raises(InputError, match="scores targets behind inputs, and this input has none"):
        mode("bart", "score").encode(item("7"))


def test_answers_come_in_the_inputs_order_from_one_program_a_bucket():
    loaded = loaded_of("bert", params=harness.host_params(config_of("bert")))
    asked = modes.make(loaded, "embed", modes.Options(max_input_tokens=24))
    texts = [" ".join(["7"] * length) for length in (20, 1, 9, 2, 12, 3, 21)]
    rows = [asked.encode(item(text)) for text in texts]
    asker = Asker(asked, 2)
    found = [one for window in asker.answers(rows) for one in window]
    alone = [asker.batch([row], [0])[0] for row in rows]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
    # Of 3 to 23 tokens: 8, 16, and 24 instead of 32, which the option forbids.
    assert asker._program._cache_size() == 3
    with pytest.raises(InputError, match=r"infer\.batch_size=0: expected at least 1"):
        Asker(asked, 0)


def test_spaces_before_a_gap_go_and_those_behind_stay():
    assert gaps.gaps("a <mask> b  <mask>.") == ["a", " b", "."]


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
    assert gaps.spliced(text, fillings) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 0}, "infer.candidates=0: expected at least 1"),
        ({"candidates": 97}, "infer.candidates=97: the model knows no more than 96"),
        ({"max_tokens": 0}, "infer.max_tokens=0"),
        ({"max_input_tokens": 0}, "infer.max_input_tokens=0"),
        ({"pooling": "max"}, "infer.pooling='max': expected one of first, last, mean"),
        ({"pooling": "mean"}, "infer.pooling='mean' is not for mode 'fill_mask'"),
        ({"stop": ("x",)}, "infer.stop=.* is not for mode 'fill_mask'"),
        ({"stop": ("",)}, "infer.stop has an empty text"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        mode("bert", **changes)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("bert", "generate", "'generate' is not for an encoder alone, which does: fill_mask, emb"),
        ("gpt2", "fill_mask", "not for a decoder alone, which does: generate, infill, score, emb"),
        ("bart", "tag", "not for an encoder-decoder, which does: generate, infill, score, embed"),
    ],
)
def test_a_mode_that_the_model_cannot_do_is_refused(family, name, message):
    with pytest.raises(InputError, match=message):
        mode(family, name)


@pytest.mark.parametrize("name", LABELLED)
def test_a_head_has_its_own_modes(name):
    head = LABELLED[name]
    assert mode("bert", head=head).name == name
    kind = type(head).__name__
    with pytest.raises(InputError, match=f"not for an encoder alone with an? {kind}, which does"):
        mode("bert", "fill_mask", head=head)


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
        (lambda: mode("bart", max_input_tokens=4), "7 8 9", "5 tokens with the specials"),
        (
            lambda: mode(
                "gpt2", mode_token="R", vocabulary=dataclasses.replace(BERT, num_sentinels=2)
            ),
            "7",
            "is one of UL2's last three sentinels, but the vocabulary has 2",
        ),
        (lambda: mode("bart", prompt="wrapped"), "7", "infer.prompt='wrapped' is for a decoder"),
    ],
)
def test_what_the_mode_cannot_take_is_refused(asked, text, message):
    with pytest.raises(InputError, match=message):
        asked().encode(item(text))


def test_rows_longer_than_the_learned_positions_are_refused():
    mode("gpt2", max_input_tokens=16, max_tokens=17)
    with pytest.raises(InputError, match="33 decoder tokens, but the model learned 32"):
        mode("gpt2", max_input_tokens=16, max_tokens=18)
    with pytest.raises(InputError, match="33 encoder tokens"):
        mode("bart", max_input_tokens=33, max_tokens=8)
    mode("llama", max_input_tokens=1000, max_tokens=1000)
    mode("gpt2", "score", max_input_tokens=32, max_tokens=64)
    assert modes.room(loaded_of("gpt2"), "generate", 8) == 25
    assert modes.room(loaded_of("gpt2"), "score", 8) == 32
    assert modes.room(loaded_of("bert"), None, 64) == 32
    assert modes.room(loaded_of("llama"), None, 64) == 128


def test_batches_that_do_not_divide_are_refused():
    loaded = dataclasses.replace(loaded_of("bert"), partitioner=Partitioner(data=2, model=4))
    asked = modes.make(loaded, "embed", modes.Options(max_input_tokens=8))
    with pytest.raises(InputError, match="batch_size=3 is not divisible by 2"):
        Asker(asked, 3)
