"""Distributional semantics measured: a word's vector by word2vec, by a model's table, in context.

static       the mean of the rows of the model's token embedding for the word's pieces
contextual   the mean of the last hidden states over the word's pieces and its places in a text

All are compared over the same words: with people's judgement of pairs, at finding the odd one out,
and by nearest words. A common part of all vectors hides what tells them apart (Mu & Viswanath 2018,
arXiv:1702.01417), so that each is also measured with the mean of all words taken off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from t5x_lite import trees
from t5x_lite.data.sources import Source, texts
from t5x_lite.decode import modes
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.modes.base import Reading
from t5x_lite.evaluation.word_vectors import WordVectors, read_judged
from t5x_lite.studies.skipgram_data import words_of
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError

# The last one is odd.
ODD: Final[tuple[tuple[str, ...], ...]] = tuple(
    tuple(line.split())
    for line in """
    father mother son daughter river
    bread wine oil corn sword
    gold silver brass iron prophet
    ox sheep goat ass mountain
    lion bear wolf leopard altar
    egypt babylon assyria syria bread
    moses aaron joshua david wilderness
    sun moon stars heaven servant
    hand foot eye ear king
    sea river waters wells priest
    king prince ruler captain fig
    priest altar sacrifice offering horse
    sword spear bow shield vine
    vine fig olive tree chariot
    love mercy kindness grace stone
    anger wrath fury indignation sheep
    one two three four house
    seven ten twenty hundred woman
    day night morning evening gate
    house gate wall tower fish
    wise foolish righteous wicked camel
    said spoke answered cried wine
    peter john james paul sabbath
    head heart mouth tongue city
    """.strip().splitlines()
)


def study_words(
    *,
    vectors: str,
    models: Mapping[str, str],
    source: Source,
    judged: Mapping[str, Source | str],
    output: str,
    split: str = "train",
    frequent: int = 3000,
    occurrences: int = 20,
    window: int = 24,
    queries: Sequence[str] = ("king", "bread", "river", "seven", "mercy"),
    neighbours: int = 5,
    batch_size: int = 64,
    seed: int = 0,
    console: Any = None,
) -> dict[str, Any]:
    """Prints the tables of word2vec beside each model's static and contextual vectors.

    Args:
      vectors: a folder that train_word2vec wrote, of words.
      models: folders of models by name; see `open_model`.
      source: text whose places words are looked up at.
      judged: pairs of words by name; see `read_judged`.
      output: a JSON file for the figures.
      split: of the source.
      frequent: of word2vec's words, so many of the most frequent are compared, and those of the
        pairs and sets.
      occurrences: of a word in the text, so many at least are averaged, if there are as many.
      window: words that a model reads at a time.
      queries: words whose neighbours are shown.
      neighbours: how many.
      batch_size: windows read together.
      seed: of which windows are read.

    Returns:
      What was written.
    """
    console = console or Console(width=max(Console().width, 110))
    pairs = {name: read_judged(given) for name, given in judged.items()}
    baseline = WordVectors.read(vectors)
    asked = {word for line in ODD for word in line} | set(queries)
    asked |= {word for given in pairs.values() for p in given for word in (p.first, p.second)}
    wanted = [w for row, w in enumerate(baseline.words) if row < frequent or w in asked]
    found = {"word2vec": WordVectors(tuple(wanted), baseline.of(wanted))}
    chosen = list(_windows(source, split, wanted, occurrences, window, seed))
    for name, path in models.items():
        loaded = open_model(path)
        found[f"{name}, static"] = static(loaded, wanted)
        found[f"{name}, contextual"] = contextual(loaded, wanted, chosen, batch_size)
    shared = [word for word in wanted if all(word in table for table in found.values())]
    if len(shared) <= neighbours:
        raise InputError(
            f"only {len(shared)} words have vectors in all tables: is this their text?"
        )
    sets = [words for words in ODD if all(word in shared for word in words)]
    results: dict[str, Any] = {"words": len(shared), "windows": len(chosen), "sets": len(sets)}
    for name, table in found.items():
        raw = table.of(shared)
        variants = {name: raw, f"{name}, centred": raw - raw.mean(axis=0, keepdims=True)}
        for label, values in variants.items():
            results[label] = _measure(
                WordVectors(tuple(shared), values), pairs, sets, queries, neighbours
            )
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2, ensure_ascii=False)
        file.write("\n")
    _show(console, results, list(pairs))
    return results


def static(loaded: Loaded, words: Sequence[str]) -> WordVectors:
    """The mean of each word's rows in the token embedding."""
    table = np.asarray(trees.flatten(loaded.params)["token_embedding/embedding"], np.float32)
    pieces = [loaded.vocabulary.encode(word) for word in words]
    return WordVectors(tuple(words), np.stack([table[ids].mean(axis=0) for ids in pieces]))


def contextual(
    loaded: Loaded, words: Sequence[str], windows: Sequence[Sequence[str]], batch_size: int
) -> WordVectors:
    """The mean of each word's last hidden states, over its pieces and its places in `windows`.

    Windows are read word by word, which is how a vocabulary that begins words at spaces cuts them.
    Words that stand in no window have no vector. Longer windows than a model are cut.
    """
    number = {word: i for i, word in enumerate(words)}
    config, vocabulary = loaded.model.config, loaded.vocabulary
    alone = config.encoder is None
    read = jax.jit(
        lambda params, batch: loaded.model.apply(
            {"params": params}, batch, method="states" if alone else "encode"
        )
    )
    pieces = {word: vocabulary.encode(word) for run in windows for word in run}
    longest = max(sum(len(pieces[word]) for word in run) for run in windows) + 2
    length = min(-(-longest // 8) * 8, modes.room(loaded, "embed", 1))
    mode = modes.make(loaded, "embed", modes.Options(max_input_tokens=length))
    assert isinstance(mode, Reading)
    sums: np.ndarray = np.zeros((len(words), config.embed_dim), np.float64)
    counts: np.ndarray = np.zeros(len(words), np.int64)
    starts = range(0, len(windows), batch_size)
    for start in track(starts, "reading", console=Console(stderr=True), transient=True):
        rows: list[modes.Row | None] = [None] * batch_size
        owners: np.ndarray = np.full((batch_size, length), -1)
        for row, run in enumerate(windows[start : start + batch_size]):
            ids = np.concatenate([pieces[word] for word in run])[: length - 2]
            owner: np.ndarray = np.repeat(
                [number.get(w, -1) for w in run], [len(pieces[w]) for w in run]
            )
            rows[row] = modes.Row(mode.read(ids))
            before = int(vocabulary.bos_id is not None)  # a text's start, for an encoder
            begins = len(mode.read(ids)) - len(ids) if alone else before
            owners[row, begins : begins + len(ids)] = owner[: len(ids)]
        with loaded.partitioner.activate():
            batch = loaded.partitioner.put_batch(mode.rows(rows, length), batch_size)
            found = np.asarray(read(loaded.params, batch), np.float32)
        real = owners >= 0
        np.add.at(sums, owners[real], found[real])
        np.add.at(counts, owners[real], 1)
    kept = np.flatnonzero(counts)
    table = (sums[kept] / counts[kept, None]).astype(np.float32)
    return WordVectors(tuple(words[i] for i in kept.tolist()), table)


def _windows(
    source: Source, split: str, words: Sequence[str], occurrences: int, window: int, seed: int
) -> Iterator[list[str]]:
    """Runs of words in random order, each with a word that is still short of `occurrences`."""
    missing = dict.fromkeys(words, occurrences)
    runs = [
        read[start : start + window]
        for text in texts(source, split)
        for read in [words_of(text)]
        for start in range(0, len(read), window)
    ]
    for index in np.random.default_rng(seed).permutation(len(runs)).tolist():
        run = runs[index]
        if any(missing.get(word, 0) > 0 for word in run):
            yield run
            for word in run:
                if word in missing:
                    missing[word] -= 1


def _measure(
    table: WordVectors,
    pairs: Mapping[str, Any],
    sets: Sequence[Sequence[str]],
    queries: Sequence[str],
    neighbours: int,
) -> dict[str, Any]:
    scores: dict[str, Any] = {"dimensions": table.vectors.shape[1]}
    for name, given in pairs.items():
        agreement = table.similarity(given)
        scores[name] = {"spearman": agreement.spearman, "pairs": agreement.pairs}
    hits = sum(table.odd_one_out(words) == words[-1] for words in sets)
    scores["odd_one_out"] = 100.0 * hits / len(sets) if sets else float("nan")
    scores["nearest"] = {
        word: [near for near, _ in table.nearest(word, neighbours)]
        for word in queries
        if word in table
    }
    return scores


def _show(console: Any, results: Mapping[str, Any], pairs: Sequence[str]) -> None:
    systems = {name: found for name, found in results.items() if isinstance(found, dict)}
    table = Table(title=f"{results['words']} words, {results['sets']} sets with an odd one")
    for column in ("vectors", "dimensions", *pairs, "odd one out"):
        table.add_column(column, justify="left" if column == "vectors" else "right")
    for name, found in systems.items():
        correlations = [f"{found[p]['spearman']:.3f} ({found[p]['pairs']})" for p in pairs]
        odd = f"{found['odd_one_out']:.0f}%"
        table.add_row(name, str(found["dimensions"]), *correlations, odd)
    console.print(table)
    for name, found in systems.items():
        for word, near in found["nearest"].items():
            console.print(f"{name}: {word} -> {', '.join(near)}", markup=False, highlight=False)
