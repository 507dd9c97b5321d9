"""Between a `config.json` and our configs: what several architectures have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.interop.name_maps import Settings
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import EmbeddingHead, Head, LMHead, SequenceHead, TokenHead
from t5x_lite.types import InputError

T = TypeVar("T")
# Theirs -> ours: their "gelu" is the exact one, ours the tanh form.
ACTIVATIONS: Final[Mapping[str, str]] = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "linear",
}


def read_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise InputError(f"the activation '{name}' is unknown; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def write_activation(name: str) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == name)


def refuse(settings: Settings, expected: Mapping[str, Any]) -> None:
    """Raises InputError for a setting that is there and isn't what our models compute."""
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise InputError(
                f"config.json has {name}={settings[name]!r}, which t5x_lite doesn't compute: "
                f"expected {value!r}"
            )


def num_labels(settings: Settings, default: int = 2) -> int:
    """How many labels a head has; transformers writes their names alone."""
    return len(settings.get("id2label") or ()) or settings.get("num_labels") or default


def unnamed(labels: Sequence[str]) -> bool:
    """Whether these are names that stand for none: LABEL_0, LABEL_1, ..."""
    return tuple(labels) == tuple(f"LABEL_{index}" for index in range(len(labels)))


def write_labels(names: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def special_tokens(
    settings: Settings, vocabulary: Vocabulary, config: ModelConfig
) -> dict[str, Any]:
    """`settings` with the ids of the vocabulary's special tokens.

    Raises InputError for a vocabulary that is not the model's.
    """
    if vocabulary.size > config.vocab_size:
        raise InputError(
            f"the vocabulary has {vocabulary.size} tokens, and the model {config.vocab_size}: it "
            "is not the model's"
        )
    start = vocabulary.start_id
    ids = {
        "pad_token_id": vocabulary.pad_id,
        "eos_token_id": vocabulary.eos_id,
        "bos_token_id": vocabulary.bos_id,
    }
    if config.encoder is None:
        ids["bos_token_id"] = start  # what transformers' generate begins an empty prompt with
    elif config.decoder is not None:
        ids["decoder_start_token_id"] = start
    return {**settings, **ids}


def class_of(config: ModelConfig, prefix: str, lm_class: str) -> dict[str, Any]:
    """Settings that say which class a config's head makes it: `BertForTokenClassification`."""
    match config.head:
        case LMHead():
            name, labels = lm_class, 0
        case SequenceHead(num_labels=labels):
            name = "ForSequenceClassification"
        case TokenHead(num_labels=labels):
            name = "ForTokenClassification"
        case EmbeddingHead():
            name, labels = "Model", 0
    settings: dict[str, Any] = {"architectures": [prefix + name]}
    return settings | (write_labels([f"LABEL_{i}" for i in range(labels)]) if labels else {})


def expect(what: str, value: Any, kind: type[T]) -> T:
    """`value`, if it is of `kind`; InputError, which `save_hf` shows beside the architecture."""
    if not isinstance(value, kind):
        raise InputError(f"{what}={value!r}: expected {kind.__name__}")
    return value


def decoder_head(settings: Settings) -> Head:
    """The head of a decoder alone: of language models, or a classifier of the last token."""
    if settings["architectures"][0].endswith("ForSequenceClassification"):
        labels = num_labels(settings)
        return SequenceHead(num_labels=labels, pooling="last", activation=None, bias=False)
    return LMHead(tied=settings["tie_word_embeddings"])


def is_tied(config: ModelConfig, default: bool) -> bool:
    """Whether an LM head is tied; `default` for other heads, to which it makes no difference."""
    return config.head.tied if isinstance(config.head, LMHead) else default
