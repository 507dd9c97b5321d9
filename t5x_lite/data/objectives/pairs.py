"""Next-sentence prediction: does B follow A? (BERT: Devlin et al. 2019, section 3.1, task 2.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from t5x_lite.data.objectives.base import Example, wrap
from t5x_lite.data.objectives.mlm import MaskedLM, MaskTokens, Selection
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError

FOLLOWS, RANDOM = 0, 1  # the labels, in BERT's order


@dataclasses.dataclass(frozen=True)
class NextSentencePairs:
    """Two pieces of text, from one record or from two, masked as one by `MaskedLM`.

        text               5   6   7   8           other   15  16  17
        follows (0)      101   5   6 102   7   8 102       101, 102: [CLS], [SEP]
        random (1)       101   5   6 102  16  17 102
        token_types        0   0   0   0   1   1   1
        masked_positions   0 ...                           the pair's label is asked at [CLS],
        masked_targets     1 ...                           the masked tokens behind it

    The text is cut at the end of a random sentence, or anywhere if it has but one; half of the time
    its rest is replaced by as many tokens of the other record (if that has so many), from a
    sentence's beginning on. `features` are the two texts: see `sources.PairedSource`. Rows can't be
    packed, since the model looks for the label in their first slot.
    """

    vocabulary: Vocabulary
    rate: float = 0.15  # share of tokens masked
    selection: Selection = MaskTokens()

    features = ("text", "other")
    makes = ("inputs", "token_types", "masked_positions", "masked_targets")
    one_a_row = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_masked", MaskedLM(self.vocabulary, self.rate, self.selection))

    def fit(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        """Both texts alike: the encoder's length without [CLS] and two [SEP]."""
        masked: MaskedLM = self.__dict__["_masked"]
        if self.vocabulary.bos_id is None:
            raise InputError(
                "next-sentence pairs ask for their label at the beginning of the row, but "
                f"{type(self.vocabulary).__name__} has no bos: take a vocabulary such as BERT's"
            )
        if lengths["encoder"] < 5:
            raise InputError(
                f"lengths['encoder'] is {lengths['encoder']}: a pair takes 3 tokens besides its "
                "texts; expected 5 or more"
            )
        tokens = lengths["encoder"] - 3
        masked.fit({**lengths, "encoder": tokens + 2})
        masked.check_slots(tokens, 1, lengths)
        return tokens, tokens

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """(text, other), int32 `[length]` each -> an encoder's Example with the label first."""
        text, other = tokens
        masked: MaskedLM = self.__dict__["_masked"]
        cut = self._cut(text, rng)
        label, rest = FOLLOWS, text[cut:]
        if rng.random() < 0.5 and len(rest) and len(other):
            label, rest = RANDOM, self._window(other, len(rest), rng)
        between = np.array([self.vocabulary.eos_id], np.int32)
        joined = np.concatenate([text[:cut], between, rest])
        places, hidden = masked.mask(joined, rng)
        types: np.ndarray = np.zeros(len(joined) + 2, np.int32)
        types[cut + 2 :] = 1
        return Example(
            inputs=wrap(hidden, self.vocabulary),
            token_types=types,
            masked_positions=np.append(0, places + 1).astype(np.int32),
            masked_targets=np.append(label, joined[places]).astype(np.int32),
        )

    def _cut(self, text: np.ndarray, rng: np.random.Generator) -> int:
        """How many tokens A has: at least one, and one is left for B, if there are two."""
        if len(text) < 2:
            return len(text)
        ends: np.ndarray = 1 + np.flatnonzero(self.vocabulary.ends_sentence(text)[:-1])
        if len(ends):
            return int(ends[rng.integers(0, len(ends))])
        return int(rng.integers(1, len(text)))

    def _window(self, other: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
        """`length` tokens of the other text, from its beginning or that of a later sentence."""
        starts: np.ndarray = np.append(
            0, 1 + np.flatnonzero(self.vocabulary.ends_sentence(other)[:-1])
        )
        starts = starts[starts + length <= len(other)]
        start = int(starts[rng.integers(0, len(starts))]) if len(starts) else 0
        return other[start : start + length]
