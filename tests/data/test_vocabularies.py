"""Vocabularies: round trips, T5's id layout, determinism, pickling, and every error."""

import collections
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    count_bytes,
    sample,
    train_sentencepiece,
)
from t5x_lite.data.vocabularies.training import _cut
from t5x_lite.types import InputError

TEXTS = [
    "In the beginning was the word, and the word was long.",
    "The river runs to the sea; yet the sea is not full.",
    "A time to plant, and a time to pluck up that which is planted.",
] * 20


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "text.model"
    return train_sentencepiece(TEXTS, path, vocab_size=298)


def test_ids_are_t5s(vocabulary):
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.size == 298 + 100
    assert vocabulary.sentinel_id(0) == vocabulary.size - 1
    assert vocabulary.piece(vocabulary.sentinel_id(7)) == "<extra_id_7>"
    assert vocabulary.piece(1) == "</s>"
    assert isinstance(vocabulary, Vocabulary)
    assert isinstance(ByteVocabulary(), Vocabulary)


def test_bytes_are_those_of_the_text_between_specials(vocabulary):
    for one in (vocabulary, ByteVocabulary()):
        first, second = one.encode("the river"), one.encode("a sea")
        eos, sentinel = [one.eos_id], [one.sentinel_id(0)]
        assert count_bytes(one, first) == len("the river")
        ids = np.concatenate([sentinel, first, eos, eos, second, sentinel, eos])
        assert count_bytes(one, ids) == len("the river") + len("a sea")
        assert count_bytes(one, eos) == count_bytes(one, []) == 0
    assert count_bytes(ByteVocabulary(), ByteVocabulary().encode("é€")) == 5


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_round_trip(text):
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == [byte + 3 for byte in text.encode()]
    assert vocabulary.decode(ids) == text


def test_byte_fallback_leaves_nothing_unknown(vocabulary):
    text = "Ωmega 火 and the sea"
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert vocabulary.unk_id not in ids
    assert vocabulary.decode(ids) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_decode_stops_at_eos_skips_padding_and_shows_sentinels(kind, vocabulary):
    v = vocabulary if kind == "sentencepiece" else ByteVocabulary()
    ids = [v.sentinel_id(0), *v.encode("the sea"), 0, 0, v.sentinel_id(1), v.eos_id]
    assert v.decode([*ids, *v.encode("unseen")]) == "<extra_id_0> the sea <extra_id_1>"


def test_training_is_deterministic_and_the_fingerprint_is_of_the_content(vocabulary, tmp_path):
    again = train_sentencepiece(TEXTS, tmp_path / "other" / "name.model", vocab_size=298)
    assert again.fingerprint == vocabulary.fingerprint
    other = train_sentencepiece(TEXTS, tmp_path / "smaller.model", vocab_size=296)
    assert other.fingerprint != vocabulary.fingerprint
    fewer = SentencePieceVocabulary(vocabulary.path, extra_ids=99)
    assert fewer.fingerprint != vocabulary.fingerprint
    assert ByteVocabulary(10).fingerprint != ByteVocabulary(11).fingerprint


SAMPLED = """
import sys
from t5x_lite.data.vocabularies import train_sentencepiece
texts = [f"word{i % 7} of line {i} and {'abcdefgh'[i % 8] * 3}" for i in range(400)]
one = train_sentencepiece(texts, sys.argv[1], vocab_size=300, max_sentences=50, seed=3)
print(one.fingerprint)
"""


def test_a_sampled_vocabulary_is_the_same_in_every_process(tmp_path):
    """Else a run could not be repeated from its config: the fingerprint would differ."""
    command = [sys.executable, "-c", SAMPLED, str(tmp_path / "a.model")]
    found = {
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert len(found) == 1


def test_samples_are_even_and_keyed_by_the_seed():
    items = [str(i) for i in range(20)]
    assert sample(items, 50, 0) == items
    assert sample(items, 5, 1) == sample(items, 5, 1) != sample(items, 5, 2)
    counts = collections.Counter(item for seed in range(2000) for item in sample(items, 5, seed))
    assert all(400 < counts[item] < 600 for item in items)  # 500 expected, deviation 19


def test_pickle_carries_the_path_not_the_model(vocabulary):
    vocabulary.encode("warm the cache")
    data = pickle.dumps(vocabulary)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert copy == vocabulary
    np.testing.assert_array_equal(copy.encode("the sea"), vocabulary.encode("the sea"))


def test_bpe_trains(tmp_path):
    v = train_sentencepiece(TEXTS, tmp_path / "bpe.model", vocab_size=300, model_type="bpe")
    assert v.decode(v.encode("a time to plant")) == "a time to plant"


def test_long_texts_are_cut_not_skipped():
    text = "word " * 5000 + "x" * 3000 + "\n\n tail"
    pieces = list(_cut(text))
    assert max(len(piece.encode()) for piece in pieces) <= 4096
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_input_errors(tmp_path, vocabulary):
    with pytest.raises(InputError, match="cannot be read"):
        SentencePieceVocabulary(str(tmp_path / "none.model"))
    for content in (b"", b"not a model at all"):
        bad = tmp_path / "bad.model"
        bad.write_bytes(content)
        with pytest.raises(InputError, match="not a SentencePiece model"):
            SentencePieceVocabulary(str(bad))
    prefix = str(tmp_path / "default")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, vocab_size=40, minloglevel=2
    )
    with pytest.raises(InputError, match="has no piece '<start>', its start_token"):
        SentencePieceVocabulary(prefix + ".model", start_token="<start>")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, vocab_size=40, minloglevel=2, eos_id=-1
    )
    with pytest.raises(InputError, match="has no eos piece"):
        SentencePieceVocabulary(prefix + ".model")
    for nothing in ([], ["", "  \n "]):
        with pytest.raises(InputError, match="training text is empty"):
            train_sentencepiece(nothing, tmp_path / "e.model", vocab_size=300)
    with pytest.raises(InputError, match=r"vocab_size=30000 .*(<=|less|too high)"):
        train_sentencepiece(TEXTS, tmp_path / "e.model", vocab_size=30000)
    with pytest.raises(InputError, match="vocab_size=20 "):
        train_sentencepiece(TEXTS, tmp_path / "e.model", vocab_size=20)
    assert not (tmp_path / "e.model").exists()
    with pytest.raises(InputError, match="extra_ids"):
        vocabulary.sentinel_id(100)
    with pytest.raises(InputError, match="extra_ids"):
        ByteVocabulary(-1)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_ids_beyond_the_vocabulary_decode_as_unknown(kind, vocabulary):
    """A model's embedding is often larger than its vocabulary, and may predict any row of it."""
    one = vocabulary if kind == "sentencepiece" else ByteVocabulary()
    known = one.encode("the sea").tolist()
    assert one.decode([*known, one.size, one.size + 50]) == one.decode([*known, 2, 2])
