"""Training a vocabulary from the text of any source."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from t5x_lite.data.sources import Source, texts
from t5x_lite.data.vocabularies import (
    Vocabulary,
    train_byte_level,
    train_sentencepiece,
    train_wordpiece,
)


class Kind(Protocol):
    """A kind of vocabulary: writes one of `vocab_size` pieces to `output`."""

    def train(
        self, texts: Iterable[str], output: str, *, vocab_size: int, max_sentences: int, seed: int
    ) -> Vocabulary: ...


@dataclass(frozen=True)
class SentencePieces:
    """SentencePiece, for `SentencePieceVocabulary`: see `train_sentencepiece`."""

    model_type: Literal["unigram", "bpe"] = "unigram"
    byte_fallback: bool = True
    character_coverage: float = 1.0
    mask_token: str | None = None  # "<mask>" for masked language models

    def train(
        self, texts: Iterable[str], output: str, *, vocab_size: int, max_sentences: int, seed: int
    ) -> Vocabulary:
        return train_sentencepiece(
            texts,
            output,
            vocab_size=vocab_size,
            model_type=self.model_type,
            byte_fallback=self.byte_fallback,
            character_coverage=self.character_coverage,
            mask_token=self.mask_token,
            max_sentences=max_sentences,
            seed=seed,
        )


@dataclass(frozen=True)
class WordPieces:
    """BERT's WordPiece, for `TokenizersVocabulary`: see `train_wordpiece`."""

    lower_case: bool = True
    max_characters: int = 1000

    def train(
        self, texts: Iterable[str], output: str, *, vocab_size: int, max_sentences: int, seed: int
    ) -> Vocabulary:
        return train_wordpiece(
            texts,
            output,
            vocab_size=vocab_size,
            lower_case=self.lower_case,
            max_characters=self.max_characters,
            max_sentences=max_sentences,
            seed=seed,
        )


@dataclass(frozen=True)
class ByteLevelPieces:
    """Byte-level BPE, for `TokenizersVocabulary`: see `train_byte_level`.

    The specials are RoBERTa's; GPT-2's is `("<|endoftext|>",)`.
    """

    special_tokens: Sequence[str] = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

    def train(
        self, texts: Iterable[str], output: str, *, vocab_size: int, max_sentences: int, seed: int
    ) -> Vocabulary:
        return train_byte_level(
            texts,
            output,
            vocab_size=vocab_size,
            special_tokens=self.special_tokens,
            max_sentences=max_sentences,
            seed=seed,
        )


def train_vocabulary(
    *,
    source: Source,
    output: str,
    vocab_size: int = 8000,
    split: str = "train",
    fields: Sequence[str] = ("text",),
    kind: Kind | None = None,
    model_type: Literal["unigram", "bpe"] = "unigram",
    max_sentences: int = 0,
    seed: int = 0,
) -> str:
    """Trains a vocabulary, and says how well it fits.

    Args:
      source: where the text is.
      output: the model file to write; one that exists is kept, so that a run can be repeated.
      vocab_size: pieces, without the sentinels that come on top.
      split: of the source; use the training split alone.
      fields: the records' text fields.
      kind: SentencePieces, WordPieces or ByteLevelPieces; None: SentencePiece with byte fallback.
      model_type: "unigram" or "bpe", if there is no `kind`.
      max_sentences: a random sample of so many; 0: all.
      seed: of the sample.

    Returns:
      The path of the model file.
    """
    if os.path.exists(output):
        print(f"{output} exists already; remove it to train it anew")
        return output
    began = time.monotonic()
    vocabulary = (kind or SentencePieces(model_type)).train(
        texts(source, split, fields),
        output,
        vocab_size=vocab_size,
        max_sentences=max_sentences,
        seed=seed,
    )
    sample = [text for text, _ in zip(texts(source, split, fields), range(500), strict=False)]
    characters = sum(map(len, sample))
    encoded = [vocabulary.encode(text) for text in sample]
    tokens = sum(map(len, encoded))
    unknown = sum(int((ids == vocabulary.unk_id).sum()) for ids in encoded)
    print(
        f"{output}: {vocabulary.size} tokens with sentinels, {characters / tokens:.2f} characters "
        f"a token, {unknown / tokens:.2%} unknown, trained in {time.monotonic() - began:.1f} s"
    )
    return output
