"""Soft prompts and prefixes of Hugging Face PEFT in and out: one tensor, `prompt_embeddings`.

PEFT keeps a prompt as `[rows, embed]`, and a prefix as `[prefix, slots * heads * width]`, where a
slot is a layer's keys or its values. For an encoder-decoder it lays the slots out twice and gives
each of the decoder's layers four of them, of which only the first two are read: of n layers,
layer i reads slots 4i and 4i + 1, modulo 2n. So layers share slots where n is even.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from t5x_lite import trees
from t5x_lite.interop import peft_files
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.transformer import Transformer
from t5x_lite.peft.prefix import PrefixTuning
from t5x_lite.peft.prompt import PATH, PromptTuning
from t5x_lite.peft.transform import Transform
from t5x_lite.types import InputError, Params

KINDS: Final = ("PROMPT_TUNING", "PREFIX_TUNING")
TRANSFORMS: Final = (PromptTuning, PrefixTuning)
_TENSOR: Final = "prompt_embeddings"


def load_prompt(
    directory: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    model: Transformer,
) -> tuple[PromptTuning | PrefixTuning, Params]:
    """An adapter as a transform of the model's parameters, and its trainable tree of numpy arrays.

    A prefix that an MLP made in training (`prefix_projection`) is saved as what it made, and loads
    as any other.

    Args:
      directory: its name, for errors.
      settings: of `adapter_config.json`, whose `peft_type` is one of `KINDS`.
      tensors: of its weights.
      model: what it was trained on.

    Raises InputError for what else it holds, and for shapes that are not the model's.
    """
    found = tensors.get(_TENSOR)
    others = sorted(set(tensors) - {_TENSOR})
    if found is None or others or settings.get("modules_to_save"):
        raise InputError(
            f"the adapter in '{directory}' holds {', '.join(sorted(tensors)) or 'nothing'}: of a "
            f"{settings['peft_type']}, {_TENSOR} alone can be read"
        )
    length, copies = settings["num_virtual_tokens"], settings.get("num_transformer_submodules") or 1
    config = model.config
    if settings["peft_type"] == "PROMPT_TUNING":
        # An encoder-decoder's has as many rows again, which PEFT never reads.
        expected = (length * copies, config.embed_dim)
        if found.shape != expected:
            raise _misfit(directory, found.shape, expected)
        # PEFT puts a prompt behind the embedding's own scale.
        rows = (found[:length] / config.embedding_scale).astype(np.float32)
        return PromptTuning(length=length), trees.unflatten({f"{PATH}/prompt": rows})
    stack, layers, heads, width = _attention(config)
    shared = settings["num_layers"]
    expected = (length, 2 * shared * heads * width)
    split = settings["num_attention_heads"], settings["token_dim"]
    if found.shape != expected or split != (heads, heads * width) or shared < layers:
        raise InputError(
            f"the prefix in '{directory}' is {found.shape}, for {shared} layers of {split[0]} "
            f"heads and {split[1]} numbers; the model's {stack} has {layers} layers of {heads} "
            f"heads and {heads * width} numbers, which makes {expected}"
        )
    slots: np.ndarray = found.reshape(length, 2 * shared, heads, width).astype(np.float32)
    made = {
        path: np.stack([slots[:, place[number]] for place in _places(layers, shared, copies)])
        for number, path in enumerate(_paths(stack))
    }
    return PrefixTuning(length=length), trees.unflatten(made)


def save_prompt(
    directory: str,
    model: Transformer,
    transform: Transform,
    trainable: Params,
    *,
    base: str | None = None,
) -> None:
    """Writes a prompt or prefix that PEFT loads; the inverse of `load_prompt`.

    An encoder-decoder's prefix says one layer more than there is where their number is even, so
    that PEFT gives every layer slots of its own.

    Args:
      directory: made if need be.
      model: the model that was tuned.
      transform, trainable: a `PromptTuning` or `PrefixTuning` and its trainable tree.
      base: what PEFT shall take for the base model: a folder or a name on the hub.

    Raises InputError for another transform, and for prefixes that PEFT has no place for.
    """
    flat = {path: peft_files.fetch(leaf) for path, leaf in trees.flatten(trainable).items()}
    config = model.config
    copies = 2 if config.encoder is not None and config.decoder is not None else 1
    sizes: dict[str, Any]
    if isinstance(transform, PromptTuning):
        rows = flat[f"{PATH}/prompt"] * np.float32(config.embedding_scale)
        tensor = np.concatenate([rows] * copies)
        kind, length, stack = "PROMPT_TUNING", len(rows), config.encoder or config.decoder
        assert stack is not None
        sizes = {"token_dim": config.embed_dim, "num_attention_heads": stack.num_heads}
        sizes |= {"num_layers": stack.num_layers, "prompt_tuning_init": "RANDOM"}
    elif isinstance(transform, PrefixTuning):
        name, layers, heads, width = _attention(config)
        paths = _paths(name)
        if set(flat) != set(paths):
            other = sorted(set(flat) ^ set(paths))
            raise InputError(
                f"PEFT has prefixes of the {name}'s self-attention alone: it has no place for "
                f"{', '.join(other)}"
            )
        length = flat[paths[0]].shape[1]
        shared = layers + (1 if copies == 2 and layers % 2 == 0 else 0)
        slots: np.ndarray = np.zeros((length, 2 * shared, heads, width), np.float32)
        for layer, place in enumerate(_places(layers, shared, copies)):
            for number, path in enumerate(paths):
                slots[:, place[number]] = flat[path][layer]
        tensor, kind = slots.reshape(length, -1), "PREFIX_TUNING"
        sizes = {"token_dim": heads * width, "num_attention_heads": heads, "num_layers": shared}
        sizes |= {"encoder_hidden_size": heads * width, "prefix_projection": False}
    else:
        raise InputError(f"{type(transform).__name__} is no prompt or prefix")
    settings = {
        "peft_type": kind,
        "task_type": peft_files.task(config) or "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "num_virtual_tokens": length,
        "num_transformer_submodules": copies,
        **sizes,
        "modules_to_save": None,
        "inference_mode": True,
    }
    peft_files.write(directory, settings, {_TENSOR: tensor})


def _attention(config: ModelConfig) -> tuple[str, int, int, int]:
    """The stack whose self-attention has PEFT's prefix: name, layers, heads of keys, width."""
    stack = config.last_stack
    name = "encoder" if config.decoder is None else "decoder"
    return name, stack.num_layers, stack.kv_heads, stack.head_dim


def _paths(stack: str) -> tuple[str, str]:
    """Of keys and of values."""
    block = f"{stack}/layers/self_attention"
    return f"{block}/key/kernel/prefix", f"{block}/value/kernel/prefix"


def _places(layers: int, shared: int, copies: int) -> list[tuple[int, int]]:
    """Each layer's slots of keys and of values, among those of `shared` layers."""
    step = 2 * copies
    return [((step * i) % (2 * shared), (step * i + 1) % (2 * shared)) for i in range(layers)]


def _misfit(directory: str, found: tuple[int, ...], expected: tuple[int, ...]) -> InputError:
    return InputError(
        f"the prompt in '{directory}' has shape {found}, and the model needs {expected}: it was "
        "trained on another one"
    )
