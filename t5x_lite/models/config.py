"""A model as data: frozen dataclasses, checked when built.

A family is a choice of fields, not a class: an encoder alone, a decoder alone, or both. Defaults
are T5 1.1's; `gin_configs/models` has the other families.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from t5x_lite.models.config_heads import ACTIVATIONS, Head, LMHead, SequenceHead
from t5x_lite.models.config_positions import Positions, RelativeBias, Rotary
from t5x_lite.types import InputError

REMAT_POLICIES = ("none", "full", "dots")
KERNELS = ("plain", "flash")
DTYPES = ("float32", "bfloat16")
NORMS = ("rms", "layer")
RESIDUALS = ("pre", "post", "parallel")
PROJECTIONS = ("query", "key", "value", "out", "wi", "wo")


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One stack of Transformer layers: an encoder or a decoder."""

    num_layers: int
    num_heads: int
    head_dim: int  # width of one head; num_heads * head_dim need not equal embed_dim
    mlp_dim: int  # hidden width of the feed-forward block
    # Heads of keys and values, each shared by num_heads / num_kv_heads queries' (grouped-query
    # attention, Ainslie et al. 2023; 1: multi-query, Shazeer 2019). None: as many as num_heads.
    num_kv_heads: int | None = None
    # One input projection wi_0, wi_1, ... for each; their activated outputs are multiplied.
    # ("gelu", "linear") is T5 1.1's gated GELU (Shazeer 2020), ("relu",) is T5 1.0, ("silu",
    # "linear") is Llama's SwiGLU. "gelu" is the tanh form (GPT-2, T5 1.1), "gelu_exact" BERT's.
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    biases: tuple[str, ...] = ()  # projections that add one: of query key value out wi wo
    positions: Positions | None = RelativeBias()
    # None: 1 / sqrt(head_dim). T5 has 1: its query initialisation holds the factor.
    attention_scale: float | None = 1.0
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm (scale alone) or LayerNorm (scale and bias)
    norm_epsilon: float = 1e-6
    # "pre": x + f(norm(x)), and a norm after the last layer. "post": norm(x + f(x)), as BERT and
    # BART. "parallel": x + attention(norm(x)) + mlp(norm(x)) with a norm for each, as GPT-NeoX.
    residual: Literal["pre", "post", "parallel"] = "pre"
    embedding_norm: bool = False  # a norm of the embeddings, before the first layer (BERT, BART)
    num_token_types: int = 0  # kinds of segments that have an embedding (BERT's sentence A and B)
    dropout: float = 0.0  # probability, everywhere T5 drops; one mask for all positions of a row
    # Layers computed in one turn of the loop over layers. Parameters are stacked
    # [layers, ...] whatever this is, so a checkpoint never knows.
    unroll: int = 1
    # What the backward pass recomputes: "none" of the layer, the "full" layer from its input, or
    # all but the outputs of matrix products with weights ("dots").
    remat: str = "none"
    # The kernel of attention in training: "plain" on any machine, or "flash" on TPUs, in which
    # nothing of size length x length reaches memory; it wants rows of a multiple of 128 tokens.
    attention: Literal["plain", "flash"] = "plain"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim", "mlp_dim", "unroll", "kv_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"StackConfig.{name}={getattr(self, name)}: expected at least 1")
        if self.num_heads % self.kv_heads:
            raise InputError(
                f"StackConfig.num_kv_heads={self.num_kv_heads} does not divide "
                f"num_heads={self.num_heads}"
            )
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        object.__setattr__(self, "biases", tuple(self.biases))
        for name, values, known in (
            ("mlp_activations", self.mlp_activations, ACTIVATIONS),
            ("biases", self.biases, PROJECTIONS),
            ("norm", (self.norm,), NORMS),
            ("residual", (self.residual,), RESIDUALS),
            ("remat", (self.remat,), REMAT_POLICIES),
            ("attention", (self.attention,), KERNELS),
        ):
            for value in values:
                if value not in known:
                    raise InputError(f"StackConfig.{name} has '{value}'; known: {known}")
        if not self.mlp_activations:
            raise InputError("StackConfig.mlp_activations is empty: expected at least one")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"StackConfig.dropout={self.dropout}: expected a probability below 1")
        if isinstance(self.positions, Rotary) and self.rotary_dim % 2:
            raise InputError(
                f"Rotary.fraction={self.positions.fraction} of head_dim={self.head_dim} is "
                f"{self.rotary_dim} dimensions: expected an even number, for they turn in pairs"
            )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotary positions turn."""
        assert isinstance(self.positions, Rotary)
        return int(self.head_dim * self.positions.fraction)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Transformer: token embedding, stacks, and a head."""

    vocab_size: int  # rows of the embedding; at least the vocabulary's size
    embed_dim: int
    encoder: StackConfig | None = None
    decoder: StackConfig | None = None
    head: Head = LMHead()  # on the decoder's last states, or on the encoder's without a decoder
    # A second head that the first of the masked slots asks: BERT's next-sentence prediction.
    pair_head: SequenceHead | None = None
    embedding_scale: float = 1.0  # token embeddings are multiplied by it
    # Standard deviation of fresh kernels and embeddings (BERT, GPT-2: 0.02); in pre-norm stacks
    # GPT-2's, those that write to the residual stream are divided by sqrt(2 * num_layers). None:
    # T5's, by fan-in.
    initializer_stddev: float | None = None
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
        if self.pair_head is not None and (
            self.decoder is not None or not isinstance(self.head, LMHead)
        ):
            raise InputError("ModelConfig.pair_head goes with an encoder alone and an LMHead")
        if self.decoder is not None and self.decoder.num_token_types:
            raise InputError("StackConfig.num_token_types: only an encoder has token types")
        if self.decoder is not None and self.decoder.residual == "parallel" and self.encoder:
            raise InputError("StackConfig.residual='parallel' has no place for cross-attention")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise InputError(f"ModelConfig.{name}='{getattr(self, name)}'; known: {DTYPES}")

    def canonical(self) -> ModelConfig:
        """This config with `dtype`, `remat`, `unroll` and `attention` at their defaults.

        Those say how to compute the model, and neither what it is nor what its parameters are.
        """

        def plain(stack: StackConfig | None) -> StackConfig | None:
            if stack is None:
                return None
            return dataclasses.replace(stack, remat="none", unroll=1, attention="plain")

        return dataclasses.replace(
            self, dtype="float32", encoder=plain(self.encoder), decoder=plain(self.decoder)
        )

    @property
    def last_stack(self) -> StackConfig:
        """The stack whose states the head reads."""
        last = self.decoder or self.encoder
        assert last is not None
        return last

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def storage_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.param_dtype)
