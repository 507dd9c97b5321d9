"""A model that is ready to be asked: what decoding, scoring and serving take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.asking import Asking
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.types import Params


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
