"""A directory's tokenizer files make the vocabulary that its model was trained with."""

from __future__ import annotations

import json

import pytest

from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    train_byte_level,
    train_sentencepiece,
)
from t5x_lite.interop.hf_tokenizers import find_vocabulary
from t5x_lite.types import InputError

TEXTS = [f"the river {i} and the bread of day {i * 7}" for i in range(200)]


def test_sentence_pieces_count_first_with_t5s_sentinels_or_none(tmp_path):
    train_sentencepiece(TEXTS, tmp_path / "trained.model", vocab_size=298)
    for name, extra_ids in (("spiece.model", 100), ("tokenizer.model", 0)):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_bytes((tmp_path / "trained.model").read_bytes())
        (folder / "tokenizer.json").write_text("{}")
        expected = SentencePieceVocabulary(str(folder / name), extra_ids=extra_ids)
        assert find_vocabulary(str(folder)) == expected


def test_a_decoders_start_is_what_the_config_says(tmp_path):
    vocabulary = train_byte_level(TEXTS, tmp_path / "tokenizer.json", vocab_size=300)
    assert find_vocabulary(str(tmp_path)).start_id == vocabulary.start_id
    end = vocabulary.eos_id if vocabulary.eos_id != vocabulary.start_id else vocabulary.pad_id
    (tmp_path / "config.json").write_text(json.dumps({"decoder_start_token_id": end}))
    found = find_vocabulary(str(tmp_path))
    assert isinstance(found, TokenizersVocabulary)
    assert found.start_id == end
    assert list(found.encode("bread")) == list(vocabulary.encode("bread"))


def test_bytes_have_no_file_and_nothing_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer's file \(spiece.model"):
        find_vocabulary(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert find_vocabulary(str(tmp_path)) == ByteVocabulary()
