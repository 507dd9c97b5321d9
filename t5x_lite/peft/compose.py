"""Several methods at once: LoRA and a fresh head, IA3 and biases, LoRA over quantised weights."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.peft.transform import Transform, flatten_names
from t5x_lite.types import Array, InputError, Params


@dataclass(frozen=True)
class Compose(Transform):
    """Each transform splits what the one before it froze; the last is applied first.

    `Compose((LoRA(), Freeze(('sequence_head/.*',))))` trains a fresh head beside LoRA,
    `Compose((LoRA(), Quantise()))` is QLoRA. What all train is one tree: a method adds leaves of
    its own name below the weight that it adapts, so no two may be of one kind.
    """

    transforms: Sequence[Transform]

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))
        if not self.transforms:
            raise InputError("Compose.transforms is empty: name at least one transform")
        if any(isinstance(part, Compose) for part in self.transforms):
            raise InputError("Compose.transforms has a Compose in it: list its transforms instead")
        kinds = collections.Counter(leaf for part in self.transforms for leaf in part.leaves)
        twice = [leaf for leaf, count in kinds.items() if count > 1]
        if twice:
            owners = [
                type(part).__name__ for part in self.transforms if set(twice) & {*part.leaves}
            ]
            raise InputError(
                f"Compose has {' and '.join(owners)}, which both train leaves named "
                f"{', '.join(twice)}: use one of them, with rules for ranks and more targets"
            )
        for before, part in itertools.pairwise(self.transforms):
            if part.outermost and not before.outermost:
                name = type(part).__name__
                raise InputError(
                    f"Compose has {name} behind {type(before).__name__}: name {name} first, for it "
                    "goes around what adapts the same weight"
                )
        plain = [part for part in self.transforms if part.trains_base]
        if len(plain) > 1:
            names = " and ".join(type(part).__name__ for part in plain)
            raise InputError(
                f"Compose has {names}, which both train parameters of the base: put the patterns "
                "of both into one Freeze"
            )

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        taken: dict[str, Any] = {}
        for part in self.transforms:
            trainable, base = part.split(base, names, rng)
            names = part.split_names(names)[1]
            _add(taken, trees.flatten(trainable), part)
        return trees.unflatten(taken), base

    def split_names(self, names: Params) -> tuple[Params, Params]:
        taken: dict[str, Any] = {}
        for part in self.transforms:
            trainable, names = part.split_names(names)
            _add(taken, flatten_names(trainable), part)
        return trees.unflatten(taken), names

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        for part, own in reversed(self.parts(trainable)):
            frozen = part.apply(own, frozen, rng)
        return frozen

    def merge(self, trainable: Params, frozen: Params) -> Params:
        for part, own in reversed(self.parts(trainable)):
            frozen = part.merge(own, frozen)
        return frozen

    def parts(self, trainable: Params) -> list[tuple[Transform, Params]]:
        """Each transform with its own share of what is trained."""
        flat = trees.flatten(trainable, is_leaf=weights.is_node)
        added = {leaf for part in self.transforms for leaf in part.leaves}

        def share(part: Transform) -> Params:
            own = {
                path: leaf
                for path, leaf in flat.items()
                if (name := path.rsplit("/", 1)[-1]) in part.leaves
                or (part.trains_base and name not in added)
            }
            return trees.unflatten(own)

        return [(part, share(part)) for part in self.transforms]


def _add(taken: dict[str, Any], more: Mapping[str, Any], part: Transform) -> None:
    """Raises InputError for a weight that is trained and adapted at once."""
    for path, leaf in more.items():
        owner = path.rsplit("/", 1)[0]
        clash = next((p for p in taken if p in (path, owner) or p.startswith(f"{path}/")), None)
        if clash is not None:
            raise InputError(
                f"Compose: {type(part).__name__} trains '{path}' where '{clash}' is trained "
                "already: a weight is either adapted or trained itself; narrow the patterns of one"
            )
        taken[path] = leaf
