"""Modes that label: a whole text, or each of its words.

Shapes: b batch, l length, n labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives.words import encode_words
from t5x_lite.decode.modes.base import Item, Reading, Row
from t5x_lite.decode.prompts import pad_right
from t5x_lite.models.config_heads import SequenceHead, TokenHead
from t5x_lite.types import Array, Batch, InputError, Params


class Classify(Reading):
    """A text's label with the probabilities of all, or a regression's value."""

    name: ClassVar[str] = "classify"

    def encode(self, item: Item) -> Row:
        if item.get("pair") is None:
            return super().encode(item)
        config, vocabulary = self.loaded.model.config, self.loaded.vocabulary
        if config.encoder is None or config.decoder is not None:
            raise InputError("a pair of texts is for an encoder alone: join the two in 'inputs'")
        first, second = (vocabulary.encode(text) for text in (self.text(item), item["pair"]))
        # One end between them and token types, as BERT; or two and none, as RoBERTa.
        typed = config.encoder.num_token_types > 1
        ends: np.ndarray = np.full(1 if typed else 2, vocabulary.eos_id, np.int32)
        ids = self.check(self.read(np.concatenate([first, ends, second])))
        types_of: np.ndarray = np.zeros(len(ids), np.int32)
        types_of[len(ids) - 1 - len(second) :] = 1
        return Row(ids, notes=types_of if typed else None)

    def rows(self, rows: Sequence[Row | None], length: int) -> dict[str, np.ndarray]:
        batch = super().rows(rows, length)
        if any(row is not None and row.notes is not None for row in rows):
            kinds = [
                np.zeros(0, np.int32) if row is None or row.notes is None else row.notes
                for row in rows
            ]
            batch[types.ENCODER_TOKEN_TYPES] = pad_right(kinds, length)[0]
        return batch

    def compute(self, params: Params, batch: Batch, numbers: Array) -> Any:
        """`[b, n]`: probabilities, or the value where n is 1."""
        logits = self.loaded.model.apply({"params": params}, batch)[:, 0].astype(jnp.float32)
        return logits if logits.shape[-1] == 1 else jax.nn.softmax(logits, axis=-1)

    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        if len(answer) == 1:
            return {"prediction": float(answer[0])}
        names = label_names(self)
        return {
            "prediction": names[int(np.argmax(answer))],
            "probabilities": {
                name: float(share) for name, share in zip(names, answer, strict=True)
            },
        }


class Tag(Reading):
    """A label for each word, a word being what stands between spaces: that of its first token."""

    name: ClassVar[str] = "tag"
    takes: ClassVar[tuple[str, ...]] = ()

    def encode(self, item: Item) -> Row:
        text, vocabulary = item["inputs"], self.loaded.vocabulary
        words = list(re.finditer(r"\S+", text))
        tokens, firsts = encode_words([word[0] for word in words], vocabulary)
        ids = self.check(self.read(tokens))
        before = 0 if vocabulary.bos_id is None else 1
        return Row(ids, notes=(words, firsts + before))

    def compute(self, params: Params, batch: Batch, numbers: Array) -> Any:
        """Probabilities `[b, l, n]`."""
        logits = self.loaded.model.apply({"params": params}, batch).astype(jnp.float32)
        return jax.nn.softmax(logits, axis=-1)

    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        names, (words, places) = label_names(self), row.notes
        found = []
        for word, place in zip(words, places, strict=True):
            best = int(np.argmax(answer[place]))
            found.append(
                {
                    "word": word[0],
                    "start": word.start(),  # characters of the inputs; the end is behind
                    "end": word.end(),
                    "label": names[best],
                    "probability": float(answer[place, best]),
                }
            )
        return {"prediction": [one["label"] for one in found], "words": found}


def label_names(mode: Reading) -> tuple[str, ...]:
    """The labels' names; numbers where nobody gave any."""
    head = mode.loaded.model.config.head
    assert isinstance(head, SequenceHead | TokenHead)
    return mode.loaded.labels or tuple(str(index) for index in range(head.num_labels))
