"""A model as data: frozen dataclasses, checked when built.

A family is a choice of fields, not a class: an encoder alone, a decoder alone, or both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from t5x_lite.types import InputError

ACTIVATIONS = ("linear", "relu", "gelu", "silu")
REMAT_POLICIES = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """T5's relative position bias (Raffel et al. 2020, section 2.1): one bias a bucket and head.

    Half of the buckets hold exact distances, the other half grow logarithmically.
    """

    num_buckets: int = 32
    max_distance: int = 128  # tokens; farther ones share the last bucket

    def __post_init__(self) -> None:
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise InputError(
                f"RelativeBias.num_buckets={self.num_buckets}: expected an even number from 4 on"
            )
        if self.max_distance <= self.num_buckets // 2:
            raise InputError(
                f"RelativeBias.max_distance={self.max_distance} must be greater than half of "
                f"num_buckets={self.num_buckets}"
            )


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One stack of Transformer layers: an encoder or a decoder."""

    num_layers: int
    num_heads: int
    head_dim: int  # width of one head; num_heads * head_dim need not equal embed_dim
    mlp_dim: int  # hidden width of the feed-forward block
    # One input projection wi_0, wi_1, ... for each; their activated outputs are multiplied.
    # ("gelu", "linear") is T5 1.1's gated GELU (Shazeer 2020), ("relu",) is T5 1.0.
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    positions: RelativeBias = RelativeBias()
    dropout: float = 0.0  # probability, everywhere T5 drops; one mask for all positions of a row
    norm_epsilon: float = 1e-6
    # Layers computed in one turn of the loop over layers. Parameters are stacked
    # [layers, ...] whatever this is, so a checkpoint never knows.
    unroll: int = 1
    # What the backward pass recomputes: "none" of the layer, the "full" layer from its input, or
    # all but the outputs of matrix products with weights ("dots").
    remat: str = "none"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim", "mlp_dim", "unroll"):
            if getattr(self, name) < 1:
                raise InputError(f"StackConfig.{name}={getattr(self, name)}: expected at least 1")
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for activation in self.mlp_activations:
            if activation not in ACTIVATIONS:
                raise InputError(
                    f"StackConfig.mlp_activations has '{activation}'; known: {ACTIVATIONS}"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"StackConfig.dropout={self.dropout}: expected a probability below 1")
        if self.remat not in REMAT_POLICIES:
            raise InputError(f"StackConfig.remat='{self.remat}'; known: {REMAT_POLICIES}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Transformer: token embedding, stacks, and the head that predicts tokens."""

    vocab_size: int  # rows of the embedding; at least the vocabulary's size
    embed_dim: int
    encoder: StackConfig | None = None
    decoder: StackConfig | None = None
    # "tied": logits = x E^T / sqrt(embed_dim) (T5 1.0); "untied": a kernel of its own (T5 1.1).
    head: Literal["tied", "untied"] = "untied"
    dtype: str = "float32"  # of activations and matrix products; norms, softmax, loss: float32
    param_dtype: str = "float32"  # of stored parameters

    def __post_init__(self) -> None:
        if self.encoder is None and self.decoder is None:
            raise InputError("ModelConfig needs an encoder, a decoder, or both")
        if self.vocab_size < 1 or self.embed_dim < 1:
            raise InputError(
                f"ModelConfig.vocab_size={self.vocab_size}, embed_dim={self.embed_dim}: "
                "expected at least 1"
            )
        if self.head not in ("tied", "untied"):
            raise InputError(f"ModelConfig.head='{self.head}': expected 'tied' or 'untied'")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise InputError(f"ModelConfig.{name}='{getattr(self, name)}'; known: {DTYPES}")

    def canonical(self) -> ModelConfig:
        """This config with `dtype`, `remat` and `unroll` at their defaults.

        Those say how to compute the model, and neither what it is nor what its parameters are.
        """

        def plain(stack: StackConfig | None) -> StackConfig | None:
            return None if stack is None else dataclasses.replace(stack, remat="none", unroll=1)

        return dataclasses.replace(
            self, dtype="float32", encoder=plain(self.encoder), decoder=plain(self.decoder)
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def storage_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.param_dtype)
