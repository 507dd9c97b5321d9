"""PEFT's IA3: a number for each output of a module, or for each input of a feed-forward one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from t5x_lite.interop import peft_files
from t5x_lite.interop.peft_modules import Modules
from t5x_lite.peft import targets
from t5x_lite.peft.ia3 import IA3
from t5x_lite.types import InputError

PARTS: Final = ("ia3_l",)
EXPECTED: Final[Mapping[str, Any]] = {"modules_to_save": None}


def load(
    directory: str,
    settings: Mapping[str, Any],
    found: Mapping[str, Mapping[str, np.ndarray]],
    modules: Modules,
) -> tuple[IA3, dict[str, np.ndarray]]:
    """The transform, and its leaves by path; layers without an adapter get ones.

    A vector's shape says what it multiplies: [1, in] inputs, [out, 1] outputs, bias included.
    """
    problems = modules.unknown(found)
    leaves: dict[str, np.ndarray] = {}
    of_inputs: dict[str, bool] = {}
    for module, tensors in found.items():
        vector = tensors["ia3_l"]
        for slot in modules.slots.get(module, ()):
            inputs, outputs = slot.sizes
            if vector.shape not in ((1, inputs), (outputs, 1)):
                problems.append(
                    f"ia3_l of '{module}' has shape {vector.shape}, expected {(outputs, 1)}, or of "
                    f"a feed-forward module {(1, inputs)}"
                )
                break
            at_inputs = vector.shape[0] == 1 and outputs != 1
            if of_inputs.setdefault(slot.path, at_inputs) != at_inputs:
                problems.append(f"'{module}' is a feed-forward module, and other layers' are not")
                break
            view, shape = (
                (slot.over_inputs, slot.inputs) if at_inputs else (slot.over_outputs, slot.outputs)
            )
            leaf = leaves.setdefault(
                f"{slot.path}/multiplier", modules.empty(slot, *shape, fill=1.0)
            )
            leaf[slot.at] = view(vector.reshape(-1))
    peft_files.refuse(directory, problems)
    return IA3(
        outputs=tuple(re.escape(path) for path, inputs in of_inputs.items() if not inputs),
        inputs=tuple(re.escape(path) for path, inputs in of_inputs.items() if inputs),
    ), leaves


def save(
    transform: IA3, flat: Mapping[str, np.ndarray], modules: Modules
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors of an adapter whose leaves are `flat`.

    Parts of a fused module that are not adapted get ones. Raises InputError where those that are
    multiply its one input by different numbers.
    """
    multipliers = targets.by_owner(flat, "multiplier")
    adapting = modules.adapting(multipliers)
    placed = {slot.path for parts in adapting.values() for slot in parts}
    if homeless := sorted(set(multipliers) - placed):
        peft_files.homeless(modules.model_type, homeless, "IA3.outputs and IA3.inputs")
    at_inputs = transform.at_inputs(multipliers)
    tensors: dict[str, np.ndarray] = {}
    feedforward = []
    for module, parts in adapting.items():
        inputs, outputs = parts[0].sizes
        kinds = {at_inputs[slot.path] for slot in parts}
        name = f"{peft_files.PREFIX}{module}.ia3_l"
        if kinds == {False}:
            vector: np.ndarray = np.ones(outputs, np.float32)
            for slot in parts:
                slot.over_outputs(vector)[...] = multipliers[slot.path][slot.at]
            tensors[name] = vector[:, None]
            continue
        vectors: list[np.ndarray] = []
        for slot in parts:
            vectors.append(np.ones(inputs, np.float32))
            slot.over_inputs(vectors[-1])[...] = multipliers[slot.path][slot.at]
        whole = len(parts) == len(modules.slots[module])
        if kinds != {True} or not whole or any((v != vectors[0]).any() for v in vectors):
            raise InputError(
                f"PEFT multiplies the inputs of '{module}' for all of its parts alike, and this "
                "adapter does not: merge it"
            )
        feedforward.append(module)
        tensors[name] = vectors[0][None]
    transposed = {slot.transposed for parts in adapting.values() for slot in parts}
    return {
        "peft_type": "IA3",
        "target_modules": list(adapting),
        "feedforward_modules": feedforward,
        "fan_in_fan_out": transposed == {True},
        "modules_to_save": None,
        "inference_mode": True,
    }, tensors
