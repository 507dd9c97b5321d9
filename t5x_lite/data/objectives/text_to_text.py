"""Text to text: supervised pairs, for every family that writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from t5x_lite.data.objectives.base import (
    Example,
    check_rate,
    wrap,
    wrap_targets,
    wrapping,
)
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError


@dataclasses.dataclass(frozen=True)
class TextToText:
    """A pair of texts, each with bos (if there is one) and eos. Nothing is random.

        T5      inputs  [5, 6] -> [5, 6, 1]       targets  [7] -> [7, 1]
        BART    inputs  [5, 6] -> [0, 5, 6, 2]    targets  [7] -> [0, 7, 2]

    The encoder reads the inputs and the decoder writes the targets (`as_encoder_decoder`), or a
    decoder alone reads one and writes the other (`as_prefix_lm`, `as_decoder`); then the inputs
    have at most `inputs_share` of its row.
    """

    vocabulary: Vocabulary
    inputs_share: float = 0.5

    features = ("inputs", "targets")
    makes = ("inputs", "targets")

    def __post_init__(self) -> None:
        check_rate("inputs_share", self.inputs_share)

    def fit(self, lengths: Mapping[str, int]) -> tuple[int, int]:
        """Room for bos and eos is kept on both sides."""
        decoder = lengths["decoder"]
        encoder = lengths.get("encoder", round(self.inputs_share * decoder))
        targets_room = decoder if "encoder" in lengths else decoder - encoder
        inputs = encoder - wrapping(self.vocabulary)
        targets = targets_room - len(wrap_targets(np.zeros(0, np.int32), self.vocabulary))
        if min(inputs, targets) < 1:
            raise InputError(
                f"lengths {dict(lengths)} leave no room for a token and eos: expected 2 or more"
            )
        return inputs, targets

    def __call__(self, *tokens: np.ndarray, rng: np.random.Generator | None = None) -> Example:
        """(inputs, targets) -> the same with bos and eos."""
        inputs, targets = tokens
        vocabulary = self.vocabulary
        return Example(
            wrap(inputs, vocabulary),
            wrap_targets(targets, vocabulary),
            start_id=vocabulary.start_id,
        )
