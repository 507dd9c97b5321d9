"""Modes that label: a whole text, or each of its words.

Shapes: b batch, l length, n labels.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.decode.modes.base import Item, Reading, Row
from t5x_lite.models.config_heads import SequenceHead, TokenHead
from t5x_lite.types import Batch, InputError, Params


class Classify(Reading):
    """A text's label with the probabilities of all, or a regression's value."""

    name: ClassVar[str] = "classify"

    def compute(self, params: Params, batch: Batch) -> Any:
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
        firsts, tokens = [], []
        for number, word in enumerate(words):
            # With the space before it, as byte-level vocabularies have it in a text.
            pieces = vocabulary.encode((" " if number else "") + word[0])
            if not len(pieces):
                raise InputError(f"the vocabulary has no token for the word '{word[0]}'")
            firsts.append(len(tokens))
            tokens += pieces.tolist()
        ids = self.check(self.read(np.asarray(tokens, np.int32)))
        before = 0 if vocabulary.bos_id is None else 1
        return Row(ids, notes=(words, np.asarray(firsts, np.int64) + before))

    def compute(self, params: Params, batch: Batch) -> Any:
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
