"""Skip-gram beside gensim's, in turn: words a second, and what people say of the vectors.

    python benchmarks/word2vec.py --data_dir=data --gensim_python=PATH/TO/python

Both read the same words of the three Bibles with the same settings (100 dimensions, window 5, 5
negatives, min_count 5, subsampling 1e-3, 5 epochs, learning rate 0.025 falling to 0.0001; gensim
with 2 workers). Rounds alternate, so that both meet the same load; each round has another seed.
Words a second are those read, before frequent ones are thinned out; building vocabularies and
compiling are not counted, drawing and thinning out are. CPU-seconds are the process's, all threads.

`--gensim_python` is the interpreter of an environment with gensim (`pip install gensim==4.4.0`);
without one, the comparison is left out. `--texts=FILE` reads documents from a file, one a line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from absl import app, flags

from t5x_lite.data.sources import TfdsSource, texts
from t5x_lite.evaluation.word_vectors import Judged, WordVectors, read_judged
from t5x_lite.studies import skipgram
from t5x_lite.studies.skipgram_data import word_corpus, words_of
from t5x_lite.types import InputError

DATA_DIR = flags.DEFINE_string("data_dir", "data", "Of bible_text, wordsim353 and simlex999.")
TEXTS = flags.DEFINE_string("texts", None, "A text file in the place of bible_text.")
GENSIM = flags.DEFINE_string("gensim_python", None, "An interpreter that can import gensim.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Trainings of each, in turn.")
EPOCHS = flags.DEFINE_integer("epochs", 5, "Passes over the text in a training.")
WORKERS = flags.DEFINE_integer("workers", 2, "Threads that gensim learns with.")
DATASETS = ("wordsim353", "simlex999")

# Reads the documents once; then for each line of settings on standard input trains, and answers.
THEIRS = """
import json, sys, time
import numpy
from gensim.models import Word2Vec
with open(sys.argv[1], encoding="utf-8") as file:
    documents = [line.split() for line in file]
for line in sys.stdin:
    settings = json.loads(line)
    model = Word2Vec(sg=1, hs=0, **settings)
    model.build_vocab(documents)
    wall, cpu = time.monotonic(), time.process_time()
    words = model.train(documents, total_examples=len(documents), epochs=settings["epochs"])[1]
    seconds = time.monotonic() - wall, time.process_time() - cpu
    numpy.save(sys.argv[2], model.wv.vectors)
    print(json.dumps([model.wv.index_to_key, model.corpus_total_words, *seconds]), flush=True)
"""


class Gensim:
    """gensim in a process of its own, which waits between its turns."""

    def __init__(self, python: str, folder: str, documents: str):
        self._vectors = os.path.join(folder, "gensim.npy")
        self._process = subprocess.Popen(
            [python, "-c", THEIRS, documents, self._vectors],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, config: skipgram.SkipGram) -> tuple[WordVectors, int, float, float]:
        """Vectors, words read, seconds and CPU-seconds."""
        settings = {
            "vector_size": config.dim,
            "window": config.window,
            "negative": config.negatives,
            "min_count": config.min_count,
            "sample": config.subsample,
            "epochs": config.epochs,
            "alpha": config.learning_rate,
            "min_alpha": config.final_learning_rate,
            "seed": config.seed,
            "workers": WORKERS.value,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(settings) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise InputError("gensim ended: its message is above; is it in that environment?")
        words, count, wall, cpu = json.loads(answer)
        vectors = WordVectors(tuple(words), np.load(self._vectors))
        return vectors, count * config.epochs, wall, cpu

    def close(self) -> None:
        self._process.communicate()


def ours(documents: list[str], config: skipgram.SkipGram) -> tuple[WordVectors, int, float, float]:
    """As `Gensim.train`; words are counted as gensim does, rare ones included."""
    corpus = word_corpus(documents, config.min_count)
    cpu = time.process_time()
    learned = skipgram.train(corpus, config)
    cpu = time.process_time() - cpu
    words = sum(len(words_of(text)) for text in documents) * config.epochs
    vectors = WordVectors(corpus.names, np.asarray(learned.tables.inputs))
    return vectors, words, learned.seconds, cpu


def judged() -> dict[str, list[Judged]]:
    """The pairs of words that are prepared."""
    found = {}
    for name in DATASETS:
        try:
            found[name] = read_judged(TfdsSource(name, DATA_DIR.value))
        except InputError as error:
            print(f"without {name}: {error}")
    return found


def main(_: list[str]) -> None:
    if TEXTS.value:
        with open(TEXTS.value, encoding="utf-8") as file:
            documents = file.read().splitlines()
    else:
        source = TfdsSource("bible_text", DATA_DIR.value)
        documents = [text for split in source.splits for text in texts(source, split)]
    pairs = judged()
    results: dict[str, list[Any]] = {"t5x_lite": [], "gensim": []}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "documents.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(" ".join(words_of(text)) + "\n" for text in documents)
        theirs = Gensim(GENSIM.value, folder, path) if GENSIM.value else None
        for turn in range(ROUNDS.value):
            config = skipgram.SkipGram(epochs=EPOCHS.value, seed=turn + 1)
            results["t5x_lite"].append(ours(documents, config))
            if theirs is not None:
                results["gensim"].append(theirs.train(config))
        if theirs is not None:
            theirs.close()
    medians = {}
    for name, rounds in results.items():
        for turn, (vectors, words, wall, cpu) in enumerate(rounds, start=1):
            scores = [
                f"{dataset} {found.spearman:.3f} ({found.pairs} pairs)"
                for dataset, given in pairs.items()
                for found in [vectors.similarity(given)]
            ]
            print(
                f"{name:9} round {turn}: {words / wall:12,.0f} words/s, "
                f"{words / cpu:12,.0f} a CPU-second, {wall:7.2f} s; " + ", ".join(scores)
            )
        if rounds:
            medians[name] = [
                statistics.median(words / r for _, words, *rest in rounds for r in [rest[which]])
                for which in (0, 1)
            ]
            print(
                f"{name:9} median : {medians[name][0]:12,.0f} words/s, {medians[name][1]:12,.0f} "
                "a CPU-second"
            )
    if len(medians) == 2:
        (wall, cpu), (their_wall, their_cpu) = medians["t5x_lite"], medians["gensim"]
        print(f"ratio of medians {wall / their_wall:.2f}, by CPU-seconds {cpu / their_cpu:.2f}")


if __name__ == "__main__":
    try:
        app.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
