"""Bottleneck adapters behind a layer's projections (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.models.layers import ACTIVATION
from t5x_lite.peft import targets
from t5x_lite.peft.leaves import Bottlenecked
from t5x_lite.peft.transform import Transform, flatten_names
from t5x_lite.types import Array, InputError, Params

_LEAVES = ("down", "down_bias", "up", "up_bias")


@dataclass(frozen=True)
class Bottleneck(Transform):
    """Adds `up(f(down(y)))` to what attention and feed-forward give, before the residual sum.

    `up` starts at zero, so that the model starts as its base (near the identity, in the paper);
    `down` is normal with variance `1/e`. After the feed-forward block alone,
    `targets = ('.*/mlp/wo/kernel',)`, it is Pfeiffer et al.'s (2021, arXiv:2005.00247). It is no
    linear map, and cannot be merged.
    """

    size: int = 64
    activation: str = "relu"
    targets: Sequence[str] = (".*/layers/.*/(out|wo)/kernel",)  # regexes on whole paths

    leaves: ClassVar[tuple[str, ...]] = _LEAVES

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.size < 1:
            raise InputError(f"Bottleneck.size={self.size}: expected at least 1")
        if not self.targets:
            raise InputError("Bottleneck.targets is empty: name at least one pattern")
        if self.activation not in ACTIVATION:
            raise InputError(
                f"Bottleneck.activation='{self.activation}': expected {', '.join(ACTIVATION)}"
            )

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        flat, flat_names = trees.flatten(base, is_leaf=weights.is_node), flatten_names(names)
        added: dict[str, Array] = {}
        for path in self._targeted(flat_names):
            axes = targets.divide(flat_names[path], flat[path].shape)
            (width,) = axes.outputs
            shapes = self._shapes(axes.stack, width, self.size)
            for leaf, shape in zip(_LEAVES, shapes, strict=True):
                added[f"{path}/{leaf}"] = jnp.zeros(shape, jnp.float32)
            key = targets.key_of(rng, f"{path}/down")
            added[f"{path}/down"] = width**-0.5 * jax.random.normal(key, shapes[0], jnp.float32)
        return trees.unflatten(added), base

    def split_names(self, names: Params) -> tuple[Params, Params]:
        flat = flatten_names(names)
        added: dict[str, tuple[str, ...]] = {}
        for path in self._targeted(flat):
            divided = targets.divide(flat[path], flat[path])
            shapes = self._shapes(divided.stack, divided.outputs[0], "rank")
            added |= {f"{path}/{leaf}": axes for leaf, axes in zip(_LEAVES, shapes, strict=True)}
        return trees.unflatten(added), names

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        flat = trees.flatten(frozen, is_leaf=weights.is_node)
        own = trees.flatten(trainable)
        for path in targets.by_owner(own, "down"):
            parts = {leaf: own[f"{path}/{leaf}"] for leaf in _LEAVES}
            flat[path] = Bottlenecked(w=flat[path], activation=ACTIVATION[self.activation], **parts)
        return trees.unflatten(flat)

    def merge(self, trainable: Params, frozen: Params) -> Params:
        raise InputError(
            "a Bottleneck is no linear map and can't be merged into the weights: keep it as an "
            "adapter, or train a LoRA"
        )

    @staticmethod
    def _shapes(stack: tuple, width: Any, size: Any) -> tuple[tuple, ...]:
        """Of the four leaves: sizes, or the names of their axes."""
        return (*stack, width, size), (*stack, size), (*stack, size, width), (*stack, width)

    def _targeted(self, flat_names: dict[str, tuple[str, ...]]) -> list[str]:
        paths = targets.find(self.targets, flat_names, "Bottleneck target", ("kernel",))
        for path in paths:
            axes = targets.divide(flat_names[path], flat_names[path])
            if axes.outputs != ("embed",):
                raise InputError(
                    f"Bottleneck target '{path}' gives {axes.outputs}, expected a projection back "
                    "to the model's width: narrow the pattern to out and wo"
                )
        return paths
