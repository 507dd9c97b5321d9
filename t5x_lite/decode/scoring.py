"""Log-likelihoods of given texts: of a continuation behind a context, or of whole documents.

All in nats. Nothing is sampled, and no weight changes.

Shapes: b batch, l length, s slots, v vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives.base import wrap, wrap_targets
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.loaded import Loaded
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import LMHead
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Array, Batch, InputError, Params

_SHORTEST = 16  # the smallest bucket of lengths: shorter rows cost about as much
Measured = tuple[Array, Array, Array]


@dataclass(frozen=True)
class Score:
    """How likely a text was to a model."""

    logprob: float  # summed over its tokens, in nats
    tokens: int
    greedy: bool  # every token was the most probable at its place


@dataclass(frozen=True, eq=False)
class Item:
    """A text to score, as int32 ids: `continuation` behind `context`.

    A decoder alone reads both in one row: its context begins with the start token, and has at least
    that. An encoder reads the context (with its bos and eos), and its decoder writes the
    continuation.
    """

    context: np.ndarray
    continuation: np.ndarray
    both_ways: bool = False  # a decoder alone sees its context in both directions (prefix LM)


# --- on the device -------------------------------------------------------------------------------


def score_rows(model: Transformer, params: Params, batch: Batch) -> Measured:
    """Scores the weighted targets of a teacher-forced batch, row by row.

    With slots in the batch (`masked_positions`, `masked_target_tokens`, `masked_loss_weights`,
    `[b, s]`), the vocabulary's product runs there alone: a continuation is a few tokens of a long
    row. Otherwise the decoder's targets and weights `[b, l]` count. A weight is 0 or not 0.

    Returns:
      The sum of log-probabilities float32 `[b]`, how many tokens it is of int32 `[b]`, and whether
      each of them was the most probable one bool `[b]`.
    """
    logits = model.apply({"params": params}, batch)
    if types.MASKED_POSITIONS in batch:
        targets, weights = batch[types.MASKED_TARGET_TOKENS], batch[types.MASKED_LOSS_WEIGHTS]
    else:
        targets, weights = batch[types.DECODER_TARGET_TOKENS], batch[types.DECODER_LOSS_WEIGHTS]
    return measure(logits, targets, weights > 0)


def measure(logits: Array, targets: Array, real: Array) -> Measured:
    """What `score_rows` returns, from logits `[b, s, v]`, and targets and bool `real` `[b, s]`."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    best = jnp.argmax(logits, axis=-1) == targets
    return (
        jnp.sum(jnp.where(real, logprobs, 0.0), axis=1),
        jnp.sum(real, axis=1, dtype=jnp.int32),
        jnp.all(best | ~real, axis=1),
    )


@functools.lru_cache(maxsize=8)
def _program(model: Transformer, out_shardings: Any) -> Any:
    return jax.jit(functools.partial(score_rows, model), out_shardings=out_shardings)


# --- texts ---------------------------------------------------------------------------------------


def encode_pair(
    config: ModelConfig, vocabulary: Vocabulary, context: str, continuation: str
) -> Item:
    """The item of two texts, each token of which belongs to one of them.

    Of a decoder alone: spaces at the end of the context go to the continuation, where tokenizers
    have them, and the two are encoded as one text; where a token would reach across the seam, each
    by itself. An encoder-decoder's continuation is a whole target with its eos, as in training.
    Raises InputError for a continuation without a token.
    """
    if config.encoder is not None:
        target = wrap_targets(vocabulary.encode(continuation), vocabulary)
        return Item(wrap(vocabulary.encode(context), vocabulary), target)
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    before, whole = vocabulary.encode(bare), vocabulary.encode(bare + continuation)
    rest = whole[len(before) :]
    if not len(rest) or not np.array_equal(whole[: len(before)], before):
        rest = vocabulary.encode(continuation)
    if not len(rest):
        raise InputError(
            f"the continuation {continuation!r} has no token: there is nothing to score"
        )
    start = np.array([vocabulary.start_id], np.int32)
    return Item(np.concatenate([start, before]).astype(np.int32), rest.astype(np.int32))


def make_item(loaded: Loaded, context: str, continuation: str) -> Item:
    """The item of two texts, as the model was trained to be asked (`Loaded.asking`).

    A decoder alone goes on from the context, see `encode_pair`, or it answers: then the context
    ends with eos, and the continuation is a whole target with its eos.
    """
    config, vocabulary, prompt = loaded.model.config, loaded.vocabulary, loaded.asking.prompt
    if config.encoder is not None or prompt in (None, "continue"):
        return encode_pair(config, vocabulary, context, continuation)
    read = reading(vocabulary, context)
    target = wrap_targets(vocabulary.encode(continuation), vocabulary)
    return Item(read, target, both_ways=prompt == "prefix")


def reading(vocabulary: Vocabulary, context: str) -> np.ndarray:
    """A text that a decoder alone answers: its start, then the text with bos and eos."""
    read, start = wrap(vocabulary.encode(context), vocabulary), vocabulary.start_id
    return read if read[0] == start else np.concatenate([[start], read]).astype(np.int32)


def loglikelihood(
    loaded: Loaded, pairs: Sequence[tuple[str, str]], *, batch_size: int = 32
) -> list[Score]:
    """How likely each continuation is behind its context: (context, continuation) pairs of texts.

    See `make_item` for how texts become tokens, and `score_items` for the errors.
    """
    return score_items(loaded, [make_item(loaded, *pair) for pair in pairs], batch_size=batch_size)


def rolling_loglikelihood(
    loaded: Loaded, texts: Sequence[str], *, length: int, overlap: int = 1, batch_size: int = 32
) -> list[Score]:
    """How likely whole documents are to a decoder alone, longer than its rows as they may be.

    Every token is scored once: see `windows` for `length` and `overlap`. An empty document has a
    score of no token. A document's perplexity is `exp(-logprob / tokens)`, and its bits per byte
    `-logprob / ln 2 / bytes`, whatever the vocabulary.
    """
    if loaded.model.config.encoder is not None:
        raise InputError(
            "rolling log-likelihood needs a decoder alone; an encoder-decoder has no likelihood of "
            "a text without a context: score pairs instead"
        )
    start = loaded.vocabulary.start_id
    parts = [windows(loaded.vocabulary.encode(text), start, length, overlap) for text in texts]
    scores = iter(score_items(loaded, [i for part in parts for i in part], batch_size=batch_size))
    return [total([next(scores) for _ in part]) for part in parts]


def windows(tokens: np.ndarray, start_id: int, length: int, overlap: int = 1) -> list[Item]:
    """A document in rows of at most `length` inputs, every token of it continued once.

    The first row begins with `start_id`; each later one goes on behind the last `overlap` tokens at
    least, and the last one reaches as far back as it has room (length 3, overlap 1; | is the seam):

        5 6 7 8 9 10 11    ->    s | 5 6 7     7 | 8 9 10     8 9 10 | 11

    A longer overlap gives each token more context, and costs length / (length - overlap + 1) times
    the work.
    """
    if not 1 <= overlap <= length:
        raise InputError(f"overlap={overlap}: expected between 1 and length={length}")
    row = np.concatenate([[start_id], tokens]).astype(np.int32)
    found, done = [], 0
    while done < len(tokens):
        count = min(length if done == 0 else length - overlap + 1, len(tokens) - done)
        end = done + count + 1  # in `row`, which has one more in front
        # The earlier row's tokens up to the seam. A short last row leaves room for more of them.
        begin = max(0, end - 1 - length)
        found.append(Item(row[begin : done + 1], row[done + 1 : end]))
        done += count
    return found


def total(scores: Sequence[Score]) -> Score:
    """The score of texts one behind the other."""
    return Score(
        sum(score.logprob for score in scores),
        sum(score.tokens for score in scores),
        all(score.greedy for score in scores),
    )


# --- batches -------------------------------------------------------------------------------------


def score_items(loaded: Loaded, items: Sequence[Item], *, batch_size: int = 32) -> list[Score]:
    """The score of each item, in their order; rows of like length share a batch.

    Lengths are rounded up to powers of two, so that a few programs serve all. Raises InputError for
    a model that can't write, an empty continuation, or a row longer than the model.
    """
    config, partitioner = loaded.model.config, loaded.partitioner
    check_scored(config)
    partitioner.check_batch_size(batch_size)
    for one in items:
        check_lengths(loaded, one)
    order = sorted(range(len(items)), key=lambda i: _size(items[i]), reverse=True)
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows = (item_rows(loaded, [items[i] for i in part], batch_size) for part in parts)
    measured = in_batches(loaded, _program(loaded.model, partitioner.replicated), rows, batch_size)
    scores: dict[int, Score] = {}
    for part, columns in zip(parts, measured, strict=True):
        scores |= zip(part, as_scores(columns), strict=False)  # the last batch is filled up
    return [scores[i] for i in range(len(items))]


def in_batches(
    loaded: Loaded, program: Any, batches: Iterable[dict[str, np.ndarray]], batch_size: int
) -> list[Measured]:
    """`program(params, batch)` of each batch; read at the end, so that no batch waits for one."""
    partitioner = loaded.partitioner
    local = partitioner.local_rows(batch_size)
    measured = []
    with partitioner.activate():
        for rows in batches:
            own = {key: value[local] for key, value in rows.items()}
            measured.append(program(loaded.params, partitioner.put_batch(own, batch_size)))
    return jax.device_get(measured)


def item_rows(loaded: Loaded, items: Sequence[Item], rows: int) -> dict[str, np.ndarray]:
    """The batch of `items` for `score_rows`, filled up to `rows` rows that score nothing.

    Of a decoder alone, context [s 5] and continuation [6 7 8]:

        decoder_input_tokens   s 5 6 7       masked_positions       1 2 3
                                             masked_target_tokens   6 7 8
    """
    config, start = loaded.model.config, loaded.vocabulary.start_id
    assert config.decoder is not None
    most = loaded.room("decoder")
    written = [item.continuation for item in items]
    if config.encoder is not None:
        inputs = [np.concatenate([[start], tokens[:-1]]) for tokens in written]
        width = bucket(max(map(len, inputs)), most)
        targets, real = padded(written, rows, width)
        return {
            **encoder_rows(loaded, [item.context for item in items], rows),
            types.DECODER_INPUT_TOKENS: padded(inputs, rows, width)[0],
            types.DECODER_TARGET_TOKENS: targets,
            types.DECODER_LOSS_WEIGHTS: real.astype(np.float32),
            # All of one segment, which is that of the encoder's real tokens: it hides its padding.
            types.DECODER_SEGMENT_IDS: np.ones_like(targets),
        }
    inputs = [np.concatenate([item.context, item.continuation[:-1]]) for item in items]
    seams = [len(item.context) - 1 for item in items]
    places: list[np.ndarray] = [
        seam + np.arange(len(ids)) for seam, ids in zip(seams, written, strict=True)
    ]
    slots = bucket(max(map(len, written)), None, shortest=1)
    targets, real = padded(written, rows, slots)
    width = bucket(max(map(len, inputs)), most)
    both: list[np.ndarray] = [
        np.ones(len(item.context) * item.both_ways, np.int32) for item in items
    ]
    prefix = {types.DECODER_PREFIX: padded(both, rows, width)[0]} if any(map(len, both)) else {}
    last = np.array([len(ids) - 1 for ids in inputs] + [0] * (rows - len(inputs)), np.int32)
    return {
        **prefix,
        # Padding adds no length: Rotary's DynamicScaling depends on the last position.
        types.DECODER_POSITIONS: np.minimum(np.arange(width, dtype=np.int32), last[:, None]),
        # Behind a row's end comes what a causal decoder can't see.
        types.DECODER_INPUT_TOKENS: padded(inputs, rows, width)[0],
        types.MASKED_POSITIONS: padded(places, rows, slots)[0],
        types.MASKED_TARGET_TOKENS: targets,
        types.MASKED_LOSS_WEIGHTS: real.astype(np.float32),
    }


def encoder_rows(loaded: Loaded, texts: Sequence[np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """`encoder_input_tokens` and `encoder_segment_ids` `[rows, bucket of the longest]`."""
    tokens, real = padded(texts, rows, bucket(max(map(len, texts)), loaded.room("encoder")))
    return {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: real.astype(np.int32)}


def padded(parts: Sequence[Any], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[rows, width]` that begins with `parts`, zeros behind, and which are theirs."""
    tokens: np.ndarray = np.zeros((rows, width), np.int32)
    real: np.ndarray = np.zeros((rows, width), bool)
    for row, part in enumerate(parts):
        tokens[row, : len(part)], real[row, : len(part)] = part, True
    return tokens, real


def as_scores(measured: Measured) -> Iterator[Score]:
    """Rows of arrays that are on the host, one score each."""
    for logprob, tokens, greedy in zip(*measured, strict=True):
        yield Score(float(logprob), int(tokens), bool(greedy))


# --- lengths -------------------------------------------------------------------------------------


def bucket(length: int, most: int | None, shortest: int = _SHORTEST) -> int:
    """The power of two from `shortest` on that holds `length`, but no more than `most`."""
    power = max(shortest, 1 << (length - 1).bit_length())
    return power if most is None else min(power, most)


def check_scored(config: ModelConfig) -> None:
    """Raises InputError for a model without a likelihood."""
    if config.decoder is None:
        raise InputError(
            "log-likelihoods need a model with a decoder; this is an encoder alone, which gives no "
            "probability to a text: score with a decoder, or an encoder-decoder"
        )
    if not isinstance(config.head, LMHead):
        raise InputError(
            f"log-likelihoods need a language model's head; this model has a "
            f"{type(config.head).__name__}"
        )


def check_lengths(loaded: Loaded, item: Item) -> None:
    """Raises InputError where an item has nothing to score, or is longer than the model."""
    config = loaded.model.config
    context, written = len(item.context), len(item.continuation)
    if not written:
        raise InputError("a continuation has no token: there is nothing to score")
    rows = {"decoder": written}
    if config.encoder is not None:
        rows["encoder"] = context
    elif context:
        rows["decoder"] = context + written - 1  # the last token is never read
    else:
        raise InputError("a decoder's context has no token: begin it with the start token")
    for name, length in rows.items():
        most = loaded.room(name)
        if most is not None and length > most:
            raise InputError(
                f"a text to score is a row of {length} tokens for the {name}, which has {most} "
                "positions for it (Learned.max_length): shorten the context, or take fewer shots"
            )


def _size(item: Item) -> int:
    return len(item.context) + len(item.continuation)
