"""Texts behind prompts, for evaluations that ask a model to write."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives.base import wrap
from t5x_lite.decode import scoring
from t5x_lite.decode.generate import generate
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.prompts import pad_left
from t5x_lite.decode.sampling import Greedy, Strategy
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Array, Batch, InputError, Params

_NUMBERS = "numbers"  # beside a batch: which prompt each row is


def write(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    stops: Sequence[str] = (),
    strategy: Strategy = Greedy(),
    seed: int = 0,
    batch_size: int = 8,
) -> list[str]:
    """What the model writes behind each prompt, up to the first of the `stops`, without it.

    A decoder alone goes on from the prompt, or answers it, as it was trained to; an encoder reads
    the prompt with its bos and eos. Raises InputError for a prompt that leaves no room for
    `max_tokens`.
    """
    vocabulary = loaded.vocabulary
    if loaded.model.config.encoder is not None:
        rows = [wrap(vocabulary.encode(text), vocabulary) for text in prompts]
    elif loaded.asking.prompt in (None, "continue"):
        start = np.array([vocabulary.start_id], np.int32)
        rows = [np.concatenate([start, vocabulary.encode(text)]) for text in prompts]
    else:
        rows = [scoring.reading(vocabulary, text) for text in prompts]
    tokens = write_tokens(
        loaded, rows, max_tokens=max_tokens, strategy=strategy, seed=seed, batch_size=batch_size
    )
    return [cut(loaded.text(row), stops) for row in tokens]


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the `stops` in it."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def write_tokens(
    loaded: Loaded,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    strategy: Strategy = Greedy(),
    seed: int = 0,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """The tokens behind prompts of token ids, int32 `[max_tokens]`: up to eos, then padding.

    What is drawn behind a prompt depends on `seed` and its number alone.
    """
    config, partitioner = loaded.model.config, loaded.partitioner
    scoring.check_scored(config)
    partitioner.check_batch_size(batch_size)
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens}: expected at least 1")
    most = room = loaded.room("decoder" if config.encoder is None else "encoder")
    if room is not None and config.encoder is None:
        room -= max_tokens - 1  # the last token is never read
    for prompt in prompts:
        if room is not None and len(prompt) > room:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {max_tokens} to write are more than the "
                f"{most} positions that this model has for them: shorten the prompt, take fewer "
                "shots, or lower max_tokens"
            )
    vocabulary = loaded.vocabulary
    ids = (loaded.ends, vocabulary.pad_id, vocabulary.start_id)
    program = _program(loaded.model, strategy, max_tokens, ids, seed, partitioner.replicated)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    local, written = partitioner.local_rows(batch_size), []
    with partitioner.activate():
        for part in parts:
            rows = [prompts[i] for i in part]
            if config.encoder is not None:
                batch = scoring.encoder_rows(loaded, rows, batch_size)
            else:
                # A row that only fills the batch up has to see something: the start.
                fill = [np.array([vocabulary.start_id], np.int32)] * (batch_size - len(rows))
                batch = pad_left([*rows, *fill], scoring.bucket(max(map(len, rows)), room))
                if loaded.asking.prompt == "prefix":
                    batch[types.DECODER_PREFIX] = batch[types.DECODER_SEGMENT_IDS]
            numbers = scoring.padded([[i] for i in part], batch_size, 1)[0]
            batch = {**batch, _NUMBERS: numbers}
            batch = {key: value[local] for key, value in batch.items()}
            written.append(program(loaded.params, partitioner.put_batch(batch, batch_size)))
    found: dict[int, np.ndarray] = {}
    for part, tokens in zip(parts, jax.device_get(written), strict=True):
        found |= zip(part, tokens, strict=False)  # the last batch is filled up
    return [found[i] for i in range(len(prompts))]


@functools.lru_cache(maxsize=8)
def _program(
    model: Transformer,
    strategy: Strategy,
    max_tokens: int,
    ids: tuple[tuple[int, ...], int, int],
    seed: int,
    out_shardings: Any,
) -> Any:
    ends, pad, start = ids

    def ask(params: Params, batch: Batch) -> Array:
        key, numbers = jax.random.key(seed), batch[_NUMBERS][:, 0]
        return generate(
            model,
            params,
            {name: value for name, value in batch.items() if name != _NUMBERS},
            strategy=strategy,
            max_tokens=max_tokens,
            eos_id=ends,
            pad_id=pad,
            start_id=start,
            rng=jax.vmap(functools.partial(jax.random.fold_in, key))(numbers),
        )

    return jax.jit(ask, out_shardings=out_shardings)
