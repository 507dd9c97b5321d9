"""What every vocabulary offers, and what all of them share.

The `extra_ids` highest ids are sentinels, and `<extra_id_0>` is the very highest, as in T5's
published models (Raffel et al. 2020, arXiv:1910.10683); the ids below are the file's own:

    id      0 ... size-extra_ids-1      size-extra_ids ... size-2           size-1
    piece   specials, pieces or bytes   <extra_id_99>  ... <extra_id_1>  <extra_id_0>
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from t5x_lite.types import InputError

# A full stop and its kin, in Latin and in full width, then any closing quotes and brackets.
_SENTENCE_END = re.compile(r"[.!?。！？][\"'’”»)\]}」』]*\s*\Z")  # noqa: RUF001


@runtime_checkable
class Vocabulary(Protocol):
    """What the rest of the project asks of a vocabulary.

    A text is wrapped for an encoder as `[bos] + encode(text) + [eos]`, bos only if there is one; a
    decoder's input begins with `start_id`. Roles may share an id: GPT-2's bos, eos and padding do.
    """

    @property
    def size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def unk_id(self) -> int | None: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def mask_id(self) -> int | None: ...
    @property
    def start_id(self) -> int: ...
    @property
    def num_sentinels(self) -> int: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...
    def sentinel_id(self, k: int) -> int: ...
    def piece(self, token: int) -> str: ...
    def starts_word(self, ids: Sequence[int] | np.ndarray) -> np.ndarray: ...
    def ends_sentence(self, ids: Sequence[int] | np.ndarray) -> np.ndarray: ...
    def stored(self, path: str) -> Vocabulary: ...


class BaseVocabulary:
    """What vocabularies share: sentinels on top, decoding around specials, tables over the ids.

    A subclass is a frozen dataclass that adds `size`, the special ids, `fingerprint`, `encode` and
    the methods with an underscore. Ids that a file lacks are None.
    """

    # Declared for the type checker: fields and properties of the subclasses.
    num_sentinels: int
    size: int
    pad_id: int
    eos_id: int
    unk_id: Any
    bos_id: Any
    mask_id: Any
    start_id: int

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what was loaded is loaded again where it is needed."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: getattr(self, field.name) for field in fields}

    def sentinel_id(self, k: int) -> int:
        """The id of `<extra_id_k>`: `size - 1 - k`. Raises InputError beyond the last one."""
        if not 0 <= k < self.num_sentinels:
            raise InputError(
                f"sentinel <extra_id_{k}> does not exist: the vocabulary has {self.num_sentinels} "
                "of them; raise extra_ids"
            )
        return self.size - 1 - k

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text becomes and no noise may touch; unk and the sentinels are among them."""
        roles = (self.pad_id, self.eos_id, self.unk_id, self.bos_id, self.mask_id, self.start_id)
        sentinels = range(self.size - self.num_sentinels, self.size)
        return frozenset({i for i in roles if i is not None} | self._controls() | {*sentinels})

    def piece(self, token: int) -> str:
        """The piece as its file writes it ('▁' or 'Ġ' is a space), or `<extra_id_k>`."""
        if self.size - self.num_sentinels <= token < self.size:
            return f"<extra_id_{self.size - 1 - token}>"
        return self._piece(int(token))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` up to the first eos; sentinels as `<extra_id_k>`, no other specials.

        Where eos also begins texts (as bos in GPT-2, as the decoder's start in BART), it ends
        nothing in the first place. Unknown tokens stay visible, as the library writes them, and so
        do ids that the vocabulary does not have: a model's table may be larger.
        """
        tokens: list[int] = np.asarray(ids, dtype=np.int64).tolist()
        if tokens[:1] == [self.eos_id] and self.eos_id in (self.bos_id, self.start_id):
            tokens = tokens[1:]
        first_sentinel = self.size - self.num_sentinels
        parts: list[str] = []
        run: list[int | None] = []
        for token in tokens:
            if token == self.eos_id:
                break
            if first_sentinel <= token < self.size:
                parts += [self._decode_run(run), self.piece(token)]
                run = []
            elif not 0 <= token < self.size:
                run.append(self.unk_id)
            elif token == self.unk_id or token not in self.special_ids:
                run.append(token)
        parts.append(self._decode_run(run))
        return " ".join(part for part in parts if part)

    def starts_word(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool `[length]`: True where a token begins a word, for whole-word masking.

        A space belongs to the word behind it. Specials are words of their own. It is told by each
        token alone, so that the first of a text may well be False.
        """
        return self._starts[np.asarray(ids, dtype=np.int64)]

    def ends_sentence(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool `[length]`: True where a token's text ends in . ! ? (or 。！？), closing quotes
        and brackets not counted. Abbreviations look the same. Specials end nothing."""
        return self._ends[np.asarray(ids, dtype=np.int64)]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.array([i in self.special_ids or self._begins(i) for i in range(self.size)], bool)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        found = (
            i not in self.special_ids and _SENTENCE_END.search(self._text(i)) is not None
            for i in range(self.size)
        )
        return np.fromiter(found, bool, self.size)

    def _controls(self) -> set[int]:
        """Special ids without a role here."""
        return set()

    def _piece(self, token: int) -> str:
        raise NotImplementedError

    def _decode_run(self, ids: list[int | None]) -> str:
        """The text of tokens none of which is special but unk; None: unknown, without a piece."""
        raise NotImplementedError

    def _begins(self, token: int) -> bool:
        """Whether a token that is not special begins a word."""
        raise NotImplementedError

    def _text(self, token: int) -> str:
        """The text of one token."""
        raise NotImplementedError


def check_extra_ids(extra_ids: int) -> None:
    """Raises InputError for a negative number of sentinels."""
    if extra_ids < 0:
        raise InputError(f"extra_ids is {extra_ids}; expected 0 or more")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all, its folder too if need be."""
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        file.write(content)
    os.replace(partial, path)


def read_bytes(path: str, expected: str) -> bytes:
    """A vocabulary file's bytes. Raises InputError, which names what was `expected`."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(
            f"vocabulary file '{path}' cannot be read ({error.strerror}); expected {expected}: "
            "train one with scripts/train_vocab.py, or mend the path"
        ) from error


def count_bytes(vocabulary: Vocabulary, ids: Sequence[int] | np.ndarray) -> int:
    """Bytes of UTF-8 of the text in `ids`, whatever specials stand between: for bits per byte.

    Pieces between two specials are one text: a space at their joint is not counted. An unknown
    token counts as the sign that decoding shows in its place.
    """
    tokens: list[int] = np.asarray(ids, dtype=np.int64).tolist()
    specials = vocabulary.special_ids - {vocabulary.unk_id}
    runs = itertools.groupby(tokens, specials.__contains__)
    texts = (vocabulary.decode(list(run)) for special, run in runs if not special)
    return sum(len(text.encode("utf-8")) for text in texts)
