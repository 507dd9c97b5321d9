"""LoRA: low-rank updates beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from t5x_lite import trees
from t5x_lite.peft.leaves import LowRank
from t5x_lite.peft.transform import Transform, flatten_names
from t5x_lite.types import Array, InputError, Params


@dataclass(frozen=True)
class LoRA(Transform):
    """Trains `a` and `b` of `w + alpha / rank * a b` for each weight that a target matches.

    `b` starts at zero, so that the model starts as its base. `a` is uniform in
    `+-1/sqrt(fan_in)`, as in Microsoft's loralib and Hugging Face PEFT.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = (".*/(query|value)/kernel",)  # regexes on whole paths

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"LoRA.rank={self.rank}: expected at least 1")
        object.__setattr__(self, "targets", tuple(self.targets))  # gin's lists compare unequal
        if not self.targets:
            raise InputError("LoRA.targets is empty: name at least one pattern")

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        flat_names = flatten_names(names)
        flat = trees.flatten(base)
        adapters = {}
        for path in self._targeted(flat_names):
            weight, axes = flat[path], flat_names[path]
            layers, inputs = _layer_axes(axes), _input_axes(axes)
            stack, rest = weight.shape[:layers], weight.shape[layers:]
            fan_in = math.prod(rest[:inputs])
            # Keyed by path: an adapter's start does not depend on what else is targeted.
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            adapters[f"{path}/a"] = jax.random.uniform(
                key,
                (*stack, *rest[:inputs], self.rank),
                jnp.float32,
                -(fan_in**-0.5),
                fan_in**-0.5,
            )
            adapters[f"{path}/b"] = jnp.zeros((*stack, self.rank, *rest[inputs:]), jnp.float32)
        return trees.unflatten(adapters), base

    def split_names(self, names: Params) -> tuple[Params, Params]:
        flat = flatten_names(names)
        adapters = {}
        for path in self._targeted(flat):
            axes = flat[path]
            layers = _layer_axes(axes)
            stop = layers + _input_axes(axes)
            adapters[f"{path}/a"] = (*axes[:stop], "rank")
            adapters[f"{path}/b"] = (*axes[:layers], "rank", *axes[stop:])
        return trees.unflatten(adapters), names

    def apply(self, trainable: Params, frozen: Params) -> Params:
        flat = trees.flatten(frozen)
        for path, (a, b) in _pairs(trainable).items():
            flat[path] = LowRank(flat[path], a, b, self.alpha / self.rank)
        return trees.unflatten(flat)

    def merge(self, trainable: Params, frozen: Params) -> Params:
        flat = trees.flatten(frozen)
        for path, (a, b) in _pairs(trainable).items():
            flat[path] = merge_low_rank(flat[path], a, b, self.alpha / self.rank)
        return trees.unflatten(flat)

    def _targeted(self, flat_names: dict[str, tuple[str, ...]]) -> list[str]:
        rules = [(pattern, True) for pattern in self.targets]
        chosen = trees.match_first(rules, flat_names, what="LoRA target")
        paths = [path for path, hit in chosen.items() if hit]
        for path in paths:
            axes = flat_names[path]
            if not path.endswith(("/kernel", "/embedding")) or len(axes) - _layer_axes(axes) < 2:
                raise InputError(
                    f"LoRA target '{path}' {axes} is not a matrix that inputs are multiplied by: "
                    "narrow the pattern to kernels or embeddings"
                )
        return paths


def merge_low_rank(w: Array, a: Array, b: Array, scale: float) -> Array:
    """`w + scale * a b` in float32, back in `w`'s dtype; shapes as in `LowRank`, stacked or not."""
    stacked = a.ndim + b.ndim - 2 - w.ndim  # 1 if all three have a leading layer axis

    def product(a: Array, b: Array) -> Array:
        return jnp.tensordot(a, b, axes=1, precision="highest")

    update = jax.vmap(product)(a, b) if stacked else product(a, b)
    return (w.astype(jnp.float32) + scale * update.astype(jnp.float32)).astype(w.dtype)


def _pairs(trainable: Params) -> dict[str, tuple[Array, Array]]:
    """`(a, b)` by the path of the weight they adapt."""
    flat = trees.flatten(trainable)
    return {
        path.removesuffix("/a"): (a, flat[path.removesuffix("/a") + "/b"])
        for path, a in flat.items()
        if path.endswith("/a")
    }


def _layer_axes(axes: tuple[str, ...]) -> int:
    return 1 if axes[0] == "layers" else 0


def _input_axes(axes: tuple[str, ...]) -> int:
    """How many axes after `layers` are inputs: heads and their width count as one dimension."""
    return 2 if axes[_layer_axes(axes)] == "heads" else 1
