"""Which architecture a directory is of, and which one can express a config of ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite.interop.name_maps import Architecture, Settings, Tensors
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import EmbeddingHead
from t5x_lite.types import InputError


def known(settings: Settings, architectures: Sequence[Architecture]) -> Architecture:
    """The architecture of a `config.json`; InputError for one that nobody here knows."""
    names = settings.get("architectures") or ["(none)"]
    for architecture in architectures:
        if architecture.model_type == settings.get("model_type"):
            if names[0] in architecture.classes:
                return architecture
            raise InputError(
                f"config.json has architectures={names}; of model_type "
                f"'{architecture.model_type}' these are known: {', '.join(architecture.classes)}"
            )
    raise InputError(
        f"config.json has model_type '{settings.get('model_type')}', architectures={names}; known: "
        + ", ".join(architecture.model_type for architecture in architectures)
        + "; docs/add_a_model.md shows how to add one"
    )


def today(tensors: Tensors, architecture: Architecture) -> dict[str, np.ndarray]:
    """Tensors under today's names."""

    def rename(name: str) -> str:
        for pattern, replacement in architecture.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def base_of(
    architecture: Architecture, settings: Settings, config: ModelConfig, tensors: Tensors
) -> str:
    """The prefix of the trunk's tensors in this file.

    Published files don't always have the one of their class: GPT2LMHeadModel's lack it.
    """
    declared = architecture.classes[settings["architectures"][0]]
    trunk = [rule.name for rule in architecture.rules(config) if rule.name.startswith("{base}")]

    def hits(base: str) -> int:
        return sum(n.replace("{base}", base).replace("{layer}", "0") in tensors for n in trunk)

    return max((declared, *architecture.classes.values()), key=hits)  # of equals, the first


def choose(
    config: ModelConfig, architectures: Sequence[Architecture]
) -> tuple[Architecture, dict[str, Any]]:
    """The first architecture whose settings for `config`, read again, make the same model.

    Raises InputError, with each one's reason, if there is none.
    """
    reasons = []
    for architecture in architectures:
        try:
            settings = architecture.write(config)
            different = misread(config, architecture, settings)
        except InputError as error:
            reasons.append(f"{architecture.model_type}: {error}")
            continue
        if not different:
            return architecture, settings
        reasons.append(f"{architecture.model_type}: {', '.join(different)}")
    raise InputError(
        "no architecture of Hugging Face's that is known here can express this model:\n  "
        + "\n  ".join(reasons)
    )


def misread(config: ModelConfig, architecture: Architecture, settings: Settings) -> list[str]:
    """How the model that `settings` make differs from the one of `config`; empty: not at all."""
    # As in the file that would be written, where no tensor is zeros.
    rules = [rule for rule in architecture.rules(config) if _has(config, rule.path)]
    written: Tensors = {rule.name: np.ones(1, np.float32) for rule in rules}
    return differences(essence(config), essence(architecture.read(settings, written)))


def _has(config: ModelConfig, path: str) -> bool:
    """Whether the head's optional parameter `path` is in the model."""
    head = dataclasses.asdict(config.head)
    if path == "lm_head/kernel":
        return head.get("tied") is False
    if path == "lm_head/bias":
        return bool(head.get("bias"))
    return True


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Fields of two configs that differ: `decoder.norm='rms', not 'layer'`."""
    if type(first) is type(second) and dataclasses.is_dataclass(first):
        return [
            text
            for field in dataclasses.fields(first)
            for text in differences(
                getattr(first, field.name), getattr(second, field.name), f"{where}.{field.name}"
            )
        ]
    return [] if first == second else [f"{where[1:]}={first!r}, not {second!r}"]


def essence(config: ModelConfig) -> ModelConfig:
    """What a model computes and which parameters it has: no dropout, initialisation, dtypes.

    Nor how vectors are pooled, for which transformers has no setting.
    """

    def stack(config: StackConfig | None) -> StackConfig | None:
        if config is None:
            return None
        return dataclasses.replace(config, dropout=0.0, num_kv_heads=config.kv_heads)

    head = EmbeddingHead() if isinstance(config.head, EmbeddingHead) else config.head
    return dataclasses.replace(
        config.canonical(),
        encoder=stack(config.canonical().encoder),
        decoder=stack(config.canonical().decoder),
        head=head,
        initializer_stddev=None,
        param_dtype="float32",
    )
