"""The tokenizer files of a Hugging Face directory, as a vocabulary."""

from __future__ import annotations

import os
import re
import shutil
from typing import Final

from tokenizers import Tokenizer, processors

from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    Vocabulary,
)
from t5x_lite.interop import safetensors_files as files
from t5x_lite.models.config import ModelConfig
from t5x_lite.types import InputError

_SENTENCE_PIECES: Final = ("spiece.model", "tokenizer.model")  # T5's name, and Llama's
_TOKENIZERS: Final = ("tokenizer.json", "vocab.json", "vocab.txt")


def find_vocabulary(directory: str) -> Vocabulary:
    """The vocabulary of a model's directory, sentinels as the model was published with.

    A SentencePiece file counts before others. What a decoder's input begins with is taken from
    `config.json` where it says so: `decoder_start_token_id`, or of a decoder alone `bos_token_id`.
    Raises InputError if the directory holds no tokenizer's file.
    """
    settings = _read(directory, "config.json")
    start = settings.get("decoder_start_token_id")
    if start is None and re.search("ForCausalLM|LMHeadModel", str(settings.get("architectures"))):
        start = settings.get("bos_token_id")
    vocabulary = _make(directory, None)
    if not isinstance(start, int) or start == vocabulary.start_id:
        return vocabulary
    if isinstance(vocabulary, ByteVocabulary) or not 0 <= start < vocabulary.size:
        return vocabulary
    return _make(directory, vocabulary.piece(start))


def save_vocabulary(directory: str, vocabulary: Vocabulary, config: ModelConfig) -> None:
    """Writes the vocabulary's file and a `tokenizer_config.json` with its special tokens.

    The inverse of `find_vocabulary`, for a directory with the model's `config.json`. What
    transformers' tokenizer puts around a text is what the model was trained on: `[bos] text eos`,
    or before a decoder alone its start.
    """
    decoder_alone = config.encoder is None
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
        case SentencePieceVocabulary(path=path, extra_ids=extra_ids) if decoder_alone:
            start = {"bos_token": vocabulary.piece(vocabulary.start_id), "add_bos_token": True}
            kind, specials = "LlamaTokenizer", {**specials, **start, "extra_ids": extra_ids}
            shutil.copyfile(path, os.path.join(directory, "tokenizer.model"))  # Llama's name
        case SentencePieceVocabulary(path=path, extra_ids=extra_ids):
            kind, specials = "T5Tokenizer", {**specials, "extra_ids": extra_ids}
            shutil.copyfile(path, os.path.join(directory, "spiece.model"))
        case _:
            kind, path = "PreTrainedTokenizerFast", os.path.join(directory, "tokenizer.json")
            vocabulary.stored(path)
            _wrap_texts(path, vocabulary, decoder_alone)
    files.write_json(
        os.path.join(directory, "tokenizer_config.json"), {"tokenizer_class": kind, **specials}
    )


def _wrap_texts(path: str, vocabulary: Vocabulary, decoder_alone: bool) -> None:
    """Gives a `tokenizer.json` that puts nothing around texts what the model expects there."""
    tokenizer = Tokenizer.from_file(path)
    if not isinstance(tokenizer.post_processor, processors.ByteLevel | None):
        return
    if decoder_alone:
        before, after = [vocabulary.start_id], []
    else:
        before = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
        after = [vocabulary.eos_id]
    first, last = ([vocabulary.piece(token) for token in part] for part in (before, after))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, "$B:1", *(f"{piece}:1" for piece in last)],
        special_tokens=[(vocabulary.piece(token), token) for token in {*before, *after}],
    )
    tokenizer.save(path)


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
