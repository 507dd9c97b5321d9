"""BERT and RoBERTa (Devlin et al. 2019; Liu et al. 2019) as transformers has them."""

from __future__ import annotations

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
from t5x_lite.models.config import PROJECTIONS, ModelConfig, StackConfig
from t5x_lite.models.config_heads import EmbeddingHead, Head, LMHead, SequenceHead, TokenHead
from t5x_lite.models.config_positions import Learned
from t5x_lite.types import InputError

# What transformers takes for a setting that config.json leaves out.
_DEFAULTS: Final[Settings] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
_ROBERTA_DEFAULTS: Final[Settings] = {**_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1}
_EXPECTED: Final[Settings] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def _read(settings: Settings, head: Head, offset: int) -> ModelConfig:
    refuse(settings, _EXPECTED)
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    encoder = StackConfig(
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=settings["intermediate_size"],
        mlp_activations=(read_activation(settings["hidden_act"]),),
        biases=PROJECTIONS,
        positions=Learned(max_length=settings["max_position_embeddings"] - offset, offset=offset),
        attention_scale=None,
        norm="layer",
        norm_epsilon=settings["layer_norm_eps"],
        residual="post",
        embedding_norm=True,
        num_token_types=settings["type_vocab_size"],
        dropout=settings["hidden_dropout_prob"],
    )
    pair = settings["architectures"][0] == "BertForPreTraining"
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        embed_dim=width,
        encoder=encoder,
        head=head,
        pair_head=SequenceHead(num_labels=2) if pair else None,
        initializer_stddev=settings["initializer_range"],
    )


def _head(settings: Settings, transform: str) -> Head:
    name = settings["architectures"][0]
    if name.endswith("ForSequenceClassification"):
        return SequenceHead(num_labels=num_labels(settings))
    if name.endswith("ForTokenClassification"):
        return TokenHead(num_labels=num_labels(settings))
    if name.endswith("Model"):
        return EmbeddingHead()
    return LMHead(tied=settings["tie_word_embeddings"], bias=True, transform=transform)


def _write(config: ModelConfig, prefix: str, lm_class: str) -> dict[str, Any]:
    encoder = expect("encoder", config.encoder, StackConfig)
    positions = expect("positions", encoder.positions, Learned)
    return {
        **class_of(config, prefix, lm_class),
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": encoder.mlp_dim,
        "hidden_act": write_activation(encoder.mlp_activations[0]),
        "hidden_dropout_prob": encoder.dropout,
        "attention_probs_dropout_prob": encoder.dropout,
        "max_position_embeddings": positions.max_length + positions.offset,
        "type_vocab_size": encoder.num_token_types,
        "initializer_range": config.initializer_stddev or 0.02,
        "layer_norm_eps": encoder.norm_epsilon,
        "tie_word_embeddings": is_tied(config, True),
    }


def _read_bert(settings: Settings, tensors: Tensors) -> ModelConfig:
    settings = {**_DEFAULTS, **settings}
    return _read(settings, _head(settings, read_activation(settings["hidden_act"])), offset=0)


def _write_bert(config: ModelConfig) -> dict[str, Any]:
    lm_class = "ForPreTraining" if config.pair_head is not None else "ForMaskedLM"
    return {**_write(config, "Bert", lm_class), "pad_token_id": 0}


def _read_roberta(settings: Settings, tensors: Tensors) -> ModelConfig:
    settings = {**_ROBERTA_DEFAULTS, **settings}
    # The first position comes behind that of padding, which is at its token's number.
    offset = settings["pad_token_id"] + 1
    return _read(settings, _head(settings, "gelu_exact"), offset)


def _write_roberta(config: ModelConfig) -> dict[str, Any]:
    settings = _write(config, "Roberta", "ForMaskedLM")
    encoder = expect("encoder", config.encoder, StackConfig)
    offset = expect("positions", encoder.positions, Learned).offset
    if offset < 1:
        raise InputError("positions.offset=0: expected at least 1")
    special = {"pad_token_id": offset - 1, "bos_token_id": 0, "eos_token_id": 2}
    return {**settings, **special}


_LAYER = "{base}encoder.layer.{layer}"
_TRUNK: Final = (
    Rule(
        "token_embedding/embedding",
        "{base}embeddings.word_embeddings.weight",
        aliases=("cls.predictions.decoder.weight", "lm_head.decoder.weight"),
    ),
    Rule("encoder/position_embedding/embedding", "{base}embeddings.position_embeddings.weight"),
    Rule("encoder/token_type_embedding/embedding", "{base}embeddings.token_type_embeddings.weight"),
    *norm("encoder/embedding_norm", "{base}embeddings.LayerNorm"),
    *attention(
        "encoder/layers/self_attention",
        f"{_LAYER}.attention.self.query",
        f"{_LAYER}.attention.self.key",
        f"{_LAYER}.attention.self.value",
        f"{_LAYER}.attention.output.dense",
    ),
    *norm("encoder/layers/self_attention_norm", f"{_LAYER}.attention.output.LayerNorm"),
    *linear("encoder/layers/mlp/wi_0", f"{_LAYER}.intermediate.dense", "embed", "mlp"),
    *linear("encoder/layers/mlp/wo", f"{_LAYER}.output.dense", "mlp", "embed"),
    *norm("encoder/layers/mlp_norm", f"{_LAYER}.output.LayerNorm"),
    *linear("token_head/out", "classifier", "embed", "labels"),
)
# The embedding head pools for itself, and masked language models have no use for a pooler.
_LEFT_OUT: Final = (
    r".*\.position_ids",
    r"position_ids",
    r"(.*\.)?pooler\.dense\.(weight|bias)",
    r"cls\.seq_relationship\.(weight|bias)",
)

_BERT_RULES: Final = (
    *_TRUNK,
    *linear("lm_head/transform", "cls.predictions.transform.dense", "in", "out"),
    *norm("lm_head/norm", "cls.predictions.transform.LayerNorm"),
    Rule("lm_head/kernel", "cls.predictions.decoder.weight", "embed vocab -> vocab embed"),
    Rule("lm_head/bias", "cls.predictions.bias", aliases=("cls.predictions.decoder.bias",)),
    *linear("pair_head/dense", "{base}pooler.dense", "in", "out"),
    *linear("pair_head/out", "cls.seq_relationship", "embed", "labels"),
    *linear("sequence_head/dense", "{base}pooler.dense", "in", "out"),
    *linear("sequence_head/out", "classifier", "embed", "labels"),
)
_ROBERTA_RULES: Final = (
    *_TRUNK,
    *linear("lm_head/transform", "lm_head.dense", "in", "out"),
    *norm("lm_head/norm", "lm_head.layer_norm"),
    Rule("lm_head/kernel", "lm_head.decoder.weight", "embed vocab -> vocab embed"),
    Rule("lm_head/bias", "lm_head.bias", aliases=("lm_head.decoder.bias",)),
    *linear("sequence_head/dense", "classifier.dense", "in", "out"),
    *linear("sequence_head/out", "classifier.out_proj", "embed", "labels"),
)

BERT: Final = Architecture(
    model_type="bert",
    classes={
        "BertForMaskedLM": "bert.",
        "BertForPreTraining": "bert.",
        "BertForSequenceClassification": "bert.",
        "BertForTokenClassification": "bert.",
        "BertModel": "",
    },
    read=_read_bert,
    write=_write_bert,
    rules=lambda config: _BERT_RULES,
    left_out=_LEFT_OUT,
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)

ROBERTA: Final = Architecture(
    model_type="roberta",
    classes={
        "RobertaForMaskedLM": "roberta.",
        "RobertaForSequenceClassification": "roberta.",
        "RobertaForTokenClassification": "roberta.",
        "RobertaModel": "",
    },
    read=_read_roberta,
    write=_write_roberta,
    rules=lambda config: _ROBERTA_RULES,
    left_out=_LEFT_OUT,
    carried=r"(bos|eos)_token_id",  # that of padding says where positions begin
)
