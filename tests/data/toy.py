"""A vocabulary of numbers, for tests that must know which ids are what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from t5x_lite.types import InputError


@dataclasses.dataclass(frozen=True)
class ToyVocabulary:
    """Text is numbers: "12 15". The top `num_sentinels` ids are sentinels.

    BERT's shape by default: 0 pad, 1 unk, 2 bos, 3 eos, 4 mask. Ids that 3 divides begin a word,
    ids that end with 9 end a sentence.
    """

    size: int = 400
    num_sentinels: int = 120
    pad_id: int = 0
    unk_id: int | None = 1
    bos_id: int | None = 2
    eos_id: int = 3
    mask_id: int | None = 4
    start_id: int = 3

    @property
    def special_ids(self) -> frozenset[int]:
        ids = (self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id)
        return frozenset(i for i in ids if i is not None)

    @property
    def fingerprint(self) -> str:
        return str(self)

    def sentinel_id(self, k: int) -> int:
        if not 0 <= k < self.num_sentinels:
            raise InputError(f"sentinel {k} does not exist")
        return self.size - 1 - k

    def encode(self, text: str) -> np.ndarray:
        return np.array(text.split(), dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        words = []
        for token in np.asarray(ids).tolist():
            if token == self.eos_id:
                break
            if token not in self.special_ids:
                words.append(str(token))
        return " ".join(words)

    def piece(self, token: int) -> str:
        return f"<{token}>" if token in self.special_ids else str(token)

    def starts_word(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(ids) % 3 == 0

    def ends_sentence(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(ids) % 10 == 9


BERT = ToyVocabulary()
GPT = ToyVocabulary(bos_id=None, eos_id=3, mask_id=None, start_id=3)
LLAMA = ToyVocabulary(bos_id=2, start_id=2, mask_id=None)
T5 = ToyVocabulary(bos_id=None, mask_id=None, start_id=0)


def text(length: int, seed: int = 0, specials: int = 0) -> np.ndarray:
    """Random ordinary tokens of the toy vocabularies, `specials` of them eos."""
    rng = np.random.default_rng([seed, length])
    tokens = rng.integers(5, 280, length).astype(np.int32)
    tokens[rng.permutation(length)[:specials]] = 3
    return tokens
