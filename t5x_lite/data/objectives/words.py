"""Labels of words (tagging), and the words' places among subword tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_lite.data.objectives.base import Example, wrap, wrapping
from t5x_lite.data.objectives.labels import check_labels, number_of
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError


def encode_words(
    words: Sequence[str], vocabulary: Vocabulary, spaced: Iterable[bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(the words' tokens one after another, the place of each word's first), both int32.

        Gold fish swam      ->      tokens  41 57 58 63       starts  0 1 3

    A word is encoded by itself, with a space before it where `spaced` says so (None: before all but
    the first), so that byte-level pieces are those of running text. One that has no tokens, for
    instance a control character, becomes unk, or eos where there is none: every word has a place.
    """
    spaces = (i > 0 for i in range(len(words))) if spaced is None else spaced
    empty = vocabulary.eos_id if vocabulary.unk_id is None else vocabulary.unk_id
    pieces = []
    for word, space in zip(words, spaces, strict=False):
        tokens = vocabulary.encode(f" {word}" if space else word)
        pieces.append(tokens if len(tokens) else np.array([empty], np.int32))
    ends: np.ndarray = np.cumsum([0, *map(len, pieces)], dtype=np.int32)
    return np.concatenate([np.zeros(0, np.int32), *pieces], dtype=np.int32), ends[:-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tag:
    """A label for each word, asked for at its first token (Devlin et al. 2019, section 5.3).

        words               Gold       fish  swam       labels  O B-animal I-animal O: 1 2 0
        tokens              41  57  58  63               "fish" has two tokens
        inputs         101  41  57  58  63 102
        masked_positions     1   2       4
        masked_targets       1   2       0

    Words that don't fit the row or the slots are not asked, and predicted to be `outside`. A
    record's labels are numbers or names. For a TokenHead with as many labels.
    """

    vocabulary: Vocabulary
    labels: Sequence[str]
    words: str = "tokens"  # the field of the words, a list of texts
    tags: str = "tags"  # the field of their labels
    outside: str = "O"

    features: ClassVar[tuple[str, ...]] = ("tokens",)
    makes: ClassVar[tuple[str, ...]] = ("inputs", "masked_positions", "masked_targets")
    asks: ClassVar[str] = "token"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        check_labels("Tag", self.labels)
        if self.outside not in self.labels:
            raise InputError(
                f"Tag.outside is '{self.outside}', which is none of the labels "
                f"{', '.join(self.labels)}"
            )

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.labels)}

    def fit(self, lengths: Mapping[str, int]) -> tuple[int]:
        """The encoder's length without bos and eos."""
        room = lengths["encoder"] - wrapping(self.vocabulary)
        if room < 1:
            raise InputError(
                f"lengths['encoder'] is {lengths['encoder']}: no room for a token between bos and "
                "eos; expected 3 or more"
            )
        return (room,)

    def read(self, record: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """(tokens, places of the words' first tokens, labels), int32."""
        tokens, starts = encode_words(self._words(record), self.vocabulary)
        labels = [self._numbers[label] for label in self.truth(record)]
        return tokens, starts, np.array(labels, np.int32)

    def cut(
        self, arrays: Sequence[np.ndarray], lengths: Mapping[str, int]
    ) -> tuple[np.ndarray, ...]:
        """The tokens that fit, and the words whose first token is among them."""
        tokens, starts, labels = arrays
        room = self.fit(lengths)[0]
        asked = min(int(np.sum(starts < room)), lengths["masked"])
        return tokens[:room], starts[:asked], labels[:asked]

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator | None = None) -> Example:
        """(tokens, places, labels) -> an encoder's Example. Nothing is random."""
        ids, starts, labels = tokens
        return Example(
            inputs=wrap(ids, self.vocabulary),
            masked_positions=(starts + wrapping(self.vocabulary) - 1).astype(np.int32),
            masked_targets=labels,
        )

    def truth(self, record: Mapping[str, Any]) -> list[str]:
        """The names of the words' labels."""
        words, tags = self._words(record), record.get(self.tags, ())
        if isinstance(tags, str) or not isinstance(tags, Sequence | np.ndarray):
            raise InputError(
                f"Tag needs a list of labels in the field '{self.tags}', but it is {tags!r}"
            )
        if len(tags) != len(words):
            raise InputError(
                f"Tag needs a label in the field '{self.tags}' for each of the {len(words)} words "
                f"in '{self.words}', but there are {len(tags)}; the record has {', '.join(record)}"
            )
        return [self.labels[number_of(tag, self._numbers, self.tags)] for tag in tags]

    def answer(self, record: Mapping[str, Any], scores: np.ndarray) -> list[str]:
        """The best label's name for each word; `scores [asked, labels]`."""
        found = [self.labels[number] for number in scores.argmax(axis=-1).tolist()]
        return found + [self.outside] * (len(self._words(record)) - len(found))

    def _words(self, record: Mapping[str, Any]) -> list[str]:
        words = record.get(self.words)
        if isinstance(words, str) or not isinstance(words, Sequence | np.ndarray):
            raise InputError(
                f"Tag needs a list of words in the field '{self.words}', but the record has "
                f"{', '.join(record)}"
            )
        odd = next((word for word in words if not isinstance(word, str)), None)
        if odd is not None or None in list(words):
            raise InputError(f"Tag needs texts in the list '{self.words}', but one is {odd!r}")
        return list(words)
