"""word2vec as a program: vectors of a text's words or tokens, and how they compare with people."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from t5x_lite.data.sources import Source, texts
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.evaluation.word_vectors import Similarity, WordVectors, read_judged
from t5x_lite.studies import skipgram
from t5x_lite.studies.skipgram_data import Corpus, token_corpus, word_corpus
from t5x_lite.types import InputError

SUMMARY = "summary.json"


def read_corpus(
    source: Source,
    min_count: int,
    *,
    splits: Sequence[str] = ("train",),
    fields: Sequence[str] = ("text",),
    vocabulary: Vocabulary | None = None,
) -> Corpus:
    """The source's texts by words, or by a vocabulary's tokens. One record is one document."""
    read = (text for split in splits for text in texts(source, split, fields))
    if vocabulary is None:
        return word_corpus(read, min_count)
    return token_corpus(read, vocabulary, min_count)


def train_word2vec(
    *,
    source: Source,
    output: str,
    splits: Sequence[str] = ("train",),
    fields: Sequence[str] = ("text",),
    vocabulary: Vocabulary | None = None,
    skip_gram: skipgram.SkipGram = skipgram.SkipGram(),
    judged: Mapping[str, Source | str] | None = None,
    console: Any = None,
) -> WordVectors:
    """Learns vectors by skip-gram with negative sampling, and writes them.

    Args:
      source: where the text is.
      output: a folder for words.jsonl, vectors.npy and summary.json.
      splits: of the source, read one behind another.
      fields: the records' text fields.
      vocabulary: whose tokens are learned, row i of the vectors being token i's, as in a language
        model's embedding; None: words in lower case.
      skip_gram: how.
      judged: by name, pairs of words with people's judgement: see `read_judged`.

    Returns:
      The vectors. summary.json has words/s, and Spearman's correlation for each of `judged`.
    """
    console = console or Console()
    pairs = {name: read_judged(given) for name, given in (judged or {}).items()}
    corpus = read_corpus(
        source, skip_gram.min_count, splits=splits, fields=fields, vocabulary=vocabulary
    )
    total = len(corpus.tokens) * skip_gram.epochs
    console.print(
        f"{len(corpus.tokens):,} {'words' if vocabulary is None else 'tokens'}, "
        f"{len(corpus.names):,} different; {skip_gram.epochs} times over them"
    )

    def report(epoch: int, seconds: float) -> None:
        done = total * epoch / skip_gram.epochs
        console.print(f"  {epoch} of {skip_gram.epochs}: {done / seconds:,.0f} a second")

    learned = skipgram.train(corpus, skip_gram, report)
    vectors = WordVectors(corpus.names, np.asarray(learned.tables.inputs))
    vectors.write(output)
    summary: dict[str, Any] = {
        "tokens": len(corpus.tokens),
        "rows": len(corpus.names),
        "seconds": learned.seconds,
        "tokens_per_second": learned.words / learned.seconds,
    }
    for name, given in pairs.items():
        try:
            found = vectors.similarity(given)
        except InputError as error:
            console.print(f"  {name}: {error}")
            continue
        summary[name] = {"spearman": found.spearman, "pairs": found.pairs, "given": found.given}
        console.print(f"  {name}: {describe(found)}")
    with open(os.path.join(output, SUMMARY), "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")
    console.print(f"Vectors are in {output}", soft_wrap=True)
    return vectors


def describe(found: Similarity) -> str:
    """For people."""
    return f"Spearman {found.spearman:.3f} over {found.pairs} of {found.given} pairs"
