"""The tokenizer files of a Hugging Face directory, as a vocabulary."""

from __future__ import annotations

import os
from typing import Final

from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    Vocabulary,
)
from t5x_lite.interop import safetensors_files as files
from t5x_lite.types import InputError

_SENTENCE_PIECES: Final = ("spiece.model", "tokenizer.model")  # T5's name, and Llama's
_TOKENIZERS: Final = ("tokenizer.json", "vocab.json", "vocab.txt")


def find_vocabulary(directory: str) -> Vocabulary:
    """The vocabulary of a model's directory, sentinels as the model was published with.

    A SentencePiece file counts before others. What a decoder's input begins with is taken from
    `config.json` where it says so. Raises InputError if the directory holds no tokenizer's file.
    """
    start = _read(directory, "config.json").get("decoder_start_token_id")
    vocabulary = _make(directory, None)
    if start is None or start == vocabulary.start_id or isinstance(vocabulary, ByteVocabulary):
        return vocabulary
    return _make(directory, vocabulary.piece(int(str(start))))


def _make(directory: str, start_token: str | None) -> Vocabulary:
    for name in _SENTENCE_PIECES:
        path = os.path.join(directory, name)
        if os.path.exists(path):
            extra_ids = 100 if name == "spiece.model" else 0
            return SentencePieceVocabulary(path, extra_ids=extra_ids, start_token=start_token)
    if any(os.path.exists(os.path.join(directory, name)) for name in _TOKENIZERS):
        return TokenizersVocabulary(directory, start_token=start_token)
    kind = str(_read(directory, "tokenizer_config.json").get("tokenizer_class", ""))
    if kind.startswith("ByT5Tokenizer"):  # bytes have no file
        return ByteVocabulary()
    raise InputError(
        f"'{directory}' holds no tokenizer's file ({', '.join((*_SENTENCE_PIECES, *_TOKENIZERS))}):"
        " put it there, or name a vocabulary, for instance --vocabulary='@ByteVocabulary()'"
    )


def _read(directory: str, name: str) -> dict[str, object]:
    path = os.path.join(directory, name)
    return files.read_json(path) if os.path.exists(path) else {}
