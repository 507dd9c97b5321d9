"""A question that pretraining alone answers: which word stood in the gap?

As the Children's Book Test asks it (Hill et al. 2015, arXiv:1511.02301): a window of text with one
word hidden, and the word among others to choose from. Nothing is tuned for it; an encoder-decoder
pretrained by span corruption reads the gap as a sentinel and scores each word behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from t5x_lite.data.objectives.base import append_eos, wrap
from t5x_lite.data.sources import Source, texts
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.choices import score_alternatives
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.scoring import Item
from t5x_lite.types import InputError


@dataclass(frozen=True)
class Question:
    before: str
    after: str
    words: tuple[str, ...]  # the hidden one first


@dataclass(frozen=True, kw_only=True)
class Cloze:
    """Questions on a source's texts, the same for the same vocabulary.

    Words are of at least `letters` small letters and one token each, so that none is likelier for
    being short. The others are drawn from all such words alike: a model that knows no more than
    which words are frequent is right more often than 1 / `choices`.
    """

    source: Source
    split: str = "test"
    questions: int = 400
    choices: int = 4
    window: int = 24  # words, the hidden one among them
    letters: int = 4
    batch_size: int = 50
    seed: int = 0

    def ask(self, loaded: Loaded) -> dict[str, float]:
        """`{"accuracy": ...}` in percent. Raises InputError for a model without an encoder."""
        vocabulary = loaded.vocabulary
        if loaded.model.config.encoder is None or loaded.model.config.decoder is None:
            raise InputError(
                "Cloze asks encoder-decoders, which read a gap as a sentinel: this model is of "
                "another family"
            )
        gap = np.array([vocabulary.sentinel_id(0)], np.int32)
        asked = []
        for question in self.draw(vocabulary):
            parts = [vocabulary.encode(question.before), gap, vocabulary.encode(question.after)]
            context = wrap(np.concatenate(parts).astype(np.int32), vocabulary)
            asked.append(
                [
                    Item(context, np.concatenate([gap, _answer(vocabulary, word)]))
                    for word in question.words
                ]
            )
        scores = score_alternatives(loaded, asked, batch_size=self.batch_size)
        right = [row[0].logprob > max(score.logprob for score in row[1:]) for row in scores]
        return {"accuracy": 100.0 * float(np.mean(right))}

    def draw(self, vocabulary: Vocabulary) -> list[Question]:
        """Raises InputError for texts without enough windows and words."""
        words = [text.split() for text in texts(self.source, self.split)]
        windows = [
            run[start : start + self.window]
            for run in words
            for start in range(0, len(run) - self.window + 1, self.window)
        ]
        fit = {
            word
            for word in {word for window in windows for word in window}
            if len(word) >= self.letters
            and word.isalpha()
            and word.islower()
            and len(vocabulary.encode(word)) == 1
        }
        rng = np.random.default_rng(self.seed)
        pool = sorted(fit)
        if len(fit) < self.choices:
            raise InputError(
                f"Cloze: split '{self.split}' has {len(fit)} words of one token and "
                f"{self.letters} letters, fewer than the {self.choices} to choose from"
            )
        found: list[Question] = []
        for index in rng.permutation(len(windows)):
            window = windows[index]
            places = [i for i, word in enumerate(window) if word in fit]
            if not places or len(found) == self.questions:
                continue
            place = int(rng.choice(places))
            chosen = [window[place]]
            while len(chosen) < self.choices:
                other = pool[int(rng.integers(len(pool)))]
                if other not in chosen:
                    chosen.append(other)
            before, after = " ".join(window[:place]), " ".join(window[place + 1 :])
            found.append(Question(before, after, tuple(chosen)))
        if len(found) < self.questions:
            raise InputError(
                f"Cloze: split '{self.split}' gives {len(found)} questions, fewer than "
                f"Cloze.questions={self.questions}"
            )
        return found


def _answer(vocabulary: Vocabulary, word: str) -> np.ndarray:
    return append_eos(vocabulary.encode(word), vocabulary.eos_id)
