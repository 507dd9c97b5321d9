"""Vocabularies of the `tokenizers` library: WordPiece, byte-level BPE, any `tokenizer.json`."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from t5x_lite.data.vocabularies import files
from t5x_lite.data.vocabularies.base import BaseVocabulary, check_extra_ids, write_atomically
from t5x_lite.types import InputError

_SPACE = "▁"
_CONTINUES = "##"
_UNKNOWN = "\ufffd"  # where a vocabulary has no unk


def _byte_of() -> dict[str, int]:
    """GPT-2's printable characters for bytes: themselves, and from U+0100 on for the rest."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_of()


@dataclass(frozen=True)
class TokenizersVocabulary(BaseVocabulary):
    """A published tokenizer's file, or one that `train_wordpiece` or `train_byte_level` wrote.

    `path` is a `tokenizer.json`, a `vocab.txt` (BERT's WordPiece), a `vocab.json` with `merges.txt`
    beside it (byte-level BPE of GPT-2, RoBERTa, BART), or a folder with these. What it is, its
    content says, not its name. `lower_case` is for a `vocab.txt`; None: as `tokenizer_config.json`
    beside it says, or else True.

    Specials are found in `tokenizer_config.json` and `special_tokens_map.json` beside the file, or
    by their usual names: [CLS] and [SEP] are bos and eos; GPT-2's <|endoftext|> is both, and unk.
    A field names another; "" says that there is none. Without a padding token, eos pads.
    `start_token` is what a decoder's input begins with; by default bos, or else padding. BART's
    files look like RoBERTa's: give it `start_token="</s>"`.

    `encode` never gives specials: `</s>` in a text is four characters (`encode_marked` reads it).
    Byte-level vocabularies give no unk either; WordPiece gives it for words it cannot spell.
    Sentinels come on top of the file's ids, none by default; T5's `tokenizer.json` has its own.

    Raises InputError for files that are missing or broken, and specials that they do not have.
    """

    path: str
    extra_ids: int = 0
    lower_case: bool | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    mask_token: str | None = None
    start_token: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))
        check_extra_ids(self.extra_ids)
        if self.extra_ids and self._own_sentinels:
            raise InputError(
                f"vocabulary '{self.path}' has {self._own_sentinels} sentinels of its own: leave "
                f"extra_ids={self.extra_ids} out"
            )
        if self.start_token and self.start_token not in self._ids:
            raise InputError(
                f"vocabulary '{self.path}' has no '{self.start_token}', its start_token"
            )
        _ = self._specials

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = files.load(self.path, self._fields, self.lower_case)
        tokenizer.encode_special_tokens = True  # as the text that they are
        return tokenizer

    @property
    def _fields(self) -> dict[str, str | None]:
        return {role: getattr(self, f"{role}_token") for role in files.ROLES}

    @functools.cached_property
    def _specials(self) -> dict[str, str]:
        path = files.find(self.path)
        given = {role: name for role, name in self._fields.items() if name is not None}
        return files.resolve(self._tokenizer, {**files.beside(path), **given}, path)

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(self._description["pre_tokenizer"])

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def _file_size(self) -> int:
        return max(self._ids.values()) + 1

    @functools.cached_property
    def _own_sentinels(self) -> int:
        """How many of the file's highest ids are sentinels already."""
        count = 0
        while self._ids.get(f"<extra_id_{count}>") == self._file_size - 1 - count:
            count += 1
        return count

    @property
    def num_sentinels(self) -> int:  # type: ignore[override]
        return self.extra_ids + self._own_sentinels

    @functools.cached_property
    def size(self) -> int:  # type: ignore[override]
        """One more than the highest id: published files may have holes."""
        return self._file_size + self.extra_ids

    @functools.cached_property
    def eos_id(self) -> int:  # type: ignore[override]
        return self._ids[self._specials["eos"]]

    @functools.cached_property
    def pad_id(self) -> int:  # type: ignore[override]
        pad = self._id("pad")
        return self.eos_id if pad is None else pad

    @functools.cached_property
    def unk_id(self) -> int | None:
        return self._id("unk")

    @functools.cached_property
    def bos_id(self) -> int | None:
        return self._id("bos")

    @functools.cached_property
    def mask_id(self) -> int | None:
        return self._id("mask")

    @functools.cached_property
    def start_id(self) -> int:  # type: ignore[override]
        if self.start_token:
            return self._ids[self.start_token]
        return self.pad_id if self.bos_id is None else self.bos_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of what turns text into ids, whichever kind of file says it, and of the specials.

        Empty settings are left out, which versions of the library write or don't.
        """
        model = self._description["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
        meaning = {
            **{key: self._description[key] for key in ("normalizer", "pre_tokenizer")},
            "model": {**model, "merges": merges},
            "added": [
                [token["id"], token["content"]] for token in self._description["added_tokens"]
            ],
            "roles": {**self._specials, "start": self.start_id},
            "extra_ids": self.extra_ids,
        }
        text = json.dumps(_without_empty(meaning), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def stored(self, path: str) -> TokenizersVocabulary:
        """Writes one `tokenizer.json` to `path`, whatever it was read from; the vocabulary returned
        reads it there, with every special named."""
        write_atomically(path, self._tokenizer.to_str().encode())
        specials = {f"{role}_token": self._specials.get(role, "") for role in files.ROLES}
        return replace(self, path=path, lower_case=None, **specials)  # type: ignore[arg-type]

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[length]`, without specials."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def _id(self, role: str) -> int | None:
        name = self._specials.get(role)
        return None if name is None else self._ids[name]

    def _controls(self) -> set[int]:
        return {t["id"] for t in self._description["added_tokens"] if t["special"]}

    def _decode_run(self, ids: list[int | None]) -> str:
        known = [i for i in ids if i is not None and i != self.eos_id]
        text = self._tokenizer.decode(known, skip_special_tokens=False) if known else ""
        # Where unk is eos or missing, nothing else could show that something was not text.
        return text + _UNKNOWN * (len(ids) - len(known))

    def _piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def _begins(self, token: int) -> bool:
        if self._description["model"]["type"] == "WordPiece":
            return not self._piece(token).startswith(_CONTINUES)
        if self._is_byte_level:
            return self._text(token)[:1].isspace()
        return self._piece(token).startswith(_SPACE)

    def _text(self, token: int) -> str:
        piece = self._piece(token)
        if not self._is_byte_level:
            return piece.replace(_SPACE, " ")
        known = bytes(_BYTES[character] for character in piece if character in _BYTES)
        return known.decode("utf-8", errors="replace")


def _without_empty(value: Any) -> Any:
    """A JSON value without the None, False and empty text in its objects."""
    if isinstance(value, dict):
        kept = {k: _without_empty(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not None and v is not False and v != ""}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value
