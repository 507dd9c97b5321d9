"""How likely a text is to a model, or its targets behind its inputs.

Shapes: b batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_lite.decode import scoring
from t5x_lite.decode.modes.base import Item, Row
from t5x_lite.decode.modes.text import Generate
from t5x_lite.types import Array, Batch, InputError, Params


class Score(Generate):
    """The log-likelihood of the item's `targets` behind its inputs; without, of the inputs."""

    name: ClassVar[str] = "score"
    takes: ClassVar[tuple[str, ...]] = ("prefix", "prompt", "mode_token")

    def encode(self, item: Item) -> Row:
        found = self._parts(item)
        for part in (found.context, found.continuation):
            self.check(part)
        if not self._reads_apart:
            self.check(np.concatenate([found.context, found.continuation[:-1]]))
        scoring.check_lengths(self.loaded, found)
        return Row(found.context, found.continuation, notes=found)

    def _parts(self, item: Item) -> scoring.Item:
        vocabulary = self.loaded.vocabulary
        text, targets = self.text(item), item.get("targets")
        if targets is None and self._reads_apart:
            raise InputError(
                "an encoder-decoder scores targets behind inputs, and this input has none: "
                "give a .jsonl file with fields 'inputs' and 'targets'"
            )
        if targets is None:
            start = np.array([vocabulary.start_id], np.int32)
            found = scoring.Item(start, vocabulary.encode(text))
        else:
            asking = dataclasses.replace(self.loaded.asking, prompt=self.prompt)
            asked = dataclasses.replace(self.loaded, asking=asking)
            found = scoring.make_item(asked, text, targets)
        # UL2's mode stands before the text: behind a decoder's start.
        place = 0 if self._reads_apart else 1
        context: np.ndarray = np.insert(
            found.context, [place] * len(self._mode_ids), self._mode_ids
        )
        return dataclasses.replace(found, context=context.astype(np.int32))

    def rows(self, rows: Sequence[Row | None], length: int) -> dict[str, np.ndarray]:
        items = [row.notes for row in rows if row is not None]
        return scoring.item_rows(self.loaded, items, len(rows))

    def compute(self, params: Params, batch: Batch, numbers: Array) -> Any:
        return scoring.score_rows(self.loaded.model, params, batch)

    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        total, tokens, greedy = float(answer[0]), int(answer[1]), bool(answer[2])
        return {
            "log_likelihood": total,  # in nats
            "tokens": tokens,
            "perplexity": math.exp(min(-total / tokens, 700.0)),  # of a token
            "greedy": greedy,  # each token was the most probable one
        }
