"""What the model sees at a step, and what assembling costs: plain dicts for programs to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite import types
from t5x_lite.data.packing import efficiency
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

    `weights` stands with the stream's targets alone. Padding at a row's end is left out.
    """
    batch = batches.batch(step, rows)
    vocabulary = batches.task.vocabulary
    first = range(batches.batch_size)[rows][0]
    count = len(next(iter(batch.values())))
    return {
        "step": step,
        "efficiency": efficiency(batch),
        "shapes": {key: tuple(value.shape) for key, value in batch.items()},
        "rows": [
            {
                "row": first + i,
                **describe_row({key: value[i] for key, value in batch.items()}, vocabulary),
            }
            for i in range(count)
        ],
    }


def describe_row(row: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> dict[str, Any]:
    """One row of a batch, arrays `[length]` by batch key, as `describe` shows it."""
    token_keys = [key for key in row if key.endswith("_tokens")]
    tokens: dict[str, dict[str, list[Any]]] = {}
    texts: dict[int, dict[str, str]] = {}
    for key in token_keys:
        stream = key.split("_")[0]
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
        tokens[key] = shown
        for segment in range(1, int(segments.max(initial=0)) + 1):
            text = vocabulary.decode(row[key][segments == segment])
            texts.setdefault(segment, {})[key] = text
    return {
        "tokens": tokens,
        "segments": [{"segment": s, "text": text} for s, text in sorted(texts.items())],
    }


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
