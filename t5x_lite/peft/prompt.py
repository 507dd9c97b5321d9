"""Prompt tuning: trained embeddings before every text (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import flax.struct
import jax
import jax.numpy as jnp

from t5x_lite import trees
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.models import weights
from t5x_lite.peft.transform import Transform, flatten_names
from t5x_lite.types import Array, InputError, Params

PATH: Final = "token_embedding/embedding"
_LEAF: Final = "prompt"
Start = Literal["vocabulary", "random"]


@flax.struct.dataclass
class PromptedEmbedding(weights.StructuredWeight):
    """An embedding with more rows behind its vocabulary's, which only a lookup sees.

    Tied logits are the vocabulary's alone: nobody writes a prompt.
    """

    w: Array | weights.StructuredWeight  # [vocab, embed], frozen
    prompt: Array  # [prompt, embed]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Array:
        raise NotImplementedError("a vocabulary has no rows for a prompt")

    def project(self, x: Array, in_axes: int) -> Array:
        raise NotImplementedError("an embedding is looked up")

    def lookup(self, ids: Array, dtype: Any) -> Array:
        size = self.w.shape[0]
        own = ids >= size
        rows = weights.lookup(jnp.where(own, ids - size, 0), self.prompt, dtype)
        return jnp.where(
            own[..., None], rows, weights.lookup(jnp.where(own, 0, ids), self.w, dtype)
        )

    def attend(self, x: Array) -> Array:
        return weights.attend(x, self.w)


@dataclass(frozen=True)
class PromptTuning(Transform):
    """Trains `length` embeddings that stand in front of every text, as tokens of their own would.

    Their ids follow the vocabulary's, `vocab_size` to `vocab_size + length - 1`. Rows hold them in
    front of each example: in the encoder's stream, or a decoder's where there is no encoder. A row
    keeps its length, so that a text has `length` tokens less.
    """

    length: int = 20
    # Where they start: at rows of the vocabulary, drawn with the run's seed (Lester et al. 3.2), or
    # "random", normal with `stddev`. Or at `ids`, repeated or cut to the length: see `ids_of_text`.
    start: Start = "vocabulary"
    stddev: float = 0.5  # of "random". PEFT's default is this start, with 1.0
    ids: Sequence[int] = ()

    leaves: ClassVar[tuple[str, ...]] = (_LEAF,)
    outermost: ClassVar[bool] = True  # other nodes know no ids behind the vocabulary

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(token) for token in self.ids))
        if self.length < 1 or self.stddev < 0:
            raise InputError(
                f"PromptTuning(length={self.length}, stddev={self.stddev}): expected a length from "
                "1 on and a stddev from 0 on"
            )
        if self.start not in ("vocabulary", "random"):
            raise InputError(
                f"PromptTuning.start='{self.start}': expected 'vocabulary' or 'random'; a text "
                "goes into PromptTuning.ids, as ids_of_text gives it"
            )

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        table = base["token_embedding"]["embedding"]
        vocab_size, embed_dim = table.shape
        if self.ids and not 0 <= min(self.ids) <= max(self.ids) < vocab_size:
            raise InputError(
                f"PromptTuning.ids has {min(self.ids)} to {max(self.ids)}, and the model's "
                f"vocabulary ends at {vocab_size - 1}: encode the text with the model's own"
            )
        if self.start == "random" and not self.ids:
            shape = (self.length, embed_dim)
            rows = self.stddev * jax.random.normal(rng, shape, jnp.float32)
        else:
            ids = jax.random.randint(rng, (self.length,), 0, vocab_size)
            if self.ids:
                ids = jnp.resize(jnp.asarray(self.ids, jnp.int32), (self.length,))
            rows = weights.lookup(ids, table, jnp.float32)
        return trees.unflatten({f"{PATH}/{_LEAF}": rows}), base

    def split_names(self, names: Params) -> tuple[Params, Params]:
        axes = flatten_names(names)[PATH]
        return trees.unflatten({f"{PATH}/{_LEAF}": ("places", *axes[1:])}), names

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        rows = trainable["token_embedding"]["embedding"][_LEAF]
        embedding = frozen["token_embedding"]["embedding"]
        return {**frozen, "token_embedding": {"embedding": PromptedEmbedding(embedding, rows)}}

    def merge(self, trainable: Params, frozen: Params) -> Params:
        raise InputError(
            "PromptTuning can't be merged: the base has no place in front of its texts. Keep the "
            "run's folder and name it as the adapter (infer.adapter), or share it by save_peft"
        )


def ids_of_text(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """A text's tokens, for `PromptTuning.ids`: where to start from words."""
    ids = tuple(int(token) for token in vocabulary.encode(text))
    if not ids:
        raise InputError(f"the text {text!r} has no token: give PromptTuning.ids one that has")
    return ids
