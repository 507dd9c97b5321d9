"""`<mask>` in a text: the text around it, marks in its place, and the text with it filled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError

MASK: Final = "<mask>"


def gaps(text: str, most: int | None = None) -> list[str]:
    """The text around its `<mask>`s, without the spaces before them: tokens begin with spaces.

    'a <mask> b' -> ['a', ' b']
    """
    parts = text.split(MASK)
    if len(parts) < 2 or (most is not None and len(parts) - 1 > most):
        expected = "one or more" if most is None else str(most)
        raise InputError(f"'{text}' has {len(parts) - 1} times {MASK}: expected {expected}")
    return [part.rstrip(" ") for part in parts[:-1]] + parts[-1:]


def spliced(text: str, fillings: list[str]) -> str:
    """The text with what was written for each `<mask>`: 'a <mask> b', [' c'] -> 'a c b'.

    Some vocabularies write the space before a word, others don't; `gaps` has left it out.
    """
    first, *rest = text.split(MASK)
    for filling, part in zip(fillings, rest, strict=True):
        first = first if filling[:1].strip() else first.rstrip(" ")
        first += filling + part
    return first


def joined(parts: list[str], marks: Sequence[int], vocabulary: Vocabulary) -> np.ndarray:
    """The parts' tokens with a mark between each two."""
    ids = vocabulary.encode(parts[0]).tolist()
    for mark, part in zip(marks, parts[1:], strict=True):
        ids += [mark, *vocabulary.encode(part).tolist()]
    return np.asarray(ids, dtype=np.int32)


def after_sentinels(tokens: np.ndarray, count: int, vocabulary: Vocabulary) -> list[str]:
    """What stands behind each of the first `count` sentinels: `s0 5 6 s1 7 eos` -> two texts."""
    ids = np.asarray(tokens).tolist()
    ids = ids[: ids.index(vocabulary.eos_id)] if vocabulary.eos_id in ids else ids
    sentinels = {vocabulary.sentinel_id(k) for k in range(vocabulary.num_sentinels)}
    behind: dict[int, list[int]] = {}
    current: list[int] = []  # what stands before the first sentinel belongs to none
    for token in ids:
        if token in sentinels:
            current = behind.setdefault(token, [])
        else:
            current.append(token)
    wanted = (vocabulary.sentinel_id(k) for k in range(count))
    return [vocabulary.decode(behind.get(sentinel, [])) for sentinel in wanted]
