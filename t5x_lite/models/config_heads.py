"""What a model's last hidden states become: logits over tokens or labels, or a vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from t5x_lite.types import InputError

ACTIVATIONS = ("linear", "relu", "gelu", "gelu_exact", "silu", "tanh")
POOLINGS = ("first", "last", "mean")


@dataclass(frozen=True, kw_only=True)
class LMHead:
    """Logits over the vocabulary.

    A masked language model's head (Devlin et al. 2019) first maps each state through a projection,
    an activation and a norm: `transform`.
    """

    tied: bool = False  # logits = x E^T; otherwise by a kernel of its own
    scaled: bool = False  # tied logits divided by sqrt(embed_dim), as T5 1.0
    bias: bool = False  # one number a token
    transform: str | None = None  # the activation of the transform before the logits; None: none

    def __post_init__(self) -> None:
        _check_activation("LMHead.transform", self.transform)
        if self.scaled and not self.tied:
            raise InputError("LMHead.scaled=True goes with tied=True: an untied kernel has no need")


@dataclass(frozen=True, kw_only=True)
class SequenceHead:
    """Logits over the labels of a whole sequence, or with one label a regression's value."""

    num_labels: int
    # Whose state stands for the sequence: the first token's ([CLS]), the last one's, or the mean.
    pooling: Literal["first", "last", "mean"] = "first"
    activation: str | None = "tanh"  # of a projection before the logits; None: no projection
    bias: bool = True  # of the logits

    def __post_init__(self) -> None:
        _check_labels("SequenceHead", self.num_labels)
        _check_pooling("SequenceHead", self.pooling)
        _check_activation("SequenceHead.activation", self.activation)


@dataclass(frozen=True, kw_only=True)
class TokenHead:
    """Logits over labels for each token (tagging)."""

    num_labels: int
    bias: bool = True

    def __post_init__(self) -> None:
        _check_labels("TokenHead", self.num_labels)


@dataclass(frozen=True, kw_only=True)
class EmbeddingHead:
    """One vector a sequence, float32 (Reimers & Gurevych 2019, arXiv:1908.10084)."""

    pooling: Literal["first", "last", "mean"] = "mean"
    normalise: bool = True  # to length 1, so that a product is the cosine

    def __post_init__(self) -> None:
        _check_pooling("EmbeddingHead", self.pooling)


Head: TypeAlias = LMHead | SequenceHead | TokenHead | EmbeddingHead
CLASSES: Final = (LMHead, SequenceHead, TokenHead, EmbeddingHead)


def _check_labels(name: str, num_labels: int) -> None:
    if num_labels < 1:
        raise InputError(f"{name}.num_labels={num_labels}: expected at least 1")


def _check_pooling(name: str, pooling: str) -> None:
    if pooling not in POOLINGS:
        raise InputError(f"{name}.pooling='{pooling}'; known: {POOLINGS}")


def _check_activation(name: str, activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"{name}='{activation}'; known: {ACTIVATIONS}, or None")
