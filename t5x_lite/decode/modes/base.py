"""What all modes share: how they are asked, and rows of tokens out of texts.

Shapes: b batch, l length.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from t5x_lite import types
from t5x_lite.data.layouts import shift_right
from t5x_lite.data.objectives.base import wrap
from t5x_lite.decode.asking import Prompt
from t5x_lite.decode.loaded import Loaded
from t5x_lite.decode.prompts import pad_right
from t5x_lite.decode.sampling import BeamSearch, Strategy
from t5x_lite.models.cache import DTYPES, CacheDtype
from t5x_lite.models.config_heads import POOLINGS
from t5x_lite.types import Array, Batch, InputError, Params

Item: TypeAlias = Mapping[str, Any]  # `inputs`, a text, and what else its record held


@dataclass(frozen=True)
class Options:
    """What may be said beside the texts. What is None or empty, nobody asked for."""

    max_input_tokens: int = 128  # of a row: longer texts are refused
    max_tokens: int = 64  # the most that are generated
    candidates: int = 5  # for each mask
    prefix: str = ""  # put before every text
    prompt: Prompt | None = None  # None: as the model was trained to be asked
    mode_token: Literal["R", "S", "X"] | None = None  # UL2's, before the text
    pooling: Literal["first", "last", "mean"] | None = None  # None: the head's, or the mean
    strategy: Strategy | None = None  # of what is generated; None: greedy
    seed: int = 0  # of what is drawn
    cache_dtype: CacheDtype | None = None  # of keys and values; None: as computed
    window: int | None = None  # tokens back that each one sees, where text is written; None: all
    stop: tuple[str, ...] = ()  # texts that end what is generated, themselves left out

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_input_tokens", "max_tokens", "candidates"):
            if getattr(self, name) < 1:
                raise InputError(f"infer.{name}={getattr(self, name)}: expected at least 1")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise InputError(
                f"infer.pooling='{self.pooling}': expected one of {', '.join(POOLINGS)}"
            )
        if self.cache_dtype is not None and self.cache_dtype not in DTYPES:
            raise InputError(
                f"infer.cache_dtype='{self.cache_dtype}': expected one of {', '.join(DTYPES)}"
            )
        if self.window is not None and self.window < 1:
            raise InputError(f"infer.window={self.window}: expected at least 1, or None")
        if self.window is not None and isinstance(self.strategy, BeamSearch):
            raise InputError(
                f"infer.window={self.window} is for Greedy and Sampling, not for beams"
            )
        if not all(self.stop):
            raise InputError("infer.stop has an empty text, which would end everything")


@dataclass(frozen=True)
class Row:
    """A text as the model takes it."""

    ids: np.ndarray  # int32 [length]: what is read
    targets: np.ndarray | None = None  # int32: what is scored behind it
    notes: Any = None  # what its record needs

    @property
    def length(self) -> int:
        """Of the longer one."""
        return max(len(self.ids), 0 if self.targets is None else len(self.targets))


@dataclass(frozen=True)
class Mode(abc.ABC):
    """A model asked one kind of question: texts to rows, rows to answers, answers to records."""

    loaded: Loaded
    options: Options

    name: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ("prefix",)  # of the options that nobody has to give

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Options):
            given = getattr(self.options, field.name)
            optional = field.default in (None, "", ())
            if optional and given != field.default and field.name not in self.takes:
                raise InputError(f"infer.{field.name}={given!r} is not for mode '{self.name}'")

    @abc.abstractmethod
    def encode(self, item: Item) -> Row:
        """The item's row. Raises InputError for a text that the mode can't take."""

    @abc.abstractmethod
    def rows(self, rows: Sequence[Row | None], length: int) -> dict[str, np.ndarray]:
        """The batch of rows, none longer than `length`; None only fills the batch up."""

    @abc.abstractmethod
    def compute(self, params: Params, batch: Batch, numbers: Array) -> Any:
        """What the model says to a batch; traceable. Arrays with the batch's rows first.

        `numbers` int32 `[b, 1]` are the inputs', for what is drawn.
        """

    @abc.abstractmethod
    def record(self, item: Item, row: Row, answer: Any) -> dict[str, Any]:
        """What is written for an item, from its row and its part of `compute`'s answer."""

    def text(self, item: Item) -> str:
        """The item's inputs behind the prefix."""
        return self.options.prefix + item["inputs"]

    def check(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """`ids`, if they fit a row."""
        if len(ids) > self.options.max_input_tokens:
            raise InputError(
                f"{len(ids)} tokens with the specials are more than infer.max_input_tokens="
                f"{self.options.max_input_tokens}: raise that if the model can take more, or "
                "shorten the input"
            )
        return np.asarray(ids, np.int32)


class Reading(Mode):
    """A mode in which the model only reads: its states answer, and nothing is written."""

    def encode(self, item: Item) -> Row:
        return Row(self.check(self.read(self.loaded.vocabulary.encode(self.text(item)))))

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """A text's tokens with what belongs around them.

        An encoder's are wrapped. A decoder alone has its start before them; where that is eos too
        (GPT-2's), tokenizers put nothing there.
        """
        vocabulary = self.loaded.vocabulary
        if self.loaded.model.config.encoder is not None:
            return wrap(tokens, vocabulary)
        if vocabulary.start_id == vocabulary.eos_id and len(tokens):
            return tokens
        return np.concatenate([np.array([vocabulary.start_id], np.int32), tokens])

    def rows(self, rows: Sequence[Row | None], length: int) -> dict[str, np.ndarray]:
        """Rows for every stack that the model has; its decoder reads them one place later."""
        config, start = self.loaded.model.config, self.loaded.vocabulary.start_id
        ids = [np.zeros(0, np.int32) if row is None else row.ids for row in rows]
        batch: dict[str, np.ndarray] = {}
        if config.encoder is not None:
            tokens, segments = pad_right(ids, length)
            batch |= {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}
            ids = [shift_right(one, start) for one in ids]
        if config.decoder is not None:
            tokens, segments = pad_right(ids, length)
            batch |= {types.DECODER_INPUT_TOKENS: tokens, types.DECODER_SEGMENT_IDS: segments}
        return batch
