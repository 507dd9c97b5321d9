"""A text as one vector: the mean (or first, or last) of a model's last hidden states.

Shapes: b batch, l length, e embed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.decode.modes.base import Item, Reading, Row
from t5x_lite.models import heads
from t5x_lite.models.config_heads import EmbeddingHead
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Array, Batch, Params


class Embed(Reading):
    """The vector of an EmbeddingHead, or without one the pooled states of encoder or decoder."""

    name: ClassVar[str] = "embed"
    takes: ClassVar[tuple[str, ...]] = ("prefix", "pooling")

    def compute(self, params: Params, batch: Batch, numbers: Array) -> Any:
        head = self.loaded.model.config.head
        head = head if isinstance(head, EmbeddingHead) else EmbeddingHead(normalise=False)
        pooling = self.options.pooling or head.pooling
        return pooled(self.loaded.model, params, batch, pooling, normalise=head.normalise)

    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        return {"embedding": [float(x) for x in np.asarray(answer, np.float32)]}


def pooled(
    model: Transformer, params: Params, batch: Batch, pooling: str, *, normalise: bool
) -> Array:
    """One vector a row, float32 `[b, e]`: of the encoder's states, or of a decoder's alone.

    Args:
      model, params: PEFT leaves included.
      batch: with the segment ids of that stack; each row's segment 1 is pooled.
      pooling: "first", "last" or "mean".
      normalise: to length 1.
    """
    alone = model.config.encoder is None
    states = model.apply({"params": params}, batch, method="states" if alone else "encode")
    segments = batch.get(types.DECODER_SEGMENT_IDS if alone else types.ENCODER_SEGMENT_IDS)
    vectors = heads.pool(states, segments, None, pooling)[:, 0].astype(jnp.float32)
    return heads.normalise(vectors) if normalise else vectors
