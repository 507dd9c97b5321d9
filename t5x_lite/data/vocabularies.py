"""Vocabularies: text to token ids and back, with T5's sentinels at the top of the id range.

Every vocabulary keeps 0 for padding. The `extra_ids` highest ids are sentinels, and
`<extra_id_0>` is the very highest, as in T5's published models (Raffel et al. 2020,
arXiv:1910.10683):

    id      0    1    2      3 ... size-extra_ids-1    size-extra_ids ... size-2           size-1
    piece   pad  eos  unk    pieces or bytes           <extra_id_99>  ... <extra_id_1>  <extra_id_0>

Vocabularies are frozen and compare by their fields. Their loaded models are caches: they are left
out of pickles and loaded again on first use, so that worker processes can receive them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import sentencepiece

from t5x_lite.types import InputError

# SentencePiece splits its sums over threads: a fixed number gives the same model on any machine.
_TRAINING_THREADS = 4
# SentencePiece silently skips longer sentences, so texts are cut at spaces before they reach it.
_MAX_SENTENCE_BYTES = 4096


@runtime_checkable
class Vocabulary(Protocol):
    """What the rest of the data room asks of a vocabulary."""

    @property
    def size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def unk_id(self) -> int: ...
    @property
    def num_sentinels(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...
    def sentinel_id(self, k: int) -> int: ...
    def piece(self, token: int) -> str: ...


class _WithSentinels:
    """What vocabularies share: sentinels above `size - extra_ids`, and decoding around them."""

    extra_ids: int
    size: int
    pad_id: int
    unk_id: Any  # a property where it has to be read from a file
    eos_id: int

    @property
    def num_sentinels(self) -> int:
        return self.extra_ids

    def sentinel_id(self, k: int) -> int:
        """The id of `<extra_id_k>`: `size - 1 - k`. Raises InputError beyond the last one."""
        if not 0 <= k < self.extra_ids:
            raise InputError(
                f"sentinel <extra_id_{k}> does not exist: the vocabulary has {self.extra_ids} of "
                "them; raise extra_ids"
            )
        return self.size - 1 - k

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` up to the first eos, without padding; sentinels as `<extra_id_k>`.

        Ids that the vocabulary does not have decode as unk: a model's table may be larger.
        """
        first_sentinel = self.size - self.extra_ids
        parts: list[str] = []
        run: list[int] = []
        for token in np.asarray(ids, dtype=np.int64).tolist():
            if token == self.eos_id:
                break
            if token == self.pad_id:
                continue
            if first_sentinel <= token < self.size:
                parts += [self._decode_run(run), f"<extra_id_{self.size - 1 - token}>"]
                run = []
            else:
                run.append(token if 0 <= token < self.size else self.unk_id)
        parts.append(self._decode_run(run))
        return " ".join(part for part in parts if part)

    def _decode_run(self, ids: list[int]) -> str:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary(_WithSentinels):
    """A SentencePiece model file and `extra_ids` sentinels above its pieces.

    Loads T5's published `spiece.model` (32,000 pieces, so 32,100 ids) and files written by
    `train_sentencepiece`. Raises InputError for a missing file, a file that is no SentencePiece
    model, and a model without a pad piece at id 0 or without an eos piece.
    """

    path: str
    extra_ids: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))
        if self.extra_ids < 0:
            raise InputError(f"extra_ids is {self.extra_ids}; expected 0 or more")
        processor = self._processor
        if processor.pad_id() != 0 or processor.eos_id() < 0:
            raise InputError(
                f"vocabulary '{self.path}' has pad id {processor.pad_id()} and eos id "
                f"{processor.eos_id()}; expected pad 0 and an eos piece: train it with "
                "scripts/train_vocab.py, or with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1"
            )

    @functools.cached_property
    def _model(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except OSError as error:
            raise InputError(
                f"vocabulary file '{self.path}' cannot be read ({error.strerror}); expected a "
                "SentencePiece model: train one with scripts/train_vocab.py, or mend the path"
            ) from error

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

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "extra_ids": self.extra_ids}

    @functools.cached_property
    def size(self) -> int:  # type: ignore[override]
        return int(self._processor.get_piece_size()) + self.extra_ids

    @property
    def pad_id(self) -> int:  # type: ignore[override]
        return 0

    @functools.cached_property
    def eos_id(self) -> int:  # type: ignore[override]
        return int(self._processor.eos_id())

    @functools.cached_property
    def unk_id(self) -> int:
        return int(self._processor.unk_id())

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model file's bytes and the number of sentinels; the path is left out."""
        return hashlib.sha256(self._model + f"|extra_ids={self.extra_ids}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[length]`, without eos."""
        return np.asarray(self._processor.encode(text), dtype=np.int32)

    def _decode_run(self, ids: list[int]) -> str:
        return self._processor.decode(ids) if ids else ""

    def piece(self, token: int) -> str:
        """The piece as SentencePiece writes it ('▁' is a space), or `<extra_id_k>`."""
        if token >= self.size - self.extra_ids:
            return f"<extra_id_{self.size - 1 - token}>"
        return self._processor.id_to_piece(int(token))


@dataclasses.dataclass(frozen=True)
class ByteVocabulary(_WithSentinels):
    """UTF-8 bytes: id = byte + 3 (ByT5, Xue et al. 2022, arXiv:2105.13626).

    `encode("Hi")` is `[75, 108]`. Nothing is unknown; ids that are not valid UTF-8 together decode
    to the replacement character.
    """

    extra_ids: int = 100

    def __post_init__(self) -> None:
        if self.extra_ids < 0:
            raise InputError(f"extra_ids is {self.extra_ids}; expected 0 or more")

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
    def fingerprint(self) -> str:
        return hashlib.sha256(f"bytes+3|extra_ids={self.extra_ids}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[length]`, without eos."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) + 3

    def _decode_run(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if i >= 3).decode("utf-8", errors="replace")

    def piece(self, token: int) -> str:
        """The printable ASCII character, `<0x..>` for another byte, or a special's name."""
        if token >= self.size - self.extra_ids:
            return f"<extra_id_{self.size - 1 - token}>"
        if token < 3:
            return ("<pad>", "</s>", "<unk>")[token]
        byte = int(token) - 3
        return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"


def train_sentencepiece(
    texts: Iterable[str],
    output: str | os.PathLike[str],
    *,
    vocab_size: int,
    model_type: Literal["unigram", "bpe"] = "unigram",
    byte_fallback: bool = True,
    character_coverage: float = 1.0,
    max_sentences: int = 0,
    seed: int = 0,
) -> SentencePieceVocabulary:
    """Trains a SentencePiece model on `texts`, writes it to `output` and returns its vocabulary.

    Ids are T5's: pad 0, eos 1, unk 2, no bos. With `byte_fallback` 256 pieces are bytes, so that no
    text ever becomes unk. `vocab_size` counts the pieces of the file; sentinels come on top. The
    texts are streamed; with `max_sentences` a sample of so many, drawn with `seed`, is kept.
    The same arguments write the same bytes, on any machine.

    Raises InputError if there is no text, or if `vocab_size` does not suit it.
    """
    count = 0

    def sentences() -> Iterator[str]:
        nonlocal count
        for text in texts:
            for sentence in _cut(text):
                count += 1
                yield sentence

    model = io.BytesIO()
    chosen = sample(sentences(), max_sentences, seed) if max_sentences else sentences()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chosen),
            model_writer=model,  # no model_prefix: the path must not get into the bytes
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            max_sentence_length=2 * _MAX_SENTENCE_BYTES,
            num_threads=_TRAINING_THREADS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if not count:
            raise InputError(
                "the vocabulary's training text is empty: expected at least one non-empty text"
            ) from error
        # "Internal: src/x.cc(678) [condition] Vocabulary size too high (300). Please set ..."
        reason = re.sub(r"^.*\.cc\(\d+\) \[.*?\] ?(?=[A-Z])", "", str(error), flags=re.S).strip()
        raise InputError(
            f"SentencePiece cannot train vocab_size={vocab_size} on this text of {count} "
            f"sentences: {reason}"
        ) from error
    output = os.fspath(output)
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    partial = f"{output}.partial"
    with open(partial, "wb") as file:
        file.write(model.getvalue())
    os.replace(partial, output)
    return SentencePieceVocabulary(output)


def sample(items: Iterable[str], size: int, seed: int) -> list[str]:
    """`size` of the items (all, if there are no more), each set of them as likely as another.

    Reservoir sampling in one pass (Vitter 1985, algorithm R). SentencePiece samples too, but by
    its own generator: with the same seed it drew other sentences in every process.
    """
    rng = np.random.default_rng(seed)
    kept: list[str] = []
    for index, item in enumerate(items):
        if index < size:
            kept.append(item)
        elif (place := int(rng.integers(index + 1))) < size:
            kept[place] = item
    return kept


def _cut(text: str) -> Iterator[str]:
    """Non-empty lines of `text`, the long ones cut at spaces into pieces SentencePiece accepts."""
    for line in text.splitlines():
        # A character is at most 4 bytes; a word longer than a piece is cut inside.
        yield from re.findall(
            rf"\S.{{0,{_MAX_SENTENCE_BYTES // 4 - 1}}}(?=\s|$)|\S{{1,{_MAX_SENTENCE_BYTES // 4}}}",
            line,
        )
