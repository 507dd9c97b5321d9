"""What a text model is asked for: a continuation or an answer, its masks' contents, a filled gap.

A mode turns texts into rows of token ids, rows into what its program decodes, and that into
records for people. `<mask>` in a text stands for a gap, whatever the vocabulary calls it.

| mode | encoder | decoder | encoder-decoder |
|---|---|---|---|
| generate | | goes on from the text | writes what it was trained to |
| fill_mask | candidates for each `<mask>` | | |
| infill | | fills one `<mask>` | fills every `<mask>` (T5), or writes the text anew (BART) |

Shapes: b batch, l length.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives.base import wrap
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.fill_mask import fill_mask
from t5x_lite.decode.greedy import greedy
from t5x_lite.decode.prompts import pad_left
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import LMHead
from t5x_lite.models.config_positions import Learned
from t5x_lite.models.transformer import Transformer
from t5x_lite.types import Batch, InputError, Params

MASK = "<mask>"
Name = Literal["generate", "fill_mask", "infill"]


@dataclass(frozen=True)
class Mode(abc.ABC):
    """A model asked one kind of question, in rows of `input_tokens` tokens."""

    model: Transformer
    vocabulary: Vocabulary
    input_tokens: int  # of a row: longer texts are refused
    new_tokens: int  # the most that are generated
    candidates: int = 5  # for each mask

    def __post_init__(self) -> None:
        sizes = {
            "max_input_tokens": self.input_tokens,
            "max_tokens": self.new_tokens,
            "candidates": self.candidates,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"infer.{name}={size}: expected at least 1")
        if self.candidates > self.model.config.vocab_size:
            raise InputError(
                f"infer.candidates={self.candidates}: the model knows no more than "
                f"{self.model.config.vocab_size} tokens"
            )

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The row's ids, int32. Raises InputError for a text that the mode can't take."""

    @abc.abstractmethod
    def compute(self, params: Params, batch: Batch) -> Any:
        """What the model says to a batch; traceable. Arrays with the batch's rows first."""

    @abc.abstractmethod
    def record(self, text: str, ids: np.ndarray, answer: Any) -> dict[str, Any]:
        """What is written for a text, from its ids and its row of `compute`."""

    def rows(self, encoded: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The batch of such rows: `encoder_input_tokens` and `encoder_segment_ids` `[b, l]`."""
        tokens: np.ndarray = np.zeros((len(encoded), self.input_tokens), np.int32)
        segments = np.zeros_like(tokens)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        return {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}

    def check(self, ids: np.ndarray) -> np.ndarray:
        """`ids`, if they fit a row."""
        if len(ids) > self.input_tokens:
            raise InputError(
                f"{len(ids)} tokens with the specials are more than "
                f"infer.max_input_tokens={self.input_tokens}: raise that, or shorten the input"
            )
        return ids

    def _greedy(self, params: Params, batch: Batch) -> Any:
        vocabulary = self.vocabulary
        return greedy(
            self.model,
            params,
            batch,
            max_tokens=self.new_tokens,
            eos_id=vocabulary.eos_id,
            pad_id=vocabulary.pad_id,
            start_id=vocabulary.start_id,
        )


class Answer(Mode):
    """An encoder-decoder reads the text and writes."""

    def encode(self, text: str) -> np.ndarray:
        return self.check(wrap(self.vocabulary.encode(text), self.vocabulary))

    def compute(self, params: Params, batch: Batch) -> Any:
        return self._greedy(params, batch)

    def record(self, text: str, ids: np.ndarray, answer: Any) -> dict[str, Any]:
        return {"inputs": text, "prediction": self.vocabulary.decode(answer)}


class Complete(Mode):
    """A decoder alone goes on from the text."""

    def encode(self, text: str) -> np.ndarray:
        start = np.array([self.vocabulary.start_id], np.int32)
        return self.check(np.concatenate([start, self.vocabulary.encode(text)]))

    def rows(self, encoded: list[np.ndarray]) -> dict[str, np.ndarray]:
        # A row that only fills the batch up has to see something: the start.
        start = np.array([self.vocabulary.start_id], np.int32)
        return pad_left([ids if len(ids) else start for ids in encoded], self.input_tokens)

    def compute(self, params: Params, batch: Batch) -> Any:
        return self._greedy(params, batch)

    def record(self, text: str, ids: np.ndarray, answer: Any) -> dict[str, Any]:
        return {"inputs": text, "prediction": self.vocabulary.decode(answer)}


class FillGap(Complete):
    """A decoder trained to fill in the middle writes what belongs at the one `<mask>`."""

    def encode(self, text: str) -> np.ndarray:
        parts = gaps(text, most=1)
        if self.vocabulary.num_sentinels < 3:
            raise InputError(
                "infilling with a decoder marks three places with sentinels, but the vocabulary "
                f"has {self.vocabulary.num_sentinels}: train with FillInTheMiddle and extra_ids"
            )
        prefix, suffix, middle = (self.vocabulary.sentinel_id(k) for k in range(3))
        before, after = (self.vocabulary.encode(part) for part in parts)
        start = self.vocabulary.start_id
        ids = [start, prefix, *before.tolist(), suffix, *after.tolist(), middle]
        return self.check(np.asarray(ids, dtype=np.int32))

    def record(self, text: str, ids: np.ndarray, answer: Any) -> dict[str, Any]:
        middle = self.vocabulary.decode(answer)
        return {"inputs": text, "prediction": spliced(text, [middle]), "filled": [middle]}


class Infill(Answer):
    """An encoder-decoder fills gaps: by its mask token (BART), or by sentinels (T5)."""

    def encode(self, text: str) -> np.ndarray:
        parts = gaps(text)
        if self.vocabulary.mask_id is not None:
            marks = [self.vocabulary.mask_id] * (len(parts) - 1)
        else:
            marks = [self.vocabulary.sentinel_id(k) for k in range(len(parts) - 1)]
        return self.check(wrap(joined(parts, marks, self.vocabulary), self.vocabulary))

    def record(self, text: str, ids: np.ndarray, answer: Any) -> dict[str, Any]:
        if self.vocabulary.mask_id is not None:  # the whole text, written anew
            return {"inputs": text, "prediction": self.vocabulary.decode(answer)}
        filled = after_sentinels(answer, text.count(MASK), self.vocabulary)
        return {"inputs": text, "prediction": spliced(text, filled), "filled": filled}


class FillMask(Mode):
    """An encoder names candidates for every `<mask>`, each by itself."""

    def encode(self, text: str) -> np.ndarray:
        if self.vocabulary.mask_id is None:
            raise InputError("filling masks needs a vocabulary with a mask token; this has none")
        parts = gaps(text)
        marks = [self.vocabulary.mask_id] * (len(parts) - 1)
        return self.check(wrap(joined(parts, marks, self.vocabulary), self.vocabulary))

    def rows(self, encoded: list[np.ndarray]) -> dict[str, np.ndarray]:
        batch = super().rows(encoded)
        masks = [self._masks(ids) for ids in encoded]
        # Few shapes, for each is a program: the next power of two.
        most = max(1, *(len(places) for places in masks))
        slots: np.ndarray = np.zeros((len(encoded), 1 << (most - 1).bit_length()), np.int32)
        for row, places in enumerate(masks):
            slots[row, : len(places)] = places
        return {**batch, types.MASKED_POSITIONS: slots}

    def compute(self, params: Params, batch: Batch) -> Any:
        return fill_mask(self.model, params, batch, candidates=self.candidates)

    def record(self, text: str, ids: np.ndarray, answer: Any) -> dict[str, Any]:
        tokens, probabilities = answer
        masks, best = [], ids.copy()
        for slot, place in enumerate(self._masks(ids)):
            best[place] = tokens[slot, 0]
            masks.append(
                [
                    {"piece": self.vocabulary.piece(int(token)), "probability": float(share)}
                    for token, share in zip(tokens[slot], probabilities[slot], strict=True)
                ]
            )
        inside = best[(1 if self.vocabulary.bos_id is not None else 0) : -1]
        inside = inside[inside != self.vocabulary.eos_id]  # a guess must not end the text
        return {"inputs": text, "prediction": self.vocabulary.decode(inside), "masks": masks}

    def _masks(self, ids: np.ndarray) -> np.ndarray:
        return np.flatnonzero(ids == self.vocabulary.mask_id)


def choose(config: ModelConfig, name: Name | None) -> type[Mode]:
    """The mode called `name` for such a model; None: what the model is for.

    Raises InputError for a mode that the model can't do, or a model without a language model's
    head.
    """
    if not isinstance(config.head, LMHead):
        raise InputError(
            f"infer writes text, and this model has a {type(config.head).__name__}: expected a "
            "model with an LMHead"
        )
    modes: dict[str, type[Mode]]
    if config.decoder is None:
        family, modes = "an encoder alone", {"fill_mask": FillMask}
    elif config.encoder is None:
        family, modes = "a decoder alone", {"generate": Complete, "infill": FillGap}
    else:
        family, modes = "an encoder-decoder", {"generate": Answer, "infill": Infill}
    if name is None:
        return next(iter(modes.values()))
    if name not in modes:
        raise InputError(f"infer.mode='{name}' is not for {family}, which does: {', '.join(modes)}")
    return modes[name]


def check_lengths(config: ModelConfig, input_tokens: int, new_tokens: int) -> None:
    """Raises InputError where rows are longer than the positions that a model learned."""
    rows = {"encoder": input_tokens, "decoder": new_tokens}
    if config.encoder is None:
        rows["decoder"] = input_tokens + new_tokens - 1
    for name, length in rows.items():
        stack = getattr(config, name)
        if stack is None or not isinstance(stack.positions, Learned):
            continue
        if length > stack.positions.max_length:
            raise InputError(
                f"infer.max_input_tokens={input_tokens} and max_tokens={new_tokens} make rows of "
                f"{length} {name} tokens, but the model learned {stack.positions.max_length} "
                "positions: lower one of the two"
            )


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


def joined(parts: list[str], marks: list[int], vocabulary: Vocabulary) -> np.ndarray:
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


def program(mode: Mode, out_shardings: Any = None) -> Any:
    """`compute(params, batch)`, compiled once."""
    return jax.jit(mode.compute, out_shardings=out_shardings)
