"""A model that is ready to be asked: what decoding, scoring and serving take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.types import Params

# What a decoder alone sees of a text before it writes:
#   continue   start 5 6          it goes on from the text
#   wrapped    start 5 6 eos      it answers the text, as TextToText with as_decoder
#   prefix     the same, seen in both directions: as_prefix_lm
Prompt: TypeAlias = Literal["continue", "wrapped", "prefix"]
# What stands for a gap, and what is written for it:
#   mask       5 mask 8      the text anew (BART)
#   sentinels  5 99 8        99 6 7: each gap's contents behind its sentinel (T5, UL2)
#   middle     97 5 98 8 99  6 7: prefix, suffix, middle (FillInTheMiddle)
Gaps: TypeAlias = Literal["mask", "sentinels", "middle"]


@dataclass(frozen=True)
class Asking:
    """How a model was trained to be asked; None: nobody says, so that its kind has to tell."""

    prompt: Prompt | None = None
    gaps: Gaps | None = None
    middle: tuple[int, int, int] | None = None  # ids of prefix, suffix and middle; None: sentinels

    def __post_init__(self) -> None:
        if self.middle is not None:
            object.__setattr__(self, "middle", tuple(self.middle))


@dataclass(frozen=True)
class Loaded:
    """A model, its parameters on their devices, and what its texts and labels are."""

    model: Transformer
    # PEFT leaves included: what `model.apply` takes.
    params: Params = dataclasses.field(repr=False)
    vocabulary: Vocabulary
    partitioner: Partitioner
    labels: tuple[str, ...] = ()  # names of the head's labels, in order; empty: none are known
    end_ids: tuple[int, ...] = ()  # tokens that end a text; empty: the vocabulary's eos alone
    asking: Asking = dataclasses.field(default_factory=Asking)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text, at least one."""
        return self.end_ids or (self.vocabulary.eos_id,)

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of what was written, up to the first token that ends it."""
        ids = np.asarray(tokens)
        ended = np.flatnonzero(np.isin(ids, self.ends))
        return self.vocabulary.decode(ids[: ended[0]] if ended.size else ids)
