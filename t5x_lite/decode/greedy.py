"""Greedy decoding by its own name."""

from __future__ import annotations

from t5x_lite.decode.generate import generate
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Array, Batch, Params


def greedy(
    model: Transformer,
    params: Params,
    batch: Batch,
    *,
    max_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    start_id: int | None = None,
) -> Array:
    """`generate` with `Greedy()`: see there."""
    return generate(
        model,
        params,
        batch,
        max_tokens=max_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        start_id=start_id,
    )
