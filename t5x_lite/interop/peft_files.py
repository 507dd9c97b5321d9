"""The two files of a PEFT adapter: a JSON config beside safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

import jax
import numpy as np
import safetensors.flax
import safetensors.numpy
from absl import logging
from jax.experimental import multihost_utils

from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import LMHead, SequenceHead, TokenHead
from t5x_lite.types import InputError

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
SHOWN: Final = 6


def read_config(directory: str) -> dict[str, Any]:
    """PEFT's settings. Raises InputError for a folder without, or a damaged file."""
    path = os.path.join(directory, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except OSError as error:
        raise InputError(
            f"'{directory}' is no PEFT adapter: can't read {CONFIG} ({error.strerror})"
        ) from error
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"'{path}' holds no settings: expected an object")
    return settings


def check_settings(
    directory: str, settings: Mapping[str, Any], expected: Mapping[str, Any], kind: str
) -> None:
    """Raises InputError where settings are neither empty nor as expected: all those of a kind here.

    `expected` values may be tuples of what is allowed.
    """
    wrong = {
        name: settings[name]
        for name, value in expected.items()
        if settings.get(name)
        and settings[name] not in (value if isinstance(value, tuple) else (value,))
    }
    if wrong:
        shown = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise InputError(
            f"'{os.path.join(directory, CONFIG)}' has {shown}, which {kind} here doesn't compute: "
            "merge the adapter with PEFT (merge_and_unload), save the model, and load that"
        )


def read_weights(directory: str) -> dict[str, np.ndarray]:
    """The tensors in float32, without copies of the base's own. Raises InputError."""
    path = os.path.join(directory, WEIGHTS)
    if not os.path.exists(path):
        raise InputError(
            f"'{directory}' has no {WEIGHTS}: pickles (adapter_model.bin) are not read, for they "
            "can run any code; save the adapter again with a later PEFT"
        )
    try:
        found = safetensors.flax.load_file(path)  # the numpy side knows no bfloat16
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"'{path}' is damaged or cut short: {error}. Copy it again") from error
    # Of a head or embedding that has an adapter, PEFT saves the frozen weight as well.
    copies = [name for name in found if re.search(r"\.base_layer\.(weight|bias)$", name)]
    if copies:
        logging.info("left out, because they are the base's: %s", ", ".join(copies))
    return {
        name: np.asarray(tensor).astype(np.float32)
        for name, tensor in found.items()
        if name not in copies
    }


def write(directory: str, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes both files, on the first process."""
    if jax.process_index() != 0:
        return
    os.makedirs(directory, exist_ok=True)
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # transformers refuses a file that does not say for which framework it is.
    safetensors.numpy.save_file(whole, os.path.join(directory, WEIGHTS), {"format": "pt"})
    with open(os.path.join(directory, CONFIG), "w", encoding="utf-8") as file:
        file.write(json.dumps(settings, indent=2) + "\n")


def by_module(
    directory: str, tensors: Mapping[str, np.ndarray], parts: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Tensors by module and part: `{"encoder.block.0.layer.0.SelfAttention.q": {"lora_A": ...}}`.

    Raises InputError for a key that is none of the `parts` of a module.
    """
    pattern = rf"(?:base_model\.model\.)?(.+)\.({'|'.join(parts)})(?:\.default)?(?:\.weight)?"
    found: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for key, tensor in tensors.items():
        match = re.fullmatch(pattern, key)
        if match is None:
            problems.append(f"'{key}' {tensor.shape} is no {' or '.join(parts)} of a linear module")
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    if not tensors:
        problems.append("it holds no tensors")
    refuse(directory, problems)
    return found


def refuse(directory: str, problems: Sequence[str]) -> None:
    """Raises InputError if there are problems."""
    if problems:
        more = len(problems) - SHOWN
        shown = [*problems[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise InputError(f"the adapter in '{directory}' does not fit:\n  " + "\n  ".join(shown))


def homeless(model_type: str, paths: Sequence[str], knob: str) -> NoReturn:
    raise InputError(
        f"PEFT's {model_type} has no linear module for the adapted "
        f"{', '.join(paths[:SHOWN])}: merge the adapter, or leave these out of {knob}"
    )


def fetch(leaf: Any) -> np.ndarray:
    """A leaf as a float32 array of this process, gathered if others hold parts of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf, np.float32)


def task(config: ModelConfig) -> str | None:
    """PEFT's name of what the model's class is for; None: it has none."""
    match config.head:
        case LMHead() if config.decoder is not None:
            return "CAUSAL_LM" if config.encoder is None else "SEQ_2_SEQ_LM"
        case SequenceHead():
            return "SEQ_CLS"
        case TokenHead():
            return "TOKEN_CLS"
    return None
