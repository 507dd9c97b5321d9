"""Labels of whole texts: a class (sentiment, entailment) or a number (similarity).

Devlin et al. 2019 (arXiv:1810.04805, section 4.1). The label is asked for at the text's first
token, [CLS]; which states answer is the head's affair.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_lite.data.objectives.base import Example, wrap, wrapping
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import MASKED_TARGET_TOKENS, MASKED_TARGET_VALUES, InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Texts:
    """What Classify and Regress share: one text or two, and a label at their first token."""

    vocabulary: Vocabulary
    features: Sequence[str] = ("text",)  # one field, or two: a pair
    label: str = "label"  # the field of the label
    between: int = 1  # eos between the texts of a pair; RoBERTa has 2, and no token types

    asked_as: ClassVar[str] = MASKED_TARGET_TOKENS

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "features", tuple(self.features))
        if len(self.features) not in (1, 2):
            raise InputError(f"{name}.features is {self.features}: expected one field or two")
        if self.between < 1:
            raise InputError(f"{name}.between={self.between}: expected 1 or more eos")

    @property
    def makes(self) -> tuple[str, ...]:
        made = ("inputs", "masked_positions", "masked_targets")
        return (*made, "token_types") if self._typed else made

    @property
    def _typed(self) -> bool:
        return len(self.features) == 2 and self.between == 1

    def fit(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """The room of all texts together, for each of them."""
        specials = wrapping(self.vocabulary) + self.between * (len(self.features) - 1)
        room = lengths["encoder"] - specials
        if room < len(self.features):
            raise InputError(
                f"lengths['encoder'] is {lengths['encoder']}: no room for a token beside "
                f"{specials} specials; expected {specials + len(self.features)} or more"
            )
        return (room,) * len(self.features)

    def read(self, record: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """Each text's tokens, int32, and the label, `[1]`."""
        texts = [text_field(record, feature, type(self).__name__) for feature in self.features]
        return (*map(self.vocabulary.encode, texts), self._target(record))

    def cut(
        self, arrays: Sequence[np.ndarray], lengths: Mapping[str, int]
    ) -> tuple[np.ndarray, ...]:
        """The texts cut to their room: of a pair, the longer one, token by token, as BERT does."""
        *texts, label = arrays
        room = self.fit(lengths)[0]
        if len(texts) == 2:
            second = min(len(texts[1]), max(room - len(texts[0]), room // 2))
            return texts[0][: room - second], texts[1][:second], label
        return texts[0][:room], label

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator | None = None) -> Example:
        """(texts, label `[1]`) -> an encoder's Example with one slot. Nothing is random."""
        *texts, label = tokens
        ends: np.ndarray = np.full(self.between, self.vocabulary.eos_id, np.int32)
        joined = texts[0] if len(texts) == 1 else np.concatenate([texts[0], ends, texts[1]])
        types: np.ndarray | None = None
        if self._typed:
            types = np.zeros(len(joined) + wrapping(self.vocabulary), np.int32)
            types[len(types) - 1 - len(texts[1]) :] = 1
        return Example(
            inputs=wrap(joined, self.vocabulary),
            token_types=types,
            masked_positions=np.zeros(1, np.int32),
            masked_targets=label,
            asked_as=self.asked_as,
        )

    def _target(self, record: Mapping[str, Any]) -> np.ndarray:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(_Texts):
    """Which of the labels a text has, or a pair of texts.

        text [5 6], label "positive"      another [8]
        inputs            101   5   6 102   8 102       101, 102: [CLS], [SEP]
        token_types         0   0   0   0   1   1       of pairs alone
        masked_positions    0                           asked at [CLS]
        masked_targets      1                           the place of "positive" in `labels`

    A record's label is such a place, or a name of `labels`. For a SequenceHead with as many labels.
    """

    labels: Sequence[str]  # names, in the order of the dataset's numbers

    asks: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", tuple(self.labels))
        check_labels("Classify", self.labels)

    def _target(self, record: Mapping[str, Any]) -> np.ndarray:
        return np.array([label_id(record, self.label, self._numbers)], np.int32)

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.labels)}

    def truth(self, record: Mapping[str, Any]) -> str:
        """The name of the record's label."""
        return self.labels[label_id(record, self.label, self._numbers)]

    def answer(self, record: Mapping[str, Any], scores: np.ndarray) -> str:
        """The name of the label with the highest score; `scores [1, labels]`."""
        return self.labels[int(scores[0].argmax())]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regress(_Texts):
    """A number that a text has, or a pair of texts, such as how alike they are.

        text [5 6], label 3.8
        inputs            101   5   6 102
        masked_positions    0
        masked_targets    3.8                float32, under `masked_target_values`

    For a SequenceHead with one label, whose score is the number: mean squared error.
    """

    labels: ClassVar[tuple[str, ...]] = ()
    asks: ClassVar[str] = "value"
    asked_as: ClassVar[str] = MASKED_TARGET_VALUES

    def _target(self, record: Mapping[str, Any]) -> np.ndarray:
        return np.array([self.truth(record)], np.float32)

    def truth(self, record: Mapping[str, Any]) -> float:
        """The record's number."""
        value = record.get(self.label)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise InputError(
                f"Regress needs a number in the field '{self.label}', but it is {value!r}; the "
                f"record has {', '.join(record)}"
            )
        return float(value)

    def answer(self, record: Mapping[str, Any], scores: np.ndarray) -> float:
        """The score; `scores [1, 1]`."""
        return float(scores[0, 0])


def check_labels(what: str, labels: Sequence[str]) -> None:
    """Raises InputError unless `labels` are two or more different names."""
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(map(_is_text, labels)):
        raise InputError(f"{what}.labels is {labels}: expected two or more names, none twice")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def label_id(record: Mapping[str, Any], field: str, numbers: Mapping[str, int]) -> int:
    """The number of a record's label, which is a number or a name. InputError: neither."""
    if field not in record:
        raise InputError(
            f"the record has no label field '{field}'; it has {', '.join(record)}: set the "
            "objective's `label`, or rename a field with a preprocessor"
        )
    return number_of(record[field], numbers, field)


def number_of(label: Any, numbers: Mapping[str, int], field: str) -> int:
    """`label` if it is a number of a label, or that of its name. InputError otherwise."""
    number = numbers.get(label, -1) if isinstance(label, str) else label
    if isinstance(number, bool) or not isinstance(number, int | np.integer):
        number = -1
    if not 0 <= number < len(numbers):
        raise InputError(
            f"the field '{field}' holds {label!r}: expected one of the labels "
            f"{', '.join(numbers)}, or its number from 0 (a test set without labels can't be "
            "evaluated)"
        )
    return int(number)


def text_field(record: Mapping[str, Any], field: str, what: str) -> str:
    """A record's text. Raises InputError where it has none."""
    value = record.get(field)
    if not isinstance(value, str):
        raise InputError(
            f"{what} needs the text field '{field}', but the record has {', '.join(record)}: "
            f"rename a field with a preprocessor, such as Rename({{'{field}': '...'}})"
        )
    return value
