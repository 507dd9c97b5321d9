"""A model that is ready to be asked: what decoding, scoring and serving take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.asking import Asking
from t5x_lite.models import prompted
from t5x_lite.models.config_positions import Learned
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.types import Params


@dataclass(frozen=True)
class Loaded:
    """A model, its parameters on their devices, and what its texts and labels are.

    A model with a soft prompt among its parameters puts it in front of every text by itself.
    """

    model: Transformer
    # PEFT leaves included: what `model.apply` takes.
    params: Params = dataclasses.field(repr=False)
    vocabulary: Vocabulary
    partitioner: Partitioner
    labels: tuple[str, ...] = ()  # names of the head's labels, in order; empty: none are known
    end_ids: tuple[int, ...] = ()  # tokens that end a text; empty: the vocabulary's eos alone
    asking: Asking = dataclasses.field(default_factory=Asking)

    def __post_init__(self) -> None:
        length = prompted.prompt_length(self.params)
        if length and not isinstance(self.model, prompted.PromptedTransformer):
            model = prompted.PromptedTransformer(self.model.config, prompt=length)
            object.__setattr__(self, "model", model)

    def room(self, stack: str) -> int | None:
        """The longest text that a stack, "encoder" or "decoder", takes; None: it knows no end.

        Learned positions, less those of a prompt or prefix ahead of the text.
        """
        positions = getattr(self.model.config, stack).positions
        if not isinstance(positions, Learned):
            return None
        return positions.max_length - prompted.ahead(self.params, stack)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text, at least one."""
        return self.end_ids or (self.vocabulary.eos_id,)

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of what was written, up to the first token that ends it."""
        ids = np.asarray(tokens)
        ended = np.flatnonzero(np.isin(ids, self.ends))
        return self.vocabulary.decode(ids[: ended[0]] if ended.size else ids)
