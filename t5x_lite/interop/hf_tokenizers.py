"""The tokenizer files of a Hugging Face directory, as a vocabulary."""

from __future__ import annotations

import os
import shutil
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


def save_vocabulary(directory: str, vocabulary: Vocabulary) -> None:
    """Writes the vocabulary's file and a `tokenizer_config.json` with its special tokens.

    The inverse of `find_vocabulary`, for a directory with the model's `config.json`.
    """
    specials: dict[str, object] = {  # null: there is none, whatever the file's look suggests
        name: None if token is None else vocabulary.piece(token)
        for name, token in (
            ("pad_token", vocabulary.pad_id),
            ("eos_token", vocabulary.eos_id),
            ("bos_token", vocabulary.bos_id),
            ("unk_token", vocabulary.unk_id),
            ("mask_token", vocabulary.mask_id),
        )
    }
    kind: str
    match vocabulary:
        case ByteVocabulary(extra_ids=extra_ids):
            kind, specials = "ByT5Tokenizer", {"extra_ids": extra_ids}
        case SentencePieceVocabulary(path=path, extra_ids=0):  # as Llama's file is called
            kind = "LlamaTokenizer"
            shutil.copyfile(path, os.path.join(directory, "tokenizer.model"))
        case SentencePieceVocabulary(path=path, extra_ids=extra_ids):
            kind, specials = "T5Tokenizer", {**specials, "extra_ids": extra_ids}
            shutil.copyfile(path, os.path.join(directory, "spiece.model"))
        case _:
            kind = "PreTrainedTokenizerFast"
            vocabulary.stored(os.path.join(directory, "tokenizer.json"))
    files.write_json(
        os.path.join(directory, "tokenizer_config.json"), {"tokenizer_class": kind, **specials}
    )


def _make(directory: str, start_token: str | None) -> Vocabulary:
    settings = _read(directory, "tokenizer_config.json")
    extra = settings.get("extra_ids")
    for name in _SENTENCE_PIECES:
        path = os.path.join(directory, name)
        if os.path.exists(path):
            extra_ids = (100 if name == "spiece.model" else 0) if extra is None else int(str(extra))
            return SentencePieceVocabulary(path, extra_ids=extra_ids, start_token=start_token)
    if any(os.path.exists(os.path.join(directory, name)) for name in _TOKENIZERS):
        return TokenizersVocabulary(directory, start_token=start_token)
    if str(settings.get("tokenizer_class", "")).startswith("ByT5Tokenizer"):  # bytes have no file
        return ByteVocabulary() if extra is None else ByteVocabulary(int(str(extra)))
    raise InputError(
        f"'{directory}' holds no tokenizer's file ({', '.join((*_SENTENCE_PIECES, *_TOKENIZERS))}):"
        " put it there, or name a vocabulary, for instance --vocabulary='@ByteVocabulary()'"
    )


def _read(directory: str, name: str) -> dict[str, object]:
    path = os.path.join(directory, name)
    return files.read_json(path) if os.path.exists(path) else {}
