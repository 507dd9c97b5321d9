"""T5 1.0, T5 1.1 and ByT5 (Raffel et al. 2020; Xue et al. 2022) as transformers has them."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

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
    is_tied,
    num_labels,
    read_activation,
    refuse,
    write_activation,
)
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import Head, LMHead, SequenceHead
from t5x_lite.models.config_positions import RelativeBias

_DEFAULTS: Final[Settings] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}


def _read(settings: Settings, tensors: Tensors) -> ModelConfig:
    settings = {**_DEFAULTS, **settings}
    refuse(settings, {"is_decoder": False, "initializer_factor": 1.0})
    *gated, activation = settings["feed_forward_proj"].split("-")
    # Theirs is the tanh form in "gated-gelu", and the exact one in "gelu".
    activation = read_activation("gelu_new" if gated and activation == "gelu" else activation)
    encoder = StackConfig(
        num_layers=settings["num_layers"],
        num_heads=settings["num_heads"],
        head_dim=settings["d_kv"],
        mlp_dim=settings["d_ff"],
        mlp_activations=(activation, "linear") if gated else (activation,),
        positions=RelativeBias(
            num_buckets=settings["relative_attention_num_buckets"],
            max_distance=settings["relative_attention_max_distance"],
        ),
        norm_epsilon=settings["layer_norm_epsilon"],
        dropout=settings["dropout_rate"],
    )
    decoder_layers = settings.get("num_decoder_layers") or encoder.num_layers
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        embed_dim=settings["d_model"],
        encoder=encoder,
        decoder=dataclasses.replace(encoder, num_layers=decoder_layers),
        head=_head(settings, tensors),
    )


def _head(settings: Settings, tensors: Tensors) -> Head:
    if settings["architectures"][0] == "T5ForSequenceClassification":
        return SequenceHead(num_labels=num_labels(settings), pooling="last")
    # transformers 5 calls every T5 tied, and keeps apart whether logits are scaled, as T5 1.0's;
    # whether the head has weights of its own is then only to be seen in the file.
    scaled = settings.get("scale_decoder_outputs", settings["tie_word_embeddings"])
    tied = settings["tie_word_embeddings"] and (scaled or "lm_head.weight" not in tensors)
    return LMHead(tied=tied, scaled=tied and scaled)


def _write(config: ModelConfig) -> dict[str, Any]:
    encoder = expect("encoder", config.encoder, StackConfig)
    decoder = expect("decoder", config.decoder, StackConfig)
    positions = expect("positions", encoder.positions, RelativeBias)
    activation, *gated = encoder.mlp_activations
    if gated:
        name = "gated-" + ("gelu" if activation == "gelu" else write_activation(activation))
    else:
        name = write_activation(activation)
    tied = is_tied(config, True)
    unscaled = isinstance(config.head, LMHead) and tied and not config.head.scaled
    return {
        **class_of(config, "T5", "ForConditionalGeneration"),
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "d_kv": encoder.head_dim,
        "d_ff": encoder.mlp_dim,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers,
        "num_heads": encoder.num_heads,
        "relative_attention_num_buckets": positions.num_buckets,
        "relative_attention_max_distance": positions.max_distance,
        "dropout_rate": encoder.dropout,
        "layer_norm_epsilon": encoder.norm_epsilon,
        "feed_forward_proj": name,
        "tie_word_embeddings": tied,
        **({"scale_decoder_outputs": False} if unscaled else {}),
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _stack(stack: str, gated: bool) -> tuple[Rule, ...]:
    block = f"{{base}}{stack}.block.{{layer}}.layer"
    mlp = 2 if stack == "decoder" else 1
    dense = f"{block}.{mlp}.DenseReluDense"
    rules = (
        Rule(
            f"{stack}/relative_bias/embedding",
            f"{{base}}{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        *_attention(f"{stack}/layers/self_attention", f"{block}.0.SelfAttention"),
        *norm(f"{stack}/layers/self_attention_norm", f"{block}.0.layer_norm"),
        *linear(f"{stack}/layers/mlp/wi_0", f"{dense}.wi{'_0' * gated}", "embed", "mlp"),
        *linear(f"{stack}/layers/mlp/wi_1", f"{dense}.wi_1", "embed", "mlp"),
        *linear(f"{stack}/layers/mlp/wo", f"{dense}.wo", "mlp", "embed"),
        *norm(f"{stack}/layers/mlp_norm", f"{block}.{mlp}.layer_norm"),
        *norm(f"{stack}/final_norm", f"{{base}}{stack}.final_layer_norm"),
    )
    if stack == "encoder":
        return rules
    return (
        *rules,
        *_attention(f"{stack}/layers/cross_attention", f"{block}.1.EncDecAttention"),
        *norm(f"{stack}/layers/cross_attention_norm", f"{block}.1.layer_norm"),
    )


def _attention(path: str, name: str) -> tuple[Rule, ...]:
    return attention(path, *(f"{name}.{part}" for part in "qkvo"))


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    assert config.encoder is not None
    gated = len(config.encoder.mlp_activations) > 1
    return (
        Rule(
            "token_embedding/embedding",
            "{base}shared.weight",
            aliases=(
                "{base}encoder.embed_tokens.weight",
                "{base}decoder.embed_tokens.weight",
                "lm_head.weight",
            ),
        ),
        *_stack("encoder", gated),
        *_stack("decoder", gated),
        Rule("lm_head/kernel", "lm_head.weight", "embed vocab -> vocab embed"),
        *linear("sequence_head/dense", "classification_head.dense", "in", "out"),
        *linear("sequence_head/out", "classification_head.out_proj", "embed", "labels"),
    )


T5: Final = Architecture(
    model_type="t5",
    classes={"T5ForConditionalGeneration": "", "T5ForSequenceClassification": "transformer."},
    read=_read,
    write=_write,
    rules=_rules,
    # Published T5 1.0 has one more table, which no version of the model has ever used.
    left_out=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)
