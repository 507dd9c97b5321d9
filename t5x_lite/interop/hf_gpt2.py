"""GPT-2 (Radford et al. 2019) as transformers has it."""

from __future__ import annotations

from typing import Any, Final

from t5x_lite.interop.name_maps import (
    Architecture,
    Rule,
    Settings,
    Tensors,
    fused,
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
from t5x_lite.models.config import PROJECTIONS, ModelConfig, StackConfig
from t5x_lite.models.config_positions import (
    Learned,
)

_DEFAULTS: Final[Settings] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}


def _read(settings: Settings, tensors: Tensors) -> ModelConfig:
    settings = {**_DEFAULTS, **settings}
    refuse(settings, {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False})
    width, heads = settings["n_embd"], settings["n_head"]
    decoder = StackConfig(
        num_layers=settings["n_layer"],
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=settings["n_inner"] or 4 * width,
        mlp_activations=(read_activation(settings["activation_function"]),),
        biases=PROJECTIONS,
        positions=Learned(max_length=settings["n_positions"]),
        attention_scale=None if settings["scale_attn_weights"] else 1.0,
        norm="layer",
        norm_epsilon=settings["layer_norm_epsilon"],
        dropout=settings["resid_pdrop"],
    )
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        embed_dim=width,
        decoder=decoder,
        head=decoder_head(settings),
        initializer_stddev=settings["initializer_range"],
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    decoder = expect("decoder", config.decoder, StackConfig)
    positions = expect("positions", decoder.positions, Learned)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), decoder.dropout)
    last = config.vocab_size - 1
    return {
        **class_of(config, "GPT2", "LMHeadModel"),
        **dropouts,
        "vocab_size": config.vocab_size,
        "n_positions": positions.max_length,
        "n_embd": config.embed_dim,
        "n_layer": decoder.num_layers,
        "n_head": decoder.num_heads,
        "n_inner": decoder.mlp_dim,
        "activation_function": write_activation(decoder.mlp_activations[0]),
        "layer_norm_epsilon": decoder.norm_epsilon,
        "initializer_range": config.initializer_stddev or 0.02,
        "scale_attn_weights": decoder.attention_scale is None,
        "tie_word_embeddings": is_tied(config, True),
        **{f"{name}_token_id": last for name in ("bos", "eos", "pad")},  # <|endoftext|>
    }


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    layer = "{base}h.{layer}"
    out = "decoder/layers/self_attention/out"
    return (
        Rule("token_embedding/embedding", "{base}wte.weight", aliases=("lm_head.weight",)),
        Rule("decoder/position_embedding/embedding", "{base}wpe.weight"),
        *norm("decoder/layers/self_attention_norm", f"{layer}.ln_1"),
        # Their Conv1D has inputs first, and queries, keys and values behind one another.
        *fused(
            "decoder/layers/self_attention",
            f"{layer}.attn.c_attn",
            "embed heads kv -> embed ({part} heads kv)",
        ),
        Rule(f"{out}/kernel", f"{layer}.attn.c_proj.weight", "heads kv embed -> (heads kv) embed"),
        Rule(f"{out}/bias", f"{layer}.attn.c_proj.bias"),
        *norm("decoder/layers/mlp_norm", f"{layer}.ln_2"),
        Rule("decoder/layers/mlp/wi_0/kernel", f"{layer}.mlp.c_fc.weight"),
        Rule("decoder/layers/mlp/wi_0/bias", f"{layer}.mlp.c_fc.bias"),
        Rule("decoder/layers/mlp/wo/kernel", f"{layer}.mlp.c_proj.weight"),
        Rule("decoder/layers/mlp/wo/bias", f"{layer}.mlp.c_proj.bias"),
        *norm("decoder/final_norm", "{base}ln_f"),
        Rule("lm_head/kernel", "lm_head.weight", "embed vocab -> vocab embed"),
        *linear("sequence_head/out", "score", "embed", "labels"),
    )


GPT2: Final = Architecture(
    model_type="gpt2",
    classes={
        "GPT2LMHeadModel": "transformer.",
        "GPT2ForSequenceClassification": "transformer.",
        "GPT2Model": "",
    },
    read=_read,
    write=_write,
    rules=_rules,
    left_out=(r".*\.attn\.(bias|masked_bias)",),  # buffers of causal masks
)
