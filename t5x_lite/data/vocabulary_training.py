"""Training a vocabulary from the text of any source."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Literal

from t5x_lite.data.sources import Source, texts
from t5x_lite.data.vocabularies import train_sentencepiece


def train_vocabulary(
    *,
    source: Source,
    output: str,
    vocab_size: int = 8000,
    split: str = "train",
    fields: Sequence[str] = ("text",),
    model_type: Literal["unigram", "bpe"] = "unigram",
    max_sentences: int = 0,
    seed: int = 0,
) -> str:
    """Trains a SentencePiece vocabulary with byte fallback, and says how well it fits.

    Args:
      source: where the text is.
      output: the model file to write; one that exists is kept, so that a run can be repeated.
      vocab_size: pieces, without the sentinels that come on top.
      split: of the source; use the training split alone.
      fields: the records' text fields.
      model_type: "unigram" or "bpe".
      max_sentences: a random sample of so many; 0: all.
      seed: of the sample.

    Returns:
      The path of the model file.
    """
    if os.path.exists(output):
        print(f"{output} exists already; remove it to train it anew")
        return output
    began = time.monotonic()
    vocabulary = train_sentencepiece(
        texts(source, split, fields),
        output,
        vocab_size=vocab_size,
        model_type=model_type,
        max_sentences=max_sentences,
        seed=seed,
    )
    sample = [text for text, _ in zip(texts(source, split, fields), range(500), strict=False)]
    characters = sum(map(len, sample))
    tokens = sum(len(vocabulary.encode(text)) for text in sample)
    print(
        f"{output}: {vocabulary.size} tokens with sentinels, {characters / tokens:.2f} characters "
        f"a token, trained in {time.monotonic() - began:.1f} s"
    )
    return output
