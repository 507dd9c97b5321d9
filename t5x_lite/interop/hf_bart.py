"""BART (Lewis et al. 2020) as transformers has it."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from t5x_lite.interop.name_maps import (
    Architecture,
    Rule,
    Settings,
    Tensors,
    attention,
    linear,
    norm,
)
from t5x_lite.interop.settings import (
    class_of,
    expect,
    num_labels,
    read_activation,
    refuse,
    write_activation,
)
from t5x_lite.models.config import PROJECTIONS, ModelConfig, StackConfig
from t5x_lite.models.config_heads import Head, LMHead, SequenceHead
from t5x_lite.models.config_positions import Learned

_DEFAULTS: Final[Settings] = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "d_model": 1024,
    "dropout": 0.1,
    "init_std": 0.02,
    "scale_embedding": False,
}
_EXPECTED: Final[Settings] = {  # of early versions, which shared the class with mBART
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
    "static_position_embeddings": False,
    "extra_pos_embeddings": 2,
    "tie_word_embeddings": True,
}
_OFFSET: Final = 2  # whatever the padding token
_EPSILON: Final = 1e-5  # torch's default; BART has no setting for it


def _read(settings: Settings, tensors: Tensors) -> ModelConfig:
    settings = {**_DEFAULTS, **settings}
    refuse(settings, _EXPECTED)
    width = settings["d_model"]

    def stack(name: str) -> StackConfig:
        heads = settings[f"{name}_attention_heads"]
        return StackConfig(
            num_layers=settings[f"{name}_layers"],
            num_heads=heads,
            head_dim=width // heads,
            mlp_dim=settings[f"{name}_ffn_dim"],
            mlp_activations=(read_activation(settings["activation_function"]),),
            biases=PROJECTIONS,
            positions=Learned(max_length=settings["max_position_embeddings"], offset=_OFFSET),
            attention_scale=None,
            norm="layer",
            norm_epsilon=_EPSILON,
            residual="post",
            embedding_norm=True,
            dropout=settings["dropout"],
        )

    return ModelConfig(
        vocab_size=settings["vocab_size"],
        embed_dim=width,
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        head=_head(settings, tensors),
        embedding_scale=math.sqrt(width) if settings["scale_embedding"] else 1.0,
        initializer_stddev=settings["init_std"],
    )


def _head(settings: Settings, tensors: Tensors) -> Head:
    if settings["architectures"][0] == "BartForSequenceClassification":
        return SequenceHead(num_labels=num_labels(settings, default=3), pooling="last")
    # Every file has a bias of the logits; in all published ones it is zeros, and no parameter.
    bias = tensors.get("final_logits_bias")
    return LMHead(tied=True, bias=bias is not None and bool(np.any(bias)))


def _write(config: ModelConfig) -> dict[str, Any]:
    encoder = expect("encoder", config.encoder, StackConfig)
    decoder = expect("decoder", config.decoder, StackConfig)
    positions = expect("positions", encoder.positions, Learned)
    stacks = {
        f"{name}_{setting}": value
        for name, stack in (("encoder", encoder), ("decoder", decoder))
        for setting, value in (
            ("layers", stack.num_layers),
            ("attention_heads", stack.num_heads),
            ("ffn_dim", stack.mlp_dim),
        )
    }
    return {
        **class_of(config, "Bart", "ForConditionalGeneration"),
        **stacks,
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "max_position_embeddings": positions.max_length,
        "activation_function": write_activation(encoder.mlp_activations[0]),
        "dropout": encoder.dropout,
        "init_std": config.initializer_stddev or 0.02,
        "scale_embedding": config.embedding_scale != 1.0,
        "is_encoder_decoder": True,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }


def _stack(stack: str) -> tuple[Rule, ...]:
    layer = f"{{base}}{stack}.layers.{{layer}}"
    rules = (
        Rule(f"{stack}/position_embedding/embedding", f"{{base}}{stack}.embed_positions.weight"),
        *norm(f"{stack}/embedding_norm", f"{{base}}{stack}.layernorm_embedding"),
        *_attention(f"{stack}/layers/self_attention", f"{layer}.self_attn"),
        *linear(f"{stack}/layers/mlp/wi_0", f"{layer}.fc1", "embed", "mlp"),
        *linear(f"{stack}/layers/mlp/wo", f"{layer}.fc2", "mlp", "embed"),
        *norm(f"{stack}/layers/mlp_norm", f"{layer}.final_layer_norm"),
    )
    if stack == "encoder":
        return rules
    return (
        *rules,
        *_attention(f"{stack}/layers/cross_attention", f"{layer}.encoder_attn"),
    )


def _attention(path: str, name: str) -> tuple[Rule, ...]:
    return (
        *attention(path, *(f"{name}.{part}_proj" for part in ("q", "k", "v", "out"))),
        *norm(f"{path}_norm", f"{name}_layer_norm"),
    )


_RULES: Final = (
    Rule(
        "token_embedding/embedding",
        "{base}shared.weight",
        aliases=(
            "{base}encoder.embed_tokens.weight",
            "{base}decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
    ),
    *_stack("encoder"),
    *_stack("decoder"),
    Rule("lm_head/bias", "final_logits_bias", "vocab -> 0/1 vocab"),
    *linear("sequence_head/dense", "classification_head.dense", "in", "out"),
    *linear("sequence_head/out", "classification_head.out_proj", "embed", "labels"),
)


def _constants(config: ModelConfig) -> dict[str, np.ndarray]:
    if isinstance(config.head, LMHead) and not config.head.bias:
        return {"final_logits_bias": np.zeros((1, config.vocab_size), np.float32)}
    return {}


BART: Final = Architecture(
    model_type="bart",
    classes={
        "BartForConditionalGeneration": "model.",
        "BartForSequenceClassification": "model.",
        "BartModel": "",
    },
    read=_read,
    write=_write,
    rules=lambda config: _RULES,
    left_out=(r"final_logits_bias", r"(.*\.)?(encoder|decoder)\.version"),
    constants=_constants,
)
