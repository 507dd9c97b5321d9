"""Llama (Touvron et al. 2023) and its rotary positions as transformers has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    decoder_head,
    expect,
    is_tied,
    read_activation,
    refuse,
    write_activation,
)
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rotary,
    RotaryScaling,
    YarnScaling,
)
from t5x_lite.types import InputError

_DEFAULTS: Final[Settings] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_ATTENTION_BIASES: Final = ("query", "key", "value", "out")
_MLP_BIASES: Final = ("wi", "wo")


def _read(settings: Settings, tensors: Tensors) -> ModelConfig:
    settings = {**_DEFAULTS, **settings}
    heads = settings["num_attention_heads"]
    groups = settings["num_key_value_heads"] or heads
    biases = (
        *(_ATTENTION_BIASES if settings["attention_bias"] else ()),
        *(_MLP_BIASES if settings["mlp_bias"] else ()),
    )
    decoder = StackConfig(
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        head_dim=settings["head_dim"] or settings["hidden_size"] // heads,
        mlp_dim=settings["intermediate_size"],
        num_kv_heads=None if groups == heads else groups,
        mlp_activations=(read_activation(settings["hidden_act"]), "linear"),
        biases=biases,
        positions=read_rotary(settings),
        attention_scale=None,
        norm_epsilon=settings["rms_norm_eps"],
        dropout=settings["attention_dropout"],
    )
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        embed_dim=settings["hidden_size"],
        decoder=decoder,
        head=decoder_head(settings),
        initializer_stddev=settings["initializer_range"],
    )


def read_rotary(settings: Settings, fraction: float = 1.0) -> Rotary:
    """Rotary positions of settings as transformers 4 writes them, and as 5 does.

    `fraction` of a head's dimensions turn, where no setting says how many.
    """
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    base = rope.get("rope_theta") or settings.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    length = settings["max_position_embeddings"]
    scaling: RotaryScaling | None
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(factor=rope["factor"])
        case "dynamic":
            scaling = DynamicScaling(factor=rope["factor"], original_length=length)
        case "llama3":
            scaling = Llama3Scaling(
                factor=rope["factor"],
                low_frequency_factor=rope["low_freq_factor"],
                high_frequency_factor=rope["high_freq_factor"],
                original_length=rope["original_max_position_embeddings"],
            )
        case "yarn":
            scaling = _read_yarn(rope, length)
        case _:
            raise InputError(
                f"config.json has rotary positions of type '{kind}'; known: default, linear, "
                "dynamic, llama3, yarn"
            )
    return Rotary(base=base, fraction=rope.get("partial_rotary_factor", fraction), scaling=scaling)


def _read_yarn(rope: Settings, length: int) -> YarnScaling:
    refuse(rope, {"truncate": True})
    original = rope.get("original_max_position_embeddings") or length
    factor = rope.get("factor") or length / original
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        above, below = (
            0.1 * rope[name] * math.log(max(factor, 1.0)) + 1.0
            for name in ("mscale", "mscale_all_dim")
        )
        attention = above / below
    return YarnScaling(
        factor=factor,
        original_length=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=attention,
    )


def write_rotary(positions: Rotary) -> dict[str, Any]:
    """Settings of rotary positions in the form that transformers 4 and 5 both read."""
    scaling: Mapping[str, Any] | None = None
    length = 2048
    match positions.scaling:
        case LinearScaling(factor=factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor=factor, original_length=length):
            scaling = {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling() as llama3:
            length = int(llama3.factor * llama3.original_length)
            scaling = {
                "rope_type": "llama3",
                "factor": llama3.factor,
                "low_freq_factor": llama3.low_frequency_factor,
                "high_freq_factor": llama3.high_frequency_factor,
                "original_max_position_embeddings": llama3.original_length,
            }
        case YarnScaling() as yarn:
            length = int(yarn.factor * yarn.original_length)
            given = {"attention_factor": yarn.attention_factor} if yarn.attention_factor else {}
            scaling = {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                **given,
            }
    settings: dict[str, Any] = {"rope_theta": positions.base, "max_position_embeddings": length}
    return settings | ({} if scaling is None else {"rope_scaling": scaling})


def _write(config: ModelConfig) -> dict[str, Any]:
    decoder = expect("decoder", config.decoder, StackConfig)
    positions = expect("positions", decoder.positions, Rotary)
    return {
        **class_of(config, "Llama", "ForCausalLM"),
        **write_rotary(positions),
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_act": write_activation(decoder.mlp_activations[0]),
        "initializer_range": config.initializer_stddev or 0.02,
        "rms_norm_eps": decoder.norm_epsilon,
        "attention_dropout": decoder.dropout,
        "attention_bias": "query" in decoder.biases,
        "mlp_bias": "wi" in decoder.biases,
        "tie_word_embeddings": is_tied(config, False),
    }


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    layer = "{base}layers.{layer}"
    return (
        Rule("token_embedding/embedding", "{base}embed_tokens.weight", aliases=("lm_head.weight",)),
        *norm("decoder/layers/self_attention_norm", f"{layer}.input_layernorm"),
        *attention(
            "decoder/layers/self_attention",
            *(f"{layer}.self_attn.{part}_proj" for part in "qkvo"),
        ),
        *norm("decoder/layers/mlp_norm", f"{layer}.post_attention_layernorm"),
        *linear("decoder/layers/mlp/wi_0", f"{layer}.mlp.gate_proj", "embed", "mlp"),
        *linear("decoder/layers/mlp/wi_1", f"{layer}.mlp.up_proj", "embed", "mlp"),
        *linear("decoder/layers/mlp/wo", f"{layer}.mlp.down_proj", "mlp", "embed"),
        *norm("decoder/final_norm", "{base}norm"),
        Rule("lm_head/kernel", "lm_head.weight", "embed vocab -> vocab embed"),
        *linear("sequence_head/out", "score", "embed", "labels"),
    )


LLAMA: Final = Architecture(
    model_type="llama",
    classes={"LlamaForCausalLM": "model.", "LlamaForSequenceClassification": "model."},
    read=_read,
    write=_write,
    rules=_rules,
    left_out=(r".*\.rotary_emb\.inv_freq",),
    carried=r".*_token_id|max_position_embeddings",
)
