"""Questions hide a word of the text, and an oracle that scores words tells right from wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from t5x_lite.data.sources import TextSource
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.scoring import Score
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.studies import cloze
from t5x_lite.studies.cloze import Cloze
from t5x_lite.types import InputError
from tests import common


@pytest.fixture
def asked(tmp_path):
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "lambda", "kappa", "Theta", "it"]
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 20)) for _ in range(12)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    source = TextSource(files={"test": str(tmp_path / "text.txt")})
    return Cloze(source=source, questions=20, window=8, choices=3), lines


class Words:
    """A vocabulary of whole words, but for "kappa", which is two tokens."""

    eos_id, bos_id = 1, None

    def __init__(self):
        self.ids: dict[str, int] = {}

    def encode(self, text):
        ids = [self.ids.setdefault(word, 10 + len(self.ids)) for word in text.split()]
        return np.array([*ids, 9] if text == "kappa" else ids, np.int32)

    def sentinel_id(self, number):
        return 90 - number


def test_questions_hide_a_word_of_the_text(asked):
    made, lines = asked
    drawn = made.draw(Words())
    assert drawn == made.draw(Words())
    assert len(drawn) == 20
    for question in drawn:
        right, *others = question.words
        assert any(f"{question.before} {right} {question.after}".strip() in line for line in lines)
        assert len({right, *others}) == 3
        assert not {"kappa", "Theta", "it"} & set(question.words)
    assert drawn != dataclasses.replace(made, seed=1).draw(Words())


def test_the_right_word_counts_behind_its_gap(asked, monkeypatch):
    made, _ = asked
    vocabulary, given = Words(), []

    def score(loaded, questions, *, batch_size):
        given.extend(questions)
        return [
            [Score(float(number == index % 2), 3, False) for number in range(len(items))]
            for index, items in enumerate(questions)
        ]

    monkeypatch.setattr(cloze, "score_alternatives", score)
    loaded = Loaded(Transformer(common.T5), {}, vocabulary, Partitioner())
    assert made.ask(loaded) == {"accuracy": 50.0}
    for question, items in zip(made.draw(vocabulary), given, strict=True):
        for word, item in zip(question.words, items, strict=True):
            assert item.context.tolist().count(90) == 1
            assert item.context[-1] == 1
            assert item.continuation.tolist() == [90, vocabulary.ids[word], 1]


def test_what_cannot_be_asked_is_refused(asked):
    made, _ = asked
    loaded = Loaded(Transformer(common.GPT), {}, Words(), Partitioner())
    with pytest.raises(InputError, match="asks encoder-decoders"):
        made.ask(loaded)
    with pytest.raises(InputError, match="gives 24 questions, fewer than"):
        dataclasses.replace(made, questions=30).draw(Words())
    with pytest.raises(InputError, match="has 7 words of one token and 4 letters"):
        dataclasses.replace(made, choices=9).draw(Words())
