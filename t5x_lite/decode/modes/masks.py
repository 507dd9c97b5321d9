"""What an encoder would write at its masks.

Shapes: b batch, s slots, k candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives.base import wrap
from t5x_lite.decode.fill_mask import fill_mask
from t5x_lite.decode.modes.base import Item, Reading, Row
from t5x_lite.decode.modes.gaps import gaps, joined
from t5x_lite.types import Array, Batch, InputError, Params


class FillMask(Reading):
    """An encoder names candidates for every `<mask>`, each by itself."""

    name: ClassVar[str] = "fill_mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        vocabulary = self.loaded.vocabulary
        if vocabulary.mask_id is None:
            raise InputError("filling masks needs a vocabulary with a mask token; this has none")
        if self.options.candidates > vocabulary.size:
            raise InputError(
                f"infer.candidates={self.options.candidates}: the model knows no more than "
                f"{vocabulary.size} tokens"
            )

    def encode(self, item: Item) -> Row:
        vocabulary = self.loaded.vocabulary
        assert vocabulary.mask_id is not None
        parts = gaps(self.text(item))
        ids = joined(parts, [vocabulary.mask_id] * (len(parts) - 1), vocabulary)
        ids = self.check(wrap(ids, vocabulary))
        return Row(ids, notes=np.flatnonzero(ids == vocabulary.mask_id))

    def rows(self, rows: Sequence[Row | None], length: int) -> dict[str, np.ndarray]:
        # Few shapes, for each is a program: the next power of two.
        most = max((len(row.notes) for row in rows if row is not None), default=1)
        slots: np.ndarray = np.zeros((len(rows), 1 << (most - 1).bit_length()), np.int32)
        for place, row in enumerate(rows):
            if row is not None:
                slots[place, : len(row.notes)] = row.notes
        return {**super().rows(rows, length), types.MASKED_POSITIONS: slots}

    def compute(self, params: Params, batch: Batch, numbers: Array) -> Any:
        return fill_mask(
            self.loaded.model,
            params,
            batch,
            candidates=self.options.candidates,
            vocab_size=self.loaded.vocabulary.size,
        )

    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        vocabulary = self.loaded.vocabulary
        tokens, probabilities = answer
        masks, best = [], row.ids.copy()
        for slot, place in enumerate(row.notes):
            best[place] = tokens[slot, 0]
            masks.append(
                [
                    {"piece": vocabulary.piece(int(token)), "probability": float(share)}
                    for token, share in zip(tokens[slot], probabilities[slot], strict=True)
                ]
            )
        inside = best[(1 if vocabulary.bos_id is not None else 0) : -1]
        inside = inside[inside != vocabulary.eos_id]  # a guess must not end the text
        return {"prediction": vocabulary.decode(inside), "masks": masks}
