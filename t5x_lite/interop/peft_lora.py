"""PEFT's LORA: LoRA, rsLoRA and DoRA, with ranks and alphas of single modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from t5x_lite.interop import peft_files
from t5x_lite.interop.peft_modules import Modules, Slot
from t5x_lite.peft import targets
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.types import InputError

PARTS: Final = ("lora_A", "lora_B", "lora_magnitude_vector")
# Settings that change what an adapter computes, and the values of each that LoRA here has. Of the
# ways to start, those that leave the base's weights alone; others (PiSSA, LoftQ) take from them.
EXPECTED: Final[Mapping[str, Any]] = {
    "bias": "none",
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
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def load(
    directory: str,
    settings: Mapping[str, Any],
    found: Mapping[str, Mapping[str, np.ndarray]],
    modules: Modules,
) -> tuple[LoRA, dict[str, np.ndarray]]:
    """The transform, and its leaves by path.

    A kernel's layers have one rank and alpha here: where theirs differ, ranks are filled up with
    zeros and scales go into `b`. Layers without an adapter get zeros. On a fused module, GPT-2's
    `c_attn`, query, key and value each get a copy of the one A and their part of B.
    """
    is_dora = bool(settings.get("use_dora"))
    _check(directory, found, modules, is_dora)
    stabilised = bool(settings.get("use_rslora"))
    by_path: dict[str, list[tuple[Slot, str]]] = {}
    for module in found:
        for slot in modules.slots[module]:
            by_path.setdefault(slot.path, []).append((slot, module))
    rank, alpha = int(settings.get("r", 8)), float(settings.get("lora_alpha", 8))
    rank_rules, alpha_rules = [], []
    leaves: dict[str, np.ndarray] = {}
    for path, places in by_path.items():
        ranks = {module: found[module]["lora_A"].shape[0] for _, module in places}
        widest = max(ranks, key=lambda module: ranks[module])
        own, own_alpha = ranks[widest], _alpha(settings, widest)
        if own != rank:
            rank_rules.append((re.escape(path), own))
        if own_alpha != alpha:
            alpha_rules.append((re.escape(path), own_alpha))
        scale = _scale(own_alpha, own, stabilised)
        slot = places[0][0]
        a = leaves[f"{path}/a"] = modules.empty(slot, *slot.inputs, own)
        b = leaves[f"{path}/b"] = modules.empty(slot, own, *slot.outputs)
        if is_dora:
            leaves[f"{path}/magnitude"] = modules.empty(slot, *slot.outputs)
            if slot.layer is not None and len(places) < len(a):
                raise InputError(
                    f"the DoRA adapter in '{directory}' has {len(places)} of the {len(a)} layers "
                    f"of '{path}': the others' magnitudes are the base's, which it does not hold. "
                    "Merge it with PEFT"
                )
        for slot, module in places:
            its = ranks[module]
            ratio = np.float32(_scale(_alpha(settings, module), its, stabilised) / scale)
            a[*slot.at, ..., :its] = slot.a(found[module]["lora_A"])
            b[*slot.at, :its] = slot.b(found[module]["lora_B"]) * ratio
            if is_dora:
                vector = found[module]["lora_magnitude_vector"].reshape(-1)
                leaves[f"{path}/magnitude"][slot.at] = slot.over_outputs(vector)
    return (DoRA if is_dora else LoRA)(
        rank=rank,
        alpha=alpha,
        targets=tuple(map(re.escape, by_path)),
        rank_rules=tuple(rank_rules),
        alpha_rules=tuple(alpha_rules),
        rank_stabilised=stabilised,
        dropout=float(settings.get("lora_dropout") or 0.0),
    ), leaves


def save(
    transform: LoRA, flat: Mapping[str, np.ndarray], modules: Modules
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors of an adapter whose leaves are `flat`.

    PEFT has one A for a fused module. Where query, key and value have an A each, they are written
    as blocks: their A's one below the other and their B's on a block diagonal, with as many times
    the rank, and the alpha that keeps the scale. That computes the same.
    """
    paths = targets.by_owner(flat, "a")
    adapting = modules.adapting(paths)
    placed = {slot.path for parts in adapting.values() for slot in parts}
    if homeless := sorted(set(paths) - placed):
        peft_files.homeless(modules.model_type, homeless, "LoRA.targets")
    is_dora = isinstance(transform, DoRA)
    tensors: dict[str, np.ndarray] = {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    for module, parts in adapting.items():
        scale = transform.scale(parts[0].path)
        their_a, their_b = _joined(parts, flat, transform)
        rank = their_a.shape[0]
        alpha = scale * (math.sqrt(rank) if transform.rank_stabilised else rank)
        if rank != transform.rank:
            rank_pattern[module] = rank
        if not math.isclose(alpha, transform.alpha):
            alpha_pattern[module] = _number(alpha)
        name = f"{peft_files.PREFIX}{module}"
        tensors[f"{name}.lora_A.weight"] = their_a
        tensors[f"{name}.lora_B.weight"] = their_b
        if is_dora:
            if len(parts) < len(modules.slots[module]):
                raise InputError(
                    f"PEFT has one magnitude for all of '{module}', and "
                    f"{', '.join(sorted(slot.path for slot in parts))} are a part of it: merge "
                    "the adapter, or adapt the other parts too"
                )
            vector: np.ndarray = np.zeros(parts[0].sizes[1], np.float32)
            for slot in parts:
                slot.over_outputs(vector)[...] = flat[f"{slot.path}/magnitude"][slot.at]
            tensors[f"{name}.lora_magnitude_vector"] = vector
    transposed = {slot.transposed for parts in adapting.values() for slot in parts}
    return {
        "peft_type": "LORA",
        "r": transform.rank,
        "lora_alpha": _number(transform.alpha),
        "target_modules": list(adapting),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "fan_in_fan_out": transposed == {True},
        "lora_dropout": transform.dropout,
        "bias": "none",
        "use_rslora": transform.rank_stabilised,
        "use_dora": is_dora,
        "modules_to_save": None,
        "inference_mode": True,
    }, tensors


def _check(
    directory: str,
    found: Mapping[str, Mapping[str, np.ndarray]],
    modules: Modules,
    is_dora: bool,
) -> None:
    """Raises InputError with all that does not fit."""
    problems = modules.unknown(found)
    parts = PARTS if is_dora else PARTS[:2]
    for module, tensors in found.items():
        if module not in modules.slots:
            continue
        if lacking := [part for part in parts if part not in tensors]:
            problems.append(f"'{module}' lacks its {lacking[0]}")
            continue
        slot = modules.slots[module][0]
        shapes = dict(zip(PARTS, slot.their_shapes(tensors["lora_A"].shape[0]), strict=False))
        if is_dora:
            shapes[PARTS[2]] = (slot.sizes[1],)
        for part, tensor in tensors.items():
            shape = tuple(size for size in tensor.shape if size > 1 or part != PARTS[2])
            if part not in shapes:
                problems.append(f"'{module}' has a {part}, and use_dora is not set")
            elif shape != shapes[part]:
                problems.append(
                    f"{part} of '{module}' has shape {tensor.shape}, expected {shapes[part]}"
                )
    peft_files.refuse(directory, problems)


def _joined(
    parts: Sequence[Slot], flat: Mapping[str, np.ndarray], transform: LoRA
) -> tuple[np.ndarray, np.ndarray]:
    """`lora_A`, `lora_B` of a module, at the scale of its first part."""

    def own(slot: Slot, side: str) -> np.ndarray:
        return flat[f"{slot.path}/{side}"][slot.at]

    scale = transform.scale(parts[0].path)
    first = own(parts[0], "a")
    shared = all(np.array_equal(own(slot, "a"), first) for slot in parts[1:])
    ranks = [own(slot, "a").shape[-1] for slot in parts]
    a_shape, b_shape = parts[0].their_shapes(ranks[0] if shared else sum(ranks))
    their_a: np.ndarray = np.zeros(a_shape, np.float32)
    their_b: np.ndarray = np.zeros(b_shape, np.float32)
    start = 0
    for slot, rank in zip(parts, ranks, strict=True):
        block = slice(None) if shared else slice(start, start + rank)
        start += rank
        slot.a(their_a)[..., block] = own(slot, "a")
        slot.b(their_b)[block] = own(slot, "b") * np.float32(transform.scale(slot.path) / scale)
    return their_a, their_b


def _alpha(settings: Mapping[str, Any], module: str) -> float:
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(settings.get("lora_alpha", 8))


def _scale(alpha: float, rank: int, stabilised: bool) -> float:
    """What PEFT multiplies `B A` of a module by."""
    return alpha / (math.sqrt(rank) if stabilised else rank)


def _number(value: float) -> int | float:
    return round(value) if math.isclose(value, round(value)) else float(value)
