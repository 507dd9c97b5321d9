"""The programs of words: what they write, and that a model's states are put to the right words."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from t5x_lite.data.sources import TextSource
from t5x_lite.decode import modes
from t5x_lite.evaluation.word_vectors import WordVectors
from t5x_lite.studies import words
from t5x_lite.studies.skipgram import SkipGram
from t5x_lite.studies.word2vec import train_word2vec
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError
from tests import folders
from tests.train import harness

SMALL = SkipGram(dim=8, min_count=1, subsample=0, epochs=2, centres=8, blocks=1, shared=8, steps=8)
LINES = [
    "alpha beta gamma alphata beta",
    "delta eps zeta gamma",
    "zeta beta delta alpha gamma eps",
] * 4
JUDGED = "alpha\tbeta\t5\ngamma\tdelta\t3\nzeta\teps\t4\nalpha\tnowhere\t1\n"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(LINES) + "\n")
    (tmp_path / "judged.tsv").write_text(JUDGED)
    return TextSource({"train": str(tmp_path / "text.txt")})


def opened(name, tmp_path):
    path = folders.hugging_face(name, tmp_path)
    return str(path), open_model(str(path), partitioner=harness.one_device())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_states_are_put_to_their_words(name, tmp_path):
    _, loaded = opened(name, tmp_path)
    runs = [line.split() for line in LINES[:3]]
    found = words.contextual(loaded, ["alphata", "beta", "nowhere"], runs, 4)
    assert found.words == ("alphata", "beta")
    mode = modes.make(loaded, "embed", modes.Options(max_input_tokens=8))
    alone = loaded.model.config.encoder is None
    rows = [mode.encode({"inputs": " ".join(run)}) for run in runs]
    apply = functools.partial(loaded.model.apply, method="states" if alone else "encode")
    found_states = jax.jit(apply)({"params": loaded.params}, mode.rows(rows, 8))
    states = [
        [(loaded.vocabulary.piece(int(i)), s) for i, s in zip(row.ids, each, strict=False)]
        for row, each in zip(rows, np.asarray(found_states), strict=True)
    ]
    beta = [s for pieces in states for piece, s in pieces if piece == "beta"]
    (at,) = (i for i, (piece, _) in enumerate(states[0]) if piece == "##ta")
    alphata = [states[0][at - 1][1], states[0][at][1]]
    assert len(beta) == 3
    np.testing.assert_allclose(found.of(["beta"])[0], np.mean(beta, axis=0), atol=1e-4)
    np.testing.assert_allclose(found.of(["alphata"])[0], np.mean(alphata, axis=0), atol=1e-4)
    table = np.asarray(loaded.params["token_embedding"]["embedding"])
    ids = loaded.vocabulary.encode("alphata")
    still = words.static(loaded, ["alphata"]).vectors[0]
    np.testing.assert_allclose(still, table[ids].mean(axis=0), rtol=1e-6)


def test_the_programs_work_together(text, tmp_path, monkeypatch):
    judged = {"judged": str(tmp_path / "judged.tsv")}
    out = str(tmp_path / "word2vec")
    made = train_word2vec(source=text, output=out, skip_gram=SMALL, judged=judged)
    assert set(made.words) == {word for line in LINES for word in line.split()}
    summary = json.loads((tmp_path / "word2vec" / "summary.json").read_text())
    assert summary["tokens_per_second"] > 0
    assert summary["judged"]["pairs"] == 3
    np.testing.assert_array_equal(WordVectors.read(out).vectors, made.vectors)

    path, loaded = opened("bert", tmp_path)
    monkeypatch.setattr(words, "open_model", lambda path: loaded)
    sets = (("alpha", "beta", "gamma"), ("alpha", "nowhere", "beta"))
    monkeypatch.setattr(words, "ODD", sets)
    results = words.study_words(
        vectors=out,
        models={"BERT": path},
        source=text,
        judged=judged,
        output=str(tmp_path / "study.json"),
        queries=["alpha", "nowhere"],
        neighbours=2,
        window=3,
        batch_size=2,
    )
    assert results == json.loads((tmp_path / "study.json").read_text())
    assert (results["words"], results["sets"]) == (7, 1)
    for name in ("word2vec", "BERT, static", "BERT, contextual", "BERT, contextual, centred"):
        assert len(results[name]["nearest"]["alpha"]) == 2
        assert results[name]["judged"]["pairs"] == 3
        assert results[name]["odd_one_out"] in (0, 100)


def test_tokens_of_a_vocabulary_are_rows(text, tmp_path):
    _, loaded = opened("bert", tmp_path)
    vocabulary, out = loaded.vocabulary, str(tmp_path / "tokens")
    made = train_word2vec(source=text, output=out, vocabulary=vocabulary, skip_gram=SMALL)
    assert made.words == tuple(vocabulary.piece(i) for i in range(vocabulary.size))
    seen = {int(i) for line in LINES for i in vocabulary.encode(line)}
    again = train_word2vec(source=text, output=out, vocabulary=vocabulary, skip_gram=SMALL)
    np.testing.assert_array_equal(again.vectors, made.vectors)
    # What never stands in the text stays as it was drawn: within 1/2d of zero.
    unseen = [i for i in range(vocabulary.size) if i not in seen]
    assert np.abs(made.vectors[unseen]).max() <= 1 / 16


def test_models_of_another_text_are_refused(text, tmp_path, monkeypatch):
    train_word2vec(source=text, output=str(tmp_path / "out"), skip_gram=SMALL)
    (tmp_path / "judged.tsv").write_text("x\ty\t1\nx\tz\t2\n")
    with pytest.raises(InputError, match="both words have vectors in 0 of 2 pairs"):
        words.study_words(
            vectors=str(tmp_path / "out"),
            models={},
            source=text,
            judged={"judged": str(tmp_path / "judged.tsv")},
            output=str(tmp_path / "study.json"),
        )
