"""Vocabularies: text to token ids and back, with T5's sentinels at the top of the id range.

    SentencePieceVocabulary   T5's `spiece.model`, Llama's `tokenizer.model`, ours
    TokenizersVocabulary      `tokenizer.json`, BERT's `vocab.txt`, GPT-2's `vocab.json`
    ByteVocabulary            ByT5's bytes: no file

All are frozen and compare by their fields. Their loaded models are caches: they are left out of
pickles and loaded again on first use, so that worker processes can receive them.
"""

from t5x_lite.data.vocabularies.base import Vocabulary, count_bytes
from t5x_lite.data.vocabularies.byte import ByteVocabulary
from t5x_lite.data.vocabularies.sentence_piece import SentencePieceVocabulary
from t5x_lite.data.vocabularies.tokenizer import TokenizersVocabulary
from t5x_lite.data.vocabularies.training import (
    sample,
    train_byte_level,
    train_sentencepiece,
    train_wordpiece,
)

__all__ = [
    "ByteVocabulary",
    "SentencePieceVocabulary",
    "TokenizersVocabulary",
    "Vocabulary",
    "count_bytes",
    "sample",
    "train_byte_level",
    "train_sentencepiece",
    "train_wordpiece",
]
