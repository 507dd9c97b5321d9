"""Several continuations of one prompt, scored over one key-value cache of it.

Shapes: b batch, c choices, p prompt length, n tokens of a choice, v vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.decode import scoring
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.prompts import pad_left
from t5x_lite.decode.scoring import Item, Measured, Score
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Array, Batch, InputError, Params


def score_choices(
    model: Transformer, params: Params, prompts: Batch, targets: Array, real: Array
) -> Measured:
    """Scores `targets [b, c, n]` behind each row's prompt, which runs through the model once.

    Every choice goes on from the same cache, which nothing that they write changes: c choices of n
    tokens behind a prompt of p cost p + c n tokens instead of c (p + n).

    Args:
      prompts: `decoder_input_tokens [b, p]`, with `decoder_segment_ids` 0 where there is padding on
        the left; an encoder's streams beside it.
      targets: int32, a choice's tokens first, anything behind.
      real: bool `[b, c, n]`: which targets are scored.

    Returns:
      As `scoring.score_rows`, `[b, c]` each.
    """
    variables = {"params": params}
    rows, length = prompts[types.DECODER_INPUT_TOKENS].shape
    last = jnp.full((rows, 1), length - 1, jnp.int32)
    capacity = length + targets.shape[-1] - 1  # the last token is never read
    first, cache = model.apply(
        variables, {**prompts, types.MASKED_POSITIONS: last}, capacity, method="prefill"
    )

    def score(choice: tuple[Array, Array]) -> Measured:
        tokens, wanted = choice
        logits = first
        if tokens.shape[1] > 1:
            later, _ = model.apply(variables, tokens[:, :-1], cache, method="extend")
            logits = jnp.concatenate([first, later], axis=1)
        return scoring.measure(logits, tokens, wanted)

    # One choice after the other: beside each other they would need a cache each.
    found = jax.lax.map(score, (jnp.swapaxes(targets, 0, 1), jnp.swapaxes(real, 0, 1)))
    return jax.tree.map(jnp.transpose, found)


@functools.lru_cache(maxsize=8)
def _program(model: Transformer, out_shardings: Any) -> Any:
    def score(params: Params, batch: Batch) -> Measured:
        prompts = {key: value for key, value in batch.items() if key not in ("targets", "real")}
        return score_choices(model, params, prompts, batch["targets"], batch["real"])

    return jax.jit(score, out_shardings=out_shardings)


def choices(
    loaded: Loaded, questions: Sequence[tuple[str, Sequence[str]]], *, batch_size: int = 8
) -> list[list[Score]]:
    """The score of every choice of each (prompt, choices), as `scoring.loglikelihood` of the pairs.

    Questions may differ in their number of choices. The errors are those of `score_items`; a
    question without a choice is one too.
    """
    asked = []
    for prompt, texts in questions:
        if not texts:
            raise InputError(f"a question has no choices: its prompt ends in {prompt[-40:]!r}")
        asked.append([scoring.make_item(loaded, prompt, text) for text in texts])
    return score_alternatives(loaded, asked, batch_size=batch_size)


def score_alternatives(
    loaded: Loaded, questions: Sequence[Sequence[Item]], *, batch_size: int = 8
) -> list[list[Score]]:
    """As `choices`, of items: those of one question have one context."""
    config, partitioner = loaded.model.config, loaded.partitioner
    scoring.check_scored(config)
    partitioner.check_batch_size(batch_size)
    for items in questions:
        for item in items:
            scoring.check_lengths(loaded, item)
    parts = _parts(loaded, questions, batch_size)
    most = max((len(items) for items in questions), default=0)
    rows = (_rows(loaded, [questions[i] for i in part], batch_size, most) for part in parts)
    program = _program(loaded.model, partitioner.replicated)
    measured = scoring.in_batches(loaded, program, rows, batch_size)
    scores: list[list[Score]] = [[] for _ in questions]
    for part, columns in zip(parts, measured, strict=True):
        for row, index in enumerate(part):
            count = len(questions[index])
            found = (column[row, :count] for column in columns)
            scores[index] = list(scoring.as_scores(tuple(found)))
    return scores


def _parts(loaded: Loaded, questions: Sequence[Sequence[Item]], size: int) -> list[list[int]]:
    """Batches of questions, the longest contexts first.

    In each, a row holds the longest context and behind it the longest choice, be it another's.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i][0].context), reverse=True)
    room = None if loaded.model.config.encoder is not None else loaded.room("decoder")
    parts: list[list[int]] = []
    longest = written = 0
    for i in order:
        own = max(len(item.continuation) for item in questions[i])
        written = max(written, own)
        full = not parts or len(parts[-1]) == size
        if full or (room is not None and longest + written - 1 > room):
            parts.append([])
            longest, written = len(questions[i][0].context), own
        parts[-1].append(i)
    return parts


def _rows(
    loaded: Loaded, questions: Sequence[Sequence[Item]], rows: int, most: int
) -> dict[str, np.ndarray]:
    """Prompts, `targets` and which are `real` `[rows, most, n]`, filled up with rows of nothing."""
    config, start = loaded.model.config, np.array([loaded.vocabulary.start_id], np.int32)
    contexts, room = [items[0].context for items in questions], loaded.room("decoder")
    prompts = contexts if config.encoder is None else [start] * len(questions)
    longest = max(map(len, prompts))
    written = max(len(item.continuation) for items in questions for item in items)
    left = None if room is None else room - longest + 1
    width = max(written, scoring.bucket(written, left, shortest=1))
    targets: np.ndarray = np.zeros((rows, most, width), np.int32)
    real: np.ndarray = np.zeros(targets.shape, bool)
    for row, items in enumerate(questions):
        tokens, which = scoring.padded([item.continuation for item in items], most, width)
        targets[row], real[row] = tokens, which
    if config.encoder is not None:
        tokens = np.full((rows, 1), start[0], np.int32)
        batch = scoring.encoder_rows(loaded, contexts, rows)
        batch[types.DECODER_INPUT_TOKENS] = tokens
        return {**batch, "targets": targets, "real": real}
    length = scoring.bucket(longest, None if room is None else room - width + 1)
    # A row that only fills the batch up has to see something: the start.
    batch = pad_left([*prompts, *[start] * (rows - len(prompts))], length)
    both: np.ndarray = np.zeros((rows, 1), np.int32)
    both[: len(questions), 0] = [items[0].both_ways for items in questions]
    if both.any():
        batch[types.DECODER_PREFIX] = batch[types.DECODER_SEGMENT_IDS] * both
    return {**batch, "targets": targets, "real": real}
