"""(IA)^3: learned vectors that rescale activations (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.peft import targets
from t5x_lite.peft.leaves import Rescaled
from t5x_lite.peft.transform import Transform, flatten_names
from t5x_lite.types import Array, InputError, Params


@dataclass(frozen=True)
class IA3(Transform):
    """Multiplies keys, values and what the feed-forward block's last projection reads.

    A vector a projection: of its outputs (its bias included) for `outputs`, of its inputs for
    `inputs`. All start at one, so that the model starts as its base, and merge into the weights.
    """

    outputs: Sequence[str] = (".*/(key|value)/kernel",)  # regexes on whole paths
    inputs: Sequence[str] = (".*/mlp/wo/kernel",)

    leaves: ClassVar[tuple[str, ...]] = ("multiplier",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "outputs", tuple(self.outputs))
        object.__setattr__(self, "inputs", tuple(self.inputs))
        if not self.outputs and not self.inputs:
            raise InputError("IA3.outputs and IA3.inputs are empty: name at least one pattern")

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        flat, flat_names = trees.flatten(base, is_leaf=weights.is_node), flatten_names(names)
        added = {}
        for path, inputs in self._targeted(flat_names).items():
            axes = targets.divide(flat_names[path], flat[path].shape)
            shape = (*axes.stack, *(axes.inputs if inputs else axes.outputs))
            added[f"{path}/multiplier"] = jnp.ones(shape, jnp.float32)
        return trees.unflatten(added), base

    def split_names(self, names: Params) -> tuple[Params, Params]:
        flat = flatten_names(names)
        added = {}
        for path, inputs in self._targeted(flat).items():
            axes = targets.divide(flat[path], flat[path])
            added[f"{path}/multiplier"] = (*axes.stack, *(axes.inputs if inputs else axes.outputs))
        return trees.unflatten(added), names

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        flat = trees.flatten(frozen, is_leaf=weights.is_node)
        multipliers = targets.by_owner(trees.flatten(trainable), "multiplier")
        inputs_of = self.at_inputs(multipliers)
        for path, multiplier in multipliers.items():
            inputs = inputs_of[path]
            bias = path.removesuffix("kernel") + "bias"
            for leaf in (path, *((bias,) if bias in flat and not inputs else ())):
                ndim = len(flat[leaf].shape) - (1 if targets.stacked(path) else 0)
                flat[leaf] = Rescaled(flat[leaf], multiplier, inputs, ndim)
        return trees.unflatten(flat)

    def _targeted(self, flat_names: dict[str, tuple[str, ...]]) -> dict[str, bool]:
        """Whether it is a projection's inputs that are multiplied, by path."""
        paths = [
            *targets.find(self.outputs, flat_names, "IA3.outputs", ("kernel",)),
            *targets.find(self.inputs, flat_names, "IA3.inputs", ("kernel",)),
        ]
        return self.at_inputs(paths)

    def at_inputs(self, paths: Iterable[str]) -> dict[str, bool]:
        """Of adapted kernels, whether it is their inputs that are multiplied."""
        return {
            path: not any(re.fullmatch(pattern, path) for pattern in self.outputs) for path in paths
        }
