"""What the model sees at a step, and what assembling costs: plain dicts for programs to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite import types
from t5x_lite.data.packing import efficiency, stream_of
from t5x_lite.data.pipeline import ALL_ROWS, Batches, EvaluationBatches
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Vocabulary


def describe(
    batches: Batches | EvaluationBatches, step: int, rows: slice = ALL_ROWS
) -> dict[str, Any]:
    """The batch of `step`, row by row:

    {"step": 3, "efficiency": {"encoder": 0.97, ...}, "shapes": {key: (rows, length)},
     "rows": [{"row": 0,
               "tokens": {key: {"ids": [...], "pieces": [...], "segments": [...],
                                "positions": [...], "weights": [...]}},
               "segments": [{"segment": 1, "text": {key: "decoded text"}}, ...]}, ...]}

    `weights` stands with the stream's targets alone. Padding at a row's end is left out. Masked
    slots are under `masked_target_tokens`: `positions` are their places in the row, `inputs` the
    pieces that the model sees there, and the text is their pieces. Where a task has labels, these
    are the pieces (of a span, those that begin or end there); else the label of a pair of texts,
    asked for at bos, is the piece `<label 0>` or `<label 1>`. Numbers stand as they are.
    """
    batch = batches.batch(step, rows)
    vocabulary, labels = batches.task.vocabulary, batches.task.labels
    first = range(batches.batch_size)[rows][0]
    count = len(next(iter(batch.values())))
    return {
        "step": step,
        "efficiency": efficiency(batch),
        "shapes": {key: tuple(value.shape) for key, value in batch.items()},
        "rows": [
            {
                "row": first + i,
                **describe_row({key: value[i] for key, value in batch.items()}, vocabulary, labels),
            }
            for i in range(count)
        ],
    }


def describe_row(
    row: Mapping[str, np.ndarray], vocabulary: Vocabulary, labels: Sequence[str] = ()
) -> dict[str, Any]:
    """One row of a batch, arrays `[length]` by batch key, as `describe` shows it."""
    asked_keys = [key for key in row if key.endswith("_tokens") or key in types.SLOT_TARGETS]
    tokens: dict[str, dict[str, list[Any]]] = {}
    texts: dict[int, dict[str, str]] = {}
    for key in asked_keys:
        if key in types.SLOT_TARGETS:
            tokens[key], by_segment = _slots(row, key, vocabulary, labels)
        else:
            tokens[key], by_segment = _stream(row, key, vocabulary)
        for segment, text in by_segment.items():
            texts.setdefault(segment, {})[key] = text
    return {
        "tokens": tokens,
        "segments": [{"segment": s, "text": text} for s, text in sorted(texts.items())],
    }


def _stream(
    row: Mapping[str, np.ndarray], key: str, vocabulary: Vocabulary
) -> tuple[dict[str, list[Any]], dict[int, str]]:
    """A stream's columns, and its text by segment."""
    stream = stream_of(key)
    segments = row[f"{stream}_segment_ids"]
    used = int(np.flatnonzero(segments).max(initial=-1)) + 1
    ids = row[key][:used].tolist()
    shown: dict[str, list[Any]] = {
        "ids": ids,
        "pieces": [vocabulary.piece(token) for token in ids],
        "segments": segments[:used].tolist(),
        "positions": row[f"{stream}_positions"][:used].tolist(),
    }
    if key == types.DECODER_TARGET_TOKENS:
        shown["weights"] = row[types.DECODER_LOSS_WEIGHTS][:used].tolist()
    for extra, kind in ((types.DECODER_PREFIX, "prefix"), (types.ENCODER_TOKEN_TYPES, "types")):
        if extra in row and stream_of(extra) == stream:
            shown[kind] = row[extra][:used].tolist()
    numbers = range(1, int(segments.max(initial=0)) + 1)
    return shown, {s: whole_text(row[key][segments == s], vocabulary) for s in numbers}


def _slots(
    row: Mapping[str, np.ndarray], key: str, vocabulary: Vocabulary, labels: Sequence[str]
) -> tuple[dict[str, list[Any]], dict[int, str]]:
    """The used slots' columns, and the pieces asked for by segment."""
    used = int(np.flatnonzero(row[types.MASKED_LOSS_WEIGHTS]).max(initial=-1)) + 1
    places = row[types.MASKED_POSITIONS][:used]
    ids = row[key][:used].tolist()
    seen = row[types.ENCODER_INPUT_TOKENS][places].tolist()

    def name(token: int, there: int) -> str:
        if key == types.MASKED_TARGET_VALUES:
            return f"{token:g}"
        if key == types.MASKED_TARGET_SPANS:
            return "+".join(label for bit, label in enumerate(labels) if token >> bit & 1)
        if labels:
            return labels[token]
        return f"<label {token}>" if there == vocabulary.bos_id else vocabulary.piece(token)

    pieces = [name(token, there) for token, there in zip(ids, seen, strict=True)]
    segments = row[types.ENCODER_SEGMENT_IDS][places].tolist()
    shown: dict[str, list[Any]] = {
        "ids": ids,
        "pieces": pieces,
        "inputs": [vocabulary.piece(token) for token in seen],
        "segments": segments,
        "positions": places.tolist(),
        "weights": row[types.MASKED_LOSS_WEIGHTS][:used].tolist(),
    }
    texts: dict[int, str] = {}
    for segment, piece in zip(segments, pieces, strict=True):
        texts[segment] = f"{texts[segment]} {piece}" if segment in texts else piece
    return shown, texts


def whole_text(tokens: np.ndarray, vocabulary: Vocabulary) -> str:
    """The text of all documents in `tokens`; decoding alone ends with the first eos.

    `[bos] a b [eos] c d [eos]` -> `"a b</s>c d"`; the eos at either end isn't shown.
    """
    eos = vocabulary.eos_id
    ends = np.flatnonzero(tokens == eos)
    parts = [part[part != eos] for part in np.split(tokens, ends)]
    return vocabulary.piece(eos).join(filter(None, map(vocabulary.decode, parts)))


def measure(batches: Batches, windows: int = 8) -> dict[str, float]:
    """What the first windows of the assembly make of their examples.

    By stream, the share of positions that hold a token; `overflow`, the share of examples that
    found no room. For each task with Chunks, `left_out` and `repeated`: pieces left out of their
    windows, and pieces used twice, as shares of the pieces used (in a mixture under
    `<task>/left_out`).
    """
    made = [batches.window(index) for index in range(windows)]
    shares = [efficiency(window.rows) for window in made]
    result = {stream: float(np.mean([s[stream] for s in shares])) for stream in shares[0]}
    result["overflow"] = sum(w.dropped for w in made) / sum(w.placed + w.dropped for w in made)
    for member in batches.members:
        if member.task.chunk is None:
            continue
        pieces = [len(member.windows(window).pieces) for window in range(windows)]
        prefix = "" if isinstance(batches.task, Task) else f"{member.task.name}/"
        result[f"{prefix}left_out"] = _excess(pieces, member.chunk_rows, +1)
        result[f"{prefix}repeated"] = _excess(pieces, member.chunk_rows, -1)
    return result


def _excess(pieces: Sequence[int], rows: int, sign: int) -> float:
    return sum(max(sign * (n - rows), 0) for n in pieces) / (rows * len(pieces))
