"""What a Hugging Face directory says of its model's tokens and labels, beside the weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

from t5x_lite.decode.asking import Asking, Gaps
from t5x_lite.interop import safetensors_files as files
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import SequenceHead, TokenHead

_GAPS: Final[dict[str, Gaps]] = {"bart": "mask", "t5": "sentinels"}


@dataclass(frozen=True)
class Words:
    """Settings that a model is asked by; empty where the files say nothing."""

    ends: tuple[int, ...]  # eos_token_id: one, or several, of which each ends a text
    labels: tuple[str, ...]  # id2label, in the order of the ids
    asking: Asking  # as the architecture was published


def read(directory: str, config: ModelConfig) -> Words:
    """What config.json and generation_config.json say about the model of `config`.

    Ids that the model does not have are left out: published files have GPT-2's in small models.
    """
    settings = files.read_json(os.path.join(directory, "config.json"))
    # Later versions of transformers keep what concerns generation in a file of its own.
    generation = os.path.join(directory, "generation_config.json")
    special = {**settings, **(files.read_json(generation) if os.path.exists(generation) else {})}
    return Words(
        ends=_ids(special.get("eos_token_id"), config),
        labels=_labels(settings, config),
        asking=Asking(gaps=_GAPS.get(str(settings.get("model_type")))),
    )


def _ids(value: Any, config: ModelConfig) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(x for x in values if isinstance(x, int) and 0 <= x < config.vocab_size)


def _labels(settings: dict[str, Any], config: ModelConfig) -> tuple[str, ...]:
    head, names = config.head, settings.get("id2label") or {}
    if not isinstance(head, SequenceHead | TokenHead) or len(names) != head.num_labels:
        return ()
    return tuple(str(names[index]) for index in sorted(names, key=int))
