"""How far one set of a model's parameters answers from another, on rows drawn at random."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.train.merging import random_batch
from t5x_lite.types import Params


class LogitChange(NamedTuple):
    """Differences of logits; an EmbeddingHead's are of its vectors."""

    largest: float
    root_mean_square: float
    spread: float  # the standard deviation of the logits before, over all
    same_choice: float  # the share of places whose largest logit is the same one

    def __str__(self) -> str:
        return (
            f"largest logit change {self.largest:.4g}, root mean square "
            f"{self.root_mean_square:.4g} (logits spread by {self.spread:.4g}); the same first "
            f"choice at {self.same_choice:.1%} of places"
        )


def answers(
    model: Transformer, params: Params, partitioner: Partitioner = Partitioner()
) -> np.ndarray:
    """What the model answers to 8 rows of 32 random tokens for each device: float32 logits."""
    batch = random_batch(model.config, 8 * partitioner.batch_shards, 32)
    with partitioner.activate():
        logits = jax.jit(lambda params, batch: model.apply({"params": params}, batch))(
            params, batch
        )
    return np.asarray(jax.device_get(logits), np.float32)


def logit_change(before: np.ndarray, after: np.ndarray) -> LogitChange:
    """Between two `answers`."""
    difference = np.abs(after - before)
    return LogitChange(
        float(difference.max()),
        float(np.sqrt(np.mean(np.square(difference, dtype=np.float64)))),
        float(before[before > -1e8].std()),  # a pair's logits are padded
        float(np.mean(before.argmax(-1) == after.argmax(-1))),
    )
