"""LoRA adapters of Hugging Face PEFT in and out: a JSON config beside a safetensors file.

model, base = load_hf("t5-small")
transform, trainable = load_peft("adapter", model)
model.apply({"params": transform.apply(trainable, base)}, batch)
save_peft("out", model, transform, trainable, base="t5-small")
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
import safetensors.flax
import safetensors.numpy
from absl import logging
from jax.experimental import multihost_utils

from t5x_lite import trees
from t5x_lite.interop import choice
from t5x_lite.interop.hf import ARCHITECTURES
from t5x_lite.interop.name_maps import Architecture
from t5x_lite.interop.peft_modules import Slot, slots
from t5x_lite.interop.t5x import shapes_and_names
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import LMHead, SequenceHead, TokenHead
from t5x_lite.models.transformer import Transformer
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Transform
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError, Params

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_SHOWN: Final = 6
# Ways to start that leave the base's weights alone; others (PiSSA, LoftQ) take something from them.
_STARTS: Final = (True, False, None, "gaussian", "orthogonal", "eva")
# Settings that change what an adapter computes, and the only value of each that LoRA here has.
_EXPECTED: Final[Mapping[str, Any]] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "megatron_config": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "use_bdlora": None,
}


def load_peft(
    directory: str,
    model: Transformer,
    *,
    partitioner: Partitioner | None = None,
    architectures: Sequence[Architecture] = ARCHITECTURES,
) -> tuple[LoRA, Params]:
    """A PEFT LoRA adapter as a transform of the model's parameters, and its trainable tree.

    Exact for whatever PEFT's config says: ranks of their own for some modules are filled up with
    zeros, scales of their own (`alpha_pattern`, rsLoRA) go into `b`, layers without an adapter get
    zeros. On a fused module, GPT-2's `c_attn`, query, key and value each get a copy of the one A
    and their part of B.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      model: what the adapter was trained on, as `load_hf` gives it.
      partitioner: places the adapter by its axes; None: on the first device.
      architectures: as for `load_hf`.

    Raises InputError for adapters of another kind, for modules that the model lacks, wrong shapes
    and damaged files, naming them.
    """
    settings = _read_config(directory)
    tensors = _read_weights(directory)
    known, shapes, names = _modules(model.config, architectures, tensors)
    pairs = _pairs(directory, tensors, known)
    ranks = {module: int(a.shape[0]) for module, (a, _) in pairs.items()}
    scales = {module: _scale(settings, module, rank) for module, rank in ranks.items()}
    rank = max(ranks.values())
    scale = scales[next(module for module in ranks if ranks[module] == rank)]
    leaves: dict[str, np.ndarray] = {}
    for module, (their_a, their_b) in pairs.items():
        own, ratio = ranks[module], np.float32(scales[module] / scale)
        for slot in known[module]:
            stack = () if slot.layer is None else shapes[slot.path][:1]
            at = () if slot.layer is None else (slot.layer,)
            for side, shape in (("a", (*slot.inputs, rank)), ("b", (rank, *slot.outputs))):
                if f"{slot.path}/{side}" not in leaves:
                    leaves[f"{slot.path}/{side}"] = np.zeros((*stack, *shape), np.float32)
            leaves[f"{slot.path}/a"][*at, ..., :own] = slot.a(their_a)
            leaves[f"{slot.path}/b"][*at, :own] = slot.b(their_b) * ratio
    paths = dict.fromkeys(slot.path for module in pairs for slot in known[module])
    transform = LoRA(rank=rank, alpha=scale * rank, targets=tuple(map(re.escape, paths)))
    tree = trees.unflatten(leaves)
    if partitioner is None:
        return transform, jax.tree.map(jax.numpy.asarray, tree)
    shardings = partitioner.tree_shardings(tree, transform.split_names(trees.unflatten(names))[0])
    return transform, jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: leaf[index]
        ),
        tree,
        shardings,
    )


def save_peft(
    directory: str,
    model: Transformer,
    transform: Transform,
    trainable: Params,
    *,
    base: str | None = None,
    architectures: Sequence[Architecture] = ARCHITECTURES,
) -> None:
    """Writes a LoRA adapter that PEFT loads; the inverse of `load_peft`.

    PEFT has one A for a fused module. Where query, key and value were trained with an A each, they
    are written as blocks: their A's one below the other and their B's on a block diagonal, with
    rank and alpha as many times as large. That computes the same.

    Args:
      directory: made if need be.
      model: the model that was tuned.
      transform, trainable: a LoRA and its trainable tree.
      base: what PEFT shall take for the base model: a folder or a name on the hub.
      architectures: as for `load_hf`.

    Raises InputError for another transform, and for adapted parameters that are no linear module of
    the architecture's (embeddings).
    """
    if not isinstance(transform, LoRA):
        raise InputError(f"PEFT knows no {type(transform).__name__} of ours: expected a LoRA")
    architecture, settings = choice.choose(model.config, architectures)
    class_name = settings["architectures"][0]
    shapes, names = _shapes(model)
    known = slots(architecture, model.config, architecture.classes[class_name], shapes, names)
    flat = {path: _fetch(leaf) for path, leaf in trees.flatten(trainable).items()}
    adapted = {path.removesuffix("/a") for path in flat if path.endswith("/a")}
    placed = {slot.path for module in known.values() for slot in module}
    if homeless := sorted(adapted - placed):
        raise InputError(
            f"PEFT's {architecture.model_type} has no linear module for the adapted "
            f"{', '.join(homeless[:_SHOWN])}: merge the adapter, or leave these out of LoRA.targets"
        )
    tensors: dict[str, np.ndarray] = {}
    blocks: dict[str, int] = {}  # by module, how many ranks it takes
    for module, parts in known.items():
        if parts := [slot for slot in parts if slot.path in adapted]:
            their_a, their_b, blocks[module] = _joined(parts, flat)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = their_a
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = their_b
    large = {module: count for module, count in blocks.items() if count > 1}
    transposed = {slot.transposed for module in blocks for slot in known[module]}
    config = {
        "peft_type": "LORA",
        "task_type": _task(model.config),
        "base_model_name_or_path": base,
        "r": transform.rank,
        "lora_alpha": _number(transform.alpha),
        "target_modules": list(blocks),
        "rank_pattern": {m: n * transform.rank for m, n in large.items()},
        "alpha_pattern": {m: _number(n * transform.alpha) for m, n in large.items()},
        "fan_in_fan_out": transposed == {True},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    if jax.process_index() != 0:
        return
    os.makedirs(directory, exist_ok=True)
    # transformers refuses a file that does not say for which framework it is.
    safetensors.numpy.save_file(tensors, os.path.join(directory, WEIGHTS), {"format": "pt"})
    with open(os.path.join(directory, CONFIG), "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")


def _joined(
    parts: Sequence[Slot], flat: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, int]:
    """`lora_A`, `lora_B` of a module, and how many of our ranks it takes."""

    def own(slot: Slot, side: str) -> np.ndarray:
        leaf = flat[f"{slot.path}/{side}"]
        return leaf if slot.layer is None else leaf[slot.layer]

    first = own(parts[0], "a")
    rank = first.shape[-1]
    shared = all(np.array_equal(own(slot, "a"), first) for slot in parts[1:])
    count = 1 if shared else len(parts)
    a_shape, b_shape = parts[0].their_shapes(rank * count)
    their_a: np.ndarray = np.zeros(a_shape, np.float32)
    their_b: np.ndarray = np.zeros(b_shape, np.float32)
    for number, slot in enumerate(parts):
        block = slice(None) if shared else slice(number * rank, (number + 1) * rank)
        slot.a(their_a)[..., block] = own(slot, "a")
        slot.b(their_b)[block] = own(slot, "b")
    return their_a, their_b, count


def _read_config(directory: str) -> dict[str, Any]:
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
    wrong = {
        name: settings[name]
        for name, value in _EXPECTED.items()
        if settings.get(name) and settings[name] != value
    }
    if settings.get("init_lora_weights") not in _STARTS:
        wrong["init_lora_weights"] = settings["init_lora_weights"]
    if wrong:
        shown = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise InputError(
            f"'{path}' has {shown}, which LoRA here doesn't compute: merge the adapter with PEFT "
            "(merge_and_unload), save the model, and load that"
        )
    return settings


def _read_weights(directory: str) -> dict[str, np.ndarray]:
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


def _module_of(key: str) -> tuple[str, str] | None:
    """`("encoder.block.0.layer.0.SelfAttention.q", "A")` for the key of a tensor."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
    return None if match is None else (match[1], match[2])


def _modules(
    config: ModelConfig, architectures: Sequence[Architecture], tensors: Mapping[str, Any]
) -> tuple[dict[str, list[Slot]], dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Slots by module under the class's names that fit best, and shapes and axes by path."""
    architecture, settings = choice.choose(config, architectures)
    shapes, names = _shapes(Transformer(config))
    wanted = {found[0] for key in tensors if (found := _module_of(key))}
    declared = architecture.classes[settings["architectures"][0]]
    tables = [
        slots(architecture, config, base, shapes, names)
        for base in dict.fromkeys((declared, *architecture.classes.values()))
    ]
    return max(tables, key=lambda table: len(wanted & set(table))), shapes, names


def _pairs(
    directory: str, tensors: Mapping[str, np.ndarray], known: Mapping[str, list[Slot]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`(lora_A, lora_B)` by module. Raises InputError with all that does not fit."""
    sides: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for key, tensor in tensors.items():
        place = _module_of(key)
        if place is None:
            problems.append(f"'{key}' {tensor.shape} is no lora_A or lora_B of a linear module")
        elif place[0] not in known:
            problems.append(f"the model has no module '{place[0]}' (for '{key}' {tensor.shape})")
        else:
            sides.setdefault(place[0], {})[place[1]] = tensor
    for module, pair in sides.items():
        if lacking := {"A", "B"} - set(pair):
            problems.append(f"'{module}' lacks its lora_{lacking.pop()}")
            continue
        expected = known[module][0].their_shapes(pair["A"].shape[0])
        for side, shape in zip("AB", expected, strict=True):
            if pair[side].shape != shape:
                problems.append(
                    f"lora_{side} of '{module}' has shape {pair[side].shape}, expected {shape}"
                )
    if not problems and not sides:
        problems = ["it holds no tensors"]
    if problems:
        more = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(f"the adapter in '{directory}' does not fit:\n  " + "\n  ".join(shown))
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies `B A` of a module by."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _shapes(
    model: Transformer,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    structs, names = shapes_and_names(model)
    return {path: tuple(struct.shape) for path, struct in structs.items()}, names


def _fetch(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf, np.float32)


def _task(config: ModelConfig) -> str | None:
    """PEFT's name of what the model's class is for."""
    match config.head:
        case LMHead() if config.decoder is not None:
            return "CAUSAL_LM" if config.encoder is None else "SEQ_2_SEQ_LM"
        case SequenceHead():
            return "SEQ_CLS"
        case TokenHead():
            return "TOKEN_CLS"
    return None


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
