"""Text as its UTF-8 bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from t5x_lite.data.vocabularies.base import BaseVocabulary, check_extra_ids

_SPECIALS = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class ByteVocabulary(BaseVocabulary):
    """UTF-8 bytes: id = byte + 3 (ByT5, Xue et al. 2022, arXiv:2105.13626).

    `encode("Hi")` is `[75, 108]`. Nothing is unknown; ids that are not valid UTF-8 together decode
    to the replacement character. There is no bos and no mask; a decoder starts from padding.
    """

    extra_ids: int = 100

    def __post_init__(self) -> None:
        check_extra_ids(self.extra_ids)

    @property
    def num_sentinels(self) -> int:  # type: ignore[override]
        return self.extra_ids

    @property
    def size(self) -> int:  # type: ignore[override]
        return 3 + 256 + self.extra_ids

    @property
    def pad_id(self) -> int:  # type: ignore[override]
        return 0

    @property
    def eos_id(self) -> int:  # type: ignore[override]
        return 1

    @property
    def unk_id(self) -> int:
        return 2

    @property
    def bos_id(self) -> None:
        return None

    @property
    def mask_id(self) -> None:
        return None

    @property
    def start_id(self) -> int:  # type: ignore[override]
        return self.pad_id

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"bytes+3|extra_ids={self.extra_ids}".encode()).hexdigest()

    def stored(self, path: str) -> ByteVocabulary:
        """Itself: there is no file."""
        return self

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[length]`, without eos."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) + 3

    def _decode_run(self, ids: list[int | None]) -> str:
        return bytes(i - 3 for i in ids if i is not None and i >= 3).decode("utf-8", "replace")

    def _piece(self, token: int) -> str:
        """The printable ASCII character, `<0x..>` for another byte, or a special's name."""
        if token < len(_SPECIALS):
            return _SPECIALS[token]
        byte = token - 3
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"

    def _begins(self, token: int) -> bool:
        return chr(token - 3).isspace() and token - 3 < 128

    def _text(self, token: int) -> str:
        return chr(token - 3) if token - 3 < 128 else ""
