"""How likely a text is to a model, or its targets behind its inputs.

Shapes: b batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives.base import wrap, wrap_targets
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
        scoring.check_lengths(self.loaded.model.config, found)
        return Row(found.context, found.continuation)

    def _parts(self, item: Item) -> scoring.Item:
        config, vocabulary = self.loaded.model.config, self.loaded.vocabulary
        text, targets = self.text(item), item.get("targets")
        if targets is None:
            if self._reads_apart:
                raise InputError(
                    "an encoder-decoder scores targets behind inputs, and this input has none: "
                    "give a .jsonl file with fields 'inputs' and 'targets'"
                )
            start = np.array([vocabulary.start_id, *self._mode_ids], np.int32)
            return scoring.Item(start, vocabulary.encode(text))
        if self.prompt == "continue" and not self._reads_apart:
            found = scoring.encode_pair(config, vocabulary, text, targets)
            context = np.array([found.context[0], *self._mode_ids, *found.context[1:]], np.int32)
            return scoring.Item(context, found.continuation)
        context = self.read(wrap(vocabulary.encode(text), vocabulary))
        return scoring.Item(context, wrap_targets(vocabulary.encode(targets), vocabulary))

    def rows(self, rows: Sequence[Row | None], length: int) -> dict[str, np.ndarray]:
        items = [
            scoring.Item(row.ids, row.targets)
            for row in rows
            if row is not None and row.targets is not None
        ]
        batch = scoring.item_rows(self.loaded, items, len(rows))
        if self.prompt == "prefix" and not self._reads_apart:
            prefix: np.ndarray = np.zeros_like(batch[types.DECODER_INPUT_TOKENS])
            for place, item in enumerate(items):
                prefix[place, : len(item.context)] = 1
            batch[types.DECODER_PREFIX] = prefix
        return batch

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
