"""LoRA: low-rank updates beside frozen weights (Hu et al. 2021, arXiv:2106.09685).

With its relatives: ranks and alphas by pattern, rsLoRA's scale, PiSSA's start and, as `DoRA`,
magnitudes apart. LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is a matter of the optimizer:
`AdamW.rate_rules = (('.*/b', 16.0),)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.peft import targets
from t5x_lite.peft.leaves import Decomposed, LowRank, column_squares, merge_low_rank
from t5x_lite.peft.transform import Transform, flatten_names
from t5x_lite.types import Array, InputError, Params

T = TypeVar("T")


@dataclass(frozen=True)
class LoRA(Transform):
    """Trains `a` and `b` of `w + scale * a b` for each weight that a target matches.

    The scale is `alpha / rank`, or with `rank_stabilised` `alpha / sqrt(rank)`, at which large
    ranks learn as fast as small ones (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).

    `b` starts at zero, so that the model starts as its base. `a` is uniform in
    `+-1/sqrt(fan_in)`, as in Microsoft's loralib and Hugging Face PEFT. With `init="pissa"` both
    are the weight's own first singular vectors, which its frozen part loses (PiSSA, Meng et al.
    2024, arXiv:2404.02948): the sum is the base, and the update starts where the weight is large.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = (".*/(query|value)/kernel",)  # regexes on whole paths
    rank_rules: Sequence[tuple[str, int]] = ()  # (regex, rank) where it is another; first match
    alpha_rules: Sequence[tuple[str, float]] = ()
    rank_stabilised: bool = False
    dropout: float = 0.0  # of what `a` reads, in training
    init: Literal["lora", "pissa"] = "lora"

    leaves: ClassVar[tuple[str, ...]] = ("a", "b")

    def __post_init__(self) -> None:
        name = type(self).__name__
        for knob in ("targets", "rank_rules", "alpha_rules"):  # gin's lists compare unequal
            given = getattr(self, knob)
            made = given if knob == "targets" else (tuple(rule) for rule in given)
            object.__setattr__(self, knob, tuple(made))
        for rank in (self.rank, *(rank for _, rank in self.rank_rules)):
            if rank < 1:
                raise InputError(f"{name}.rank={rank}: expected at least 1")
        if not self.targets:
            raise InputError(f"{name}.targets is empty: name at least one pattern")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"{name}.dropout={self.dropout}: expected 0 <= dropout < 1")
        if self.init not in ("lora", "pissa"):
            raise InputError(f"{name}.init='{self.init}': expected 'lora' or 'pissa'")

    def scale(self, path: str) -> float:
        """What `a b` of a weight is multiplied by."""
        rank, alpha = self._rank(path), _first(self.alpha_rules, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        flat_names = flatten_names(names)
        flat = trees.flatten(base, is_leaf=weights.is_node)
        adapters: dict[str, Array] = {}
        for path in self._targeted(flat_names):
            weight, rank = flat[path], self._rank(path)
            axes = targets.divide(flat_names[path], weight.shape)
            shapes = (
                (*axes.stack, *axes.inputs, rank),
                (*axes.stack, rank, *axes.outputs),
            )
            if self.init == "pissa":
                if weights.is_node(weight):
                    raise InputError(
                        f"PiSSA starts from the singular vectors of '{path}', which is quantised "
                        "already: compose it as (LoRA, Quantise) over the base in full precision"
                    )
                a, b = principal(weight, axes, rank, self.scale(path))
                flat[path] = merge_low_rank(weight, a, b, -self.scale(path))
            else:
                bound = math.prod(axes.inputs) ** -0.5
                key = targets.key_of(rng, path)
                a = jax.random.uniform(key, shapes[0], jnp.float32, -bound, bound)
                b = jnp.zeros(shapes[1], jnp.float32)
            adapters[f"{path}/a"], adapters[f"{path}/b"] = a.reshape(shapes[0]), b
        return trees.unflatten(adapters), trees.unflatten(flat)

    def split_names(self, names: Params) -> tuple[Params, Params]:
        flat = flatten_names(names)
        adapters = {}
        for path in self._targeted(flat):
            axes = targets.divide(flat[path], flat[path])
            adapters[f"{path}/a"] = (*axes.stack, *axes.inputs, "rank")
            adapters[f"{path}/b"] = (*axes.stack, "rank", *axes.outputs)
        return trees.unflatten(adapters), names

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        flat = trees.flatten(frozen, is_leaf=weights.is_node)
        flat_trainable = trees.flatten(trainable)
        b = targets.by_owner(flat_trainable, "b")
        for path, a in targets.by_owner(flat_trainable, "a").items():
            key = None
            if rng is not None and self.dropout > 0.0:
                key = targets.key_of(rng, path)
                key = jax.random.split(key, len(a)) if targets.stacked(path) else key
                key = jax.random.key_data(key)
            flat[path] = LowRank(
                flat[path], a, b[path], self.scale(path), key=key, dropout=self.dropout
            )
        return trees.unflatten(flat)

    def _rank(self, path: str) -> int:
        return _first(self.rank_rules, path, self.rank)

    def _targeted(self, flat_names: dict[str, tuple[str, ...]]) -> list[str]:
        name = type(self).__name__
        paths = targets.find(self.targets, flat_names, f"{name} target")
        for knob in ("rank_rules", "alpha_rules"):
            trees.match_first(getattr(self, knob), paths, what=f"{name}.{knob}")
        return paths


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA of a weight's direction, and each column's magnitude apart (Liu et al. 2024).

    `magnitude * (w + scale * a b) / |w + scale * a b|`, arXiv:2402.09353; magnitudes start at the
    base's, so that the model starts as its base up to rounding.
    """

    leaves: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        adapters, frozen = super().split(base, names, rng)
        flat, added = trees.flatten(frozen, is_leaf=weights.is_node), trees.flatten(adapters)
        flat_names = flatten_names(names)
        b = targets.by_owner(added, "b")
        for path, a in targets.by_owner(added, "a").items():
            axes = targets.divide(flat_names[path], flat_names[path])
            low = LowRank(flat[path], a, b[path], self.scale(path))

            def norms(low: LowRank, in_axes: int = len(axes.inputs)) -> Array:
                return jnp.sqrt(column_squares(low, in_axes))

            added[f"{path}/magnitude"] = jax.vmap(norms)(low) if axes.stack else norms(low)
        return trees.unflatten(added), frozen

    def split_names(self, names: Params) -> tuple[Params, Params]:
        adapters, frozen = super().split_names(names)
        flat, added = flatten_names(names), flatten_names(adapters)
        for path in targets.by_owner(added, "a"):
            axes = targets.divide(flat[path], flat[path])
            added[f"{path}/magnitude"] = (*axes.stack, *axes.outputs)
        return trees.unflatten(added), frozen

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        flat = trees.flatten(super().apply(trainable, frozen, rng), is_leaf=weights.is_node)
        magnitudes = targets.by_owner(trees.flatten(trainable), "magnitude")
        for path, magnitude in magnitudes.items():
            flat[path] = Decomposed(flat[path], magnitude)
        return trees.unflatten(flat)


def principal(weight: Array, axes: targets.Axes, rank: int, scale: float) -> tuple[Array, Array]:
    """PiSSA's start: `scale * a b` is the weight's best approximation of this rank.

    Args:
      weight: `[*stack, *inputs, *outputs]`.
      axes: its sizes.

    Returns:
      a `[*stack, *inputs, rank]` and b `[*stack, rank, *outputs]`, float32. Raises InputError for a
      rank that is greater than the weight's.
    """
    rows, columns = math.prod(axes.inputs), math.prod(axes.outputs)
    if rank > min(rows, columns):
        raise InputError(
            f"PiSSA with rank {rank} of a weight that is {rows} x {columns}: expected a rank of at "
            f"most {min(rows, columns)}"
        )
    u, s, v = jnp.linalg.svd(
        weight.astype(jnp.float32).reshape(*axes.stack, rows, columns), full_matrices=False
    )
    root = jnp.sqrt(s[..., :rank] / scale)
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    return a.reshape(*axes.stack, *axes.inputs, rank), b.reshape(*axes.stack, rank, *axes.outputs)


def _first(rules: Sequence[tuple[str, T]], path: str, default: T) -> T:
    return next((value for pattern, value in rules if re.fullmatch(pattern, path)), default)
