"""A table of words and vectors: on disk, its neighbours, and what people say of pairs of words.

A folder holds words.jsonl (a JSON string a line) and vectors.npy (float32 `[words, dimensions]`).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t5x_lite.data.sources import Source
from t5x_lite.evaluation import embeddings
from t5x_lite.types import InputError

WORDS = "words.jsonl"
VECTORS = "vectors.npy"


@dataclass(frozen=True)
class Judged:
    """Two words and how alike people find them."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class Similarity:
    """How far cosines and people agree."""

    spearman: float  # -1 to 1
    pairs: int  # both words have vectors
    given: int


@dataclass(frozen=True)
class WordVectors:
    """`vectors[i]` is of `words[i]`; no word is there twice."""

    words: tuple[str, ...]
    vectors: np.ndarray  # float32 [words, dimensions]

    def __post_init__(self) -> None:
        if len(self.words) != len(self.vectors) or self.vectors.ndim != 2:
            raise InputError(
                f"{len(self.words)} words and vectors of shape {self.vectors.shape}: expected one "
                "vector a word"
            )
        if len(self._rows) != len(self.words):
            raise InputError("a word is twice among the words of vectors")

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words)}

    def __contains__(self, word: str) -> bool:
        return word in self._rows

    def of(self, words: Sequence[str]) -> np.ndarray:
        """`[words, dimensions]`. Raises InputError for a word without a vector."""
        missing = [word for word in words if word not in self]
        if missing:
            raise InputError(f"'{missing[0]}' is not among the {len(self.words)} words")
        return self.vectors[[self._rows[word] for word in words]]

    def nearest(self, word: str, k: int = 10) -> list[tuple[str, float]]:
        """The k words nearest to another, without itself, with their cosines."""
        query = self.of([word])
        found, cosines = embeddings.nearest(query, self.vectors, min(k + 1, len(self.words)))
        pairs = zip(found[0].tolist(), cosines[0].tolist(), strict=True)
        return [(self.words[i], c) for i, c in pairs if self.words[i] != word][:k]

    def odd_one_out(self, words: Sequence[str]) -> str:
        """The word that is least like the others."""
        return words[embeddings.odd_one_out(self.of(words))]

    def similarity(self, judged: Sequence[Judged]) -> Similarity:
        """Spearman's correlation over the pairs of which both words have vectors."""
        known = [pair for pair in judged if pair.first in self and pair.second in self]
        if len(known) < 2:
            raise InputError(
                f"both words have vectors in {len(known)} of {len(judged)} pairs: expected two"
            )
        left, right = (self.of([getattr(p, side) for p in known]) for side in ("first", "second"))
        spearman = embeddings.similarity(left, right, [pair.score for pair in known])
        return Similarity(spearman, len(known), len(judged))

    def write(self, folder: str) -> None:
        """Writes the two files."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, WORDS), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(word, ensure_ascii=False) + "\n" for word in self.words)
        np.save(os.path.join(folder, VECTORS), np.asarray(self.vectors, np.float32))

    @classmethod
    def read(cls, folder: str) -> WordVectors:
        """Raises InputError for a folder without the two files, or with half of them."""
        try:
            with open(os.path.join(folder, WORDS), encoding="utf-8") as file:
                words = tuple(json.loads(line) for line in file)
            vectors = np.load(os.path.join(folder, VECTORS))
        except (OSError, ValueError) as error:
            raise InputError(
                f"'{folder}' holds no vectors of words ({error}): expected {WORDS} and {VECTORS}, "
                "as scripts/train_word2vec.py writes them"
            ) from error
        return cls(words, vectors)


def read_judged(source: Source | str) -> list[Judged]:
    """Pairs of words with people's judgement.

    Args:
      source: a dataset with a split `test` of `first`, `second` and `score` (wordsim353 and
        simlex999 of scripts/prepare_data.py), or the path of a tab-separated file: word, word,
        score; `#` begins a comment, and one heading is passed over.

    Raises InputError for a file that is not there, or is not such a file.
    """
    if isinstance(source, str):
        return _read_tsv(source)
    records = source.open("test")
    fields = (records[i] for i in range(len(records)))
    return [Judged(r["first"], r["second"], float(r["score"])) for r in fields]


def _read_tsv(path: str) -> list[Judged]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(enumerate(file.read().splitlines(), start=1))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read the pairs of words '{path}': {error}") from error
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    found = []
    for place, (number, line) in enumerate(lines):
        try:
            first, second, score = line.split("\t")[:3]
            found.append(Judged(first.lower(), second.lower(), float(score)))
        except ValueError as error:
            if place:  # the first may be a heading
                raise InputError(
                    f"{path}, line {number}: expected word, word and score between tabs"
                ) from error
    if not found:
        raise InputError(f"'{path}' has no line of word, word and score between tabs")
    return found
