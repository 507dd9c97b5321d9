"""Modes that write: an answer or a continuation, and what belongs in a gap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives.base import append_eos, wrap
from t5x_lite.decode.asking import Prompt
from t5x_lite.decode.generate import generate
from t5x_lite.decode.modes.base import Item, Mode, Row
from t5x_lite.decode.modes.gaps import MASK, after_sentinels, gaps, joined, spliced
from t5x_lite.decode.prompts import pad_left, pad_right
from t5x_lite.decode.sampling import Greedy, Sampling
from t5x_lite.decode.stopping import cut_at
from t5x_lite.types import Array, Batch, InputError, Params

_UL2 = ("R", "S", "X")
WRITING = ("strategy", "cache_dtype", "window")  # options of how tokens are made


class Generate(Mode):
    """An encoder-decoder answers the text; a decoder alone goes on from it, or answers it."""

    name: ClassVar[str] = "generate"
    takes: ClassVar[tuple[str, ...]] = (
        *("prefix", "prompt", "mode_token", "stop"),
        *WRITING,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.options.prompt is not None and self._reads_apart:
            raise InputError(
                f"infer.prompt='{self.options.prompt}' is for a decoder alone: this model has an "
                "encoder, which reads the text"
            )
        _ = self._mode_ids

    @property
    def _reads_apart(self) -> bool:
        return self.loaded.model.config.encoder is not None

    @property
    def prompt(self) -> Prompt:
        """How a decoder alone is asked."""
        return self.options.prompt or self.loaded.asking.prompt or "continue"

    @property
    def _mode_ids(self) -> list[int]:
        """UL2's mode tokens are the vocabulary's last three sentinels."""
        if self.options.mode_token is None:
            return []
        if self.options.mode_token not in _UL2:
            raise InputError(
                f"infer.mode_token='{self.options.mode_token}': expected one of {', '.join(_UL2)}"
            )
        place = self.loaded.vocabulary.num_sentinels - 3 + _UL2.index(self.options.mode_token)
        if place < 0:
            raise InputError(
                f"infer.mode_token='{self.options.mode_token}' is one of UL2's last three "
                f"sentinels, but the vocabulary has {self.loaded.vocabulary.num_sentinels}"
            )
        return [self.loaded.vocabulary.sentinel_id(place)]

    def encode(self, item: Item) -> Row:
        tokens = self.loaded.vocabulary.encode(self.text(item))
        if self.prompt == "continue" and not self._reads_apart:
            return Row(self.check([self.loaded.vocabulary.start_id, *self._mode_ids, *tokens]))
        return Row(self.check(self.read(wrap(tokens, self.loaded.vocabulary))))

    def read(self, wrapped: np.ndarray) -> np.ndarray:
        """Wrapped inputs as the encoder has them, or in a decoder's row: see `layouts`."""
        wrapped = np.array([*self._mode_ids, *wrapped], np.int32)
        if self._reads_apart:
            return wrapped
        start = self.loaded.vocabulary.start_id
        return wrapped if wrapped[0] == start else np.array([start, *wrapped], np.int32)

    def rows(self, rows: Sequence[Row | None], length: int) -> dict[str, np.ndarray]:
        if self._reads_apart:
            nothing: np.ndarray = np.zeros(0, np.int32)
            tokens, segments = pad_right([nothing if r is None else r.ids for r in rows], length)
            return {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}
        # A row that only fills the batch up has to see something: the start.
        start = np.array([self.loaded.vocabulary.start_id], np.int32)
        batch = pad_left([start if row is None else row.ids for row in rows], length)
        if self.prompt == "prefix":
            batch[types.DECODER_PREFIX] = batch[types.DECODER_SEGMENT_IDS]
        return batch

    def compute(self, params: Params, batch: Batch, numbers: Array) -> Any:
        vocabulary, options = self.loaded.vocabulary, self.options
        # A key by the input's number: its answer does not depend on its batch.
        base = jax.random.key(options.seed)
        keys = jax.vmap(lambda number: jax.random.fold_in(base, number))(numbers[:, 0])
        return generate(
            self.loaded.model,
            params,
            batch,
            strategy=options.strategy or Greedy(),
            max_tokens=options.max_tokens,
            eos_id=self.loaded.ends,
            pad_id=vocabulary.pad_id,
            start_id=vocabulary.start_id,
            rng=keys if isinstance(options.strategy, Sampling) else None,
            cache_dtype=options.cache_dtype,
            window=options.window,
        )

    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        return {"prediction": self.written(answer)}

    def written(self, answer: np.ndarray) -> str:
        """The text of what was generated, up to the first of the stops."""
        return cut_at(self.loaded.text(answer), self.options.stop)


class Rewrite(Generate):
    """A model trained as BART reads masks in the gaps, and writes the text anew."""

    name: ClassVar[str] = "infill"
    takes: ClassVar[tuple[str, ...]] = ("prefix", "prompt", *WRITING)

    def encode(self, item: Item) -> Row:
        vocabulary = self.loaded.vocabulary
        if vocabulary.mask_id is None:
            raise InputError(
                "this model reads a mask in the place of a gap, but its vocabulary has none"
            )
        parts = gaps(self.text(item))
        ids = joined(parts, [vocabulary.mask_id] * (len(parts) - 1), vocabulary)
        return Row(self.check(self.read(wrap(ids, vocabulary))))


class FillSentinels(Generate):
    """A model trained by span corruption writes each gap's contents behind its sentinel."""

    name: ClassVar[str] = "infill"
    takes: ClassVar[tuple[str, ...]] = ("prefix", "prompt", "mode_token", *WRITING)

    def encode(self, item: Item) -> Row:
        vocabulary = self.loaded.vocabulary
        parts = gaps(self.text(item))
        ids = joined(parts, [vocabulary.sentinel_id(k) for k in range(len(parts) - 1)], vocabulary)
        # As `denoising_example`: no bos.
        return Row(self.check(self.read(append_eos(ids, vocabulary.eos_id))))

    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        text = self.text(item)
        filled = after_sentinels(answer, text.count(MASK), self.loaded.vocabulary)
        return {"prediction": spliced(text, filled), "filled": filled}


class FillGap(Generate):
    """A decoder trained to fill in the middle writes what belongs at the one `<mask>`."""

    name: ClassVar[str] = "infill"
    takes: ClassVar[tuple[str, ...]] = ("prefix", "stop", *WRITING)

    def encode(self, item: Item) -> Row:
        vocabulary = self.loaded.vocabulary
        before, after = (vocabulary.encode(part) for part in gaps(self.text(item), most=1))
        prefix, suffix, middle = self._marks()
        return Row(self.check([vocabulary.start_id, prefix, *before, suffix, *after, middle]))

    def _marks(self) -> tuple[int, int, int]:
        vocabulary = self.loaded.vocabulary
        if self.loaded.asking.middle is not None:
            return self.loaded.asking.middle
        if vocabulary.num_sentinels < 3:
            raise InputError(
                "infilling with a decoder marks three places with sentinels, but the vocabulary "
                f"has {vocabulary.num_sentinels}: train with FillInTheMiddle and extra_ids"
            )
        return vocabulary.sentinel_id(0), vocabulary.sentinel_id(1), vocabulary.sentinel_id(2)

    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        middle = self.written(answer)
        return {"prediction": spliced(self.text(item), [middle]), "filled": [middle]}
