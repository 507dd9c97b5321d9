"""Fine-tuning as a transform of the parameter tree.

A transform splits a model's parameters into a trainable and a frozen tree, puts them together
again for `model.apply`, and merges them into plain arrays. Optimizer, gradient and checkpoint see
the trainable tree only. Full fine-tuning is the identity.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from t5x_lite import trees
from t5x_lite.types import Array, InputError, Params


class Transform(abc.ABC):
    """All four methods are pure, and can be traced by `jax.jit` and `jax.eval_shape`.

    `names` is the tree of logical axis names that goes with the base parameters.
    """

    @abc.abstractmethod
    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        """`(trainable, frozen)` from a model's parameters; new leaves are drawn from `rng`.

        Raises InputError for a pattern that selects nothing, before anything is computed.
        """

    @abc.abstractmethod
    def split_names(self, names: Params) -> tuple[Params, Params]:
        """The axis names of the two trees that `split` returns."""

    @abc.abstractmethod
    def apply(self, trainable: Params, frozen: Params) -> Params:
        """What `model.apply` takes; no arithmetic."""

    @abc.abstractmethod
    def merge(self, trainable: Params, frozen: Params) -> Params:
        """Parameters of the base model's shapes that compute what `apply`'s compute."""


def flatten_names(names: Params) -> dict[str, tuple[str, ...]]:
    """Axis names by path; the leaves are tuples."""
    return trees.flatten(names, is_leaf=lambda leaf: isinstance(leaf, tuple))


@dataclass(frozen=True)
class Full(Transform):
    """Full fine-tuning, and pretraining: everything is trainable."""

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        return base, {}

    def split_names(self, names: Params) -> tuple[Params, Params]:
        return names, {}

    def apply(self, trainable: Params, frozen: Params) -> Params:
        return trainable

    def merge(self, trainable: Params, frozen: Params) -> Params:
        return trainable


@dataclass(frozen=True)
class Freeze(Transform):
    """Trains the parameters that a pattern matches, and keeps the others."""

    trainable: Sequence[str]  # regexes on whole paths

    def __post_init__(self) -> None:
        object.__setattr__(self, "trainable", tuple(self.trainable))

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        taken = self._taken(trees.flatten(base))
        return trees.partition(base, taken.__contains__)

    def split_names(self, names: Params) -> tuple[Params, Params]:
        flat = flatten_names(names)
        taken = self._taken(flat)
        return (
            trees.unflatten({path: flat[path] for path in flat if path in taken}),
            trees.unflatten({path: flat[path] for path in flat if path not in taken}),
        )

    def apply(self, trainable: Params, frozen: Params) -> Params:
        return trees.merge(trainable, frozen)

    def merge(self, trainable: Params, frozen: Params) -> Params:
        return trees.merge(trainable, frozen)

    def _taken(self, flat: dict[str, Any]) -> set[str]:
        if not self.trainable:
            raise InputError("Freeze.trainable is empty: name at least one pattern to train")
        rules = [(pattern, True) for pattern in self.trainable]
        chosen = trees.match_first(rules, flat, what="Freeze.trainable pattern")
        return {path for path, hit in chosen.items() if hit}
