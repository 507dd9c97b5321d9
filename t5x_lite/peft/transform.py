"""Fine-tuning as a transform of the parameter tree.

A transform splits a model's parameters into a trainable and a frozen tree, puts them together
again for `model.apply`, and merges them into plain arrays. Optimizer, gradient and checkpoint see
the trainable tree only. Full fine-tuning is the identity.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.types import Array, InputError, Params


class Transform(abc.ABC):
    """All four methods are pure, and can be traced by `jax.jit` and `jax.eval_shape`.

    `names` is the tree of logical axis names that goes with the base parameters. Leaves of a base
    may be nodes (`weights.StructuredWeight`): transforms go on top of one another in a `Compose`.
    """

    leaves: ClassVar[tuple[str, ...]] = ()  # last names of the paths of what it adds
    trains_base: ClassVar[bool] = False  # whether it trains parameters of the base itself
    outermost: ClassVar[bool] = False  # whether its nodes go around all others

    @abc.abstractmethod
    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        """`(trainable, frozen)` from a model's parameters; new leaves are drawn from `rng`.

        Raises InputError for a pattern that selects nothing, before anything is computed.
        """

    @abc.abstractmethod
    def split_names(self, names: Params) -> tuple[Params, Params]:
        """The axis names of the two trees that `split` returns."""

    @abc.abstractmethod
    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        """What `model.apply` takes; no arithmetic.

        With `rng`, in training, what a method draws anew in each step is on: LoRA's dropout.
        """

    def merge(self, trainable: Params, frozen: Params) -> Params:
        """Parameters of the base model's shapes that compute what `apply`'s compute.

        Raises InputError for a method that no weights of these shapes stand for.
        """
        return jax.tree.map(weights.dense, self.apply(trainable, frozen), is_leaf=weights.is_node)


def flatten_names(names: Params) -> dict[str, tuple[str, ...]]:
    """Axis names by path; the leaves are tuples."""
    return trees.flatten(names, is_leaf=lambda leaf: isinstance(leaf, tuple))


@dataclass(frozen=True)
class Full(Transform):
    """Full fine-tuning, and pretraining: everything is trainable."""

    trains_base: ClassVar[bool] = True

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        return base, {}

    def split_names(self, names: Params) -> tuple[Params, Params]:
        return names, {}

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        return trainable


@dataclass(frozen=True)
class Freeze(Transform):
    """Trains the parameters that a pattern matches, and keeps the others."""

    trainable: Sequence[str]  # regexes on whole paths

    trains_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "trainable", tuple(self.trainable))

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        return self._parted(trees.flatten(base, is_leaf=weights.is_node))

    def split_names(self, names: Params) -> tuple[Params, Params]:
        return self._parted(flatten_names(names))

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        flat = trees.flatten(frozen, is_leaf=weights.is_node)
        return trees.unflatten({**flat, **trees.flatten(trainable)})

    def _parted(self, flat: Mapping[str, Any]) -> tuple[Params, Params]:
        name = type(self).__name__
        if not self.trainable:
            raise InputError(f"{name}.trainable is empty: name at least one pattern to train")
        rules = [(pattern, True) for pattern in self.trainable]
        chosen = trees.match_first(rules, flat, what=f"{name}.trainable pattern")
        return (
            trees.unflatten({path: leaf for path, leaf in flat.items() if chosen[path]}),
            trees.unflatten({path: leaf for path, leaf in flat.items() if not chosen[path]}),
        )


@dataclass(frozen=True)
class BitFit(Freeze):
    """Trains biases alone (Ben Zaken et al. 2022, arXiv:2106.10199).

    T5's only biases are those of its relative positions. A model without any is an InputError:
    train its norms' scales instead, `Freeze(('.*/scale',))`.
    """

    trainable: Sequence[str] = (".*/(bias|relative_bias/embedding)",)
