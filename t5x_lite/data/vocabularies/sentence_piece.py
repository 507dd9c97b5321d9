"""SentencePiece models: unigram and BPE, with or without byte fallback."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sentencepiece

from t5x_lite.data.vocabularies.base import (
    BaseVocabulary,
    check_extra_ids,
    read_bytes,
    write_atomically,
)
from t5x_lite.types import InputError

_SPACE = "▁"
_MASKS = ("<mask>", "[MASK]")


@dataclass(frozen=True)
class SentencePieceVocabulary(BaseVocabulary):
    """A SentencePiece model file and `extra_ids` sentinels above its pieces.

    Loads T5's published `spiece.model` (32,000 pieces, so 32,100 ids), Llama's `tokenizer.model`
    (with `extra_ids=0`) and files written by `train_sentencepiece`. A file without a pad piece, as
    Llama's, pads with its eos: what is padded has segment 0 and is never seen.

    `start_token` is the piece that a decoder's input begins with; by default the file's bos
    (Llama), or else padding (T5). The mask is a control piece `<mask>` or `[MASK]`.

    Raises InputError for a missing file, a file that is no SentencePiece model, a model without an
    eos piece, and a start_token that it does not have.
    """

    path: str
    extra_ids: int = 100
    start_token: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))
        check_extra_ids(self.extra_ids)
        if self._processor.eos_id() < 0:
            raise InputError(
                f"vocabulary '{self.path}' has no eos piece: train it with "
                "scripts/train_vocab.py, or with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1"
            )
        _ = self.start_id

    @functools.cached_property
    def _model(self) -> bytes:
        return read_bytes(self.path, "a SentencePiece model")

    @functools.cached_property
    def _processor(self) -> Any:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            if not self._model:
                raise RuntimeError("the file is empty")
            processor.LoadFromSerializedProto(self._model)
        except RuntimeError as error:
            raise InputError(
                f"vocabulary file '{self.path}' is not a SentencePiece model ({error}); "
                "expected a file such as T5's spiece.model"
            ) from error
        return processor

    @property
    def num_sentinels(self) -> int:  # type: ignore[override]
        return self.extra_ids

    @functools.cached_property
    def size(self) -> int:  # type: ignore[override]
        return int(self._processor.get_piece_size()) + self.extra_ids

    @functools.cached_property
    def pad_id(self) -> int:  # type: ignore[override]
        pad = int(self._processor.pad_id())
        return pad if pad >= 0 else self.eos_id

    @functools.cached_property
    def eos_id(self) -> int:  # type: ignore[override]
        return int(self._processor.eos_id())

    @functools.cached_property
    def unk_id(self) -> int:
        return int(self._processor.unk_id())

    @functools.cached_property
    def bos_id(self) -> int | None:
        bos = int(self._processor.bos_id())
        return bos if bos >= 0 else None

    @functools.cached_property
    def mask_id(self) -> int | None:
        found = (self._find(mask) for mask in _MASKS)
        return next((i for i in found if i is not None and self._processor.is_control(i)), None)

    @functools.cached_property
    def start_id(self) -> int:  # type: ignore[override]
        if self.start_token is None:
            return self.pad_id if self.bos_id is None else self.bos_id
        found = self._find(self.start_token)
        if found is None:
            raise InputError(
                f"vocabulary '{self.path}' has no piece '{self.start_token}', its start_token"
            )
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model file's bytes and the fields; the path is left out."""
        fields = f"|extra_ids={self.extra_ids}"
        if self.start_token is not None:
            fields += f"|start={self.start_id}"
        return hashlib.sha256(self._model + fields.encode()).hexdigest()

    def stored(self, path: str) -> SentencePieceVocabulary:
        """Writes the model file to `path` and returns the vocabulary that reads it there."""
        write_atomically(path, self._model)
        return replace(self, path=path)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[length]`, without eos."""
        return np.asarray(self._processor.encode(text), dtype=np.int32)

    def _find(self, piece: str) -> int | None:
        found = int(self._processor.piece_to_id(piece))
        return found if self._processor.id_to_piece(found) == piece else None

    def _controls(self) -> set[int]:
        pieces = range(self._processor.get_piece_size())
        return {i for i in pieces if self._processor.is_control(i)}

    def _decode_run(self, ids: list[int | None]) -> str:
        return self._processor.decode(ids) if ids else ""

    def _piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def _begins(self, token: int) -> bool:
        return self._piece(token).startswith(_SPACE)

    def _text(self, token: int) -> str:
        if self._processor.is_byte(token):
            return chr(int(self._piece(token)[3:-1], 16))
        return self._piece(token).replace(_SPACE, " ")
