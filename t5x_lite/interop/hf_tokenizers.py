"""Hugging Face's tokenizer files as vocabularies, and a vocabulary's file under their name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

from t5x_lite.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from t5x_lite.interop import safetensors_files as files
from t5x_lite.types import InputError

# What a folder may hold -> the vocabulary of that file, with its sentinels; the first one counts.
_KINDS: Final[Mapping[str, Callable[[str], Vocabulary]]] = {
    "spiece.model": lambda path: SentencePieceVocabulary(path),  # T5: 100 sentinels on top
    "tokenizer.model": lambda path: SentencePieceVocabulary(path, extra_ids=0),  # Llama
}


def find_vocabulary(directory: str) -> Vocabulary:
    """The vocabulary of a model's directory. Raises InputError if it holds no tokenizer's file."""
    for name, make in _KINDS.items():
        path = os.path.join(directory, name)
        if os.path.exists(path):
            return make(path)
    settings = os.path.join(directory, "tokenizer_config.json")
    if os.path.exists(settings):
        kind = str(files.read_json(settings).get("tokenizer_class", ""))
        if kind.startswith("ByT5Tokenizer"):  # bytes have no file
            return ByteVocabulary()
    raise InputError(
        f"'{directory}' holds no tokenizer's file ({', '.join(_KINDS)}): put it there, or name a "
        "vocabulary, for instance --vocabulary=@ByteVocabulary()"
    )
