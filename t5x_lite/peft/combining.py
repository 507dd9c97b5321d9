"""One LoRA adapter of several, as Hugging Face PEFT's `add_weighted_adapter` makes it.

    combine([(math, its_tree), (code, its_tree)], weights=[0.7, 0.3], method=Ties(density=0.2))

A method that mixes tensors mixes the two factors of an update each by itself. So even `Linear` is
not the weighted sum of the updates: `(sum sqrt(w) a)(sum sqrt(w) b)` has products of one adapter's
`a` and another's `b`. `Concatenation` is that sum, at the sum of the ranks; `Truncation` comes as
near to it as a rank allows, and mixes whole updates where it is told to.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from t5x_lite import trees
from t5x_lite.peft import targets
from t5x_lite.peft.lora import LoRA
from t5x_lite.types import InputError, Params

Election: TypeAlias = Literal["total", "frequency"]
_Factors: TypeAlias = tuple[np.ndarray, np.ndarray, float]  # a [in, rank], b [rank, out], scale


@dataclass(frozen=True)
class Linear:
    """The weighted sum (task arithmetic, Ilharco et al. 2023, arXiv:2212.04089)."""

    def mix(self, tensors: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`tensors [n, ...]` and `weights [n]` as one tensor."""
        return np.tensordot(weights, tensors, 1)


@dataclass(frozen=True)
class Pruning:
    """The weighted sum of each one's largest values."""

    density: float = 0.5  # share of values that stay

    def __post_init__(self) -> None:
        _check_density(self)

    def mix(self, tensors: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return Linear().mix(_largest(tensors, self.density), weights, rng)


@dataclass(frozen=True)
class Ties:
    """Trim, elect a sign, and average what has it (Yadav et al. 2023, arXiv:2306.01708)."""

    density: float = 0.2  # share of values that stay: the paper's top 20%
    election: Election = "total"  # signs by the sum of the values, or by their number

    def __post_init__(self) -> None:
        _check_density(self)
        _check_election(self)

    def mix(self, tensors: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _agreed(_largest(tensors, self.density), weights, self.election)


@dataclass(frozen=True)
class Dare:
    """Values dropped at random, the others rescaled; then as Linear, or with an election as Ties.

    Yu et al. 2024, arXiv:2311.03099.
    """

    density: float = 0.5  # share of values that stay
    election: Election | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_density(self)
        _check_election(self)

    def mix(self, tensors: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        kept = rng.random(tensors.shape) < self.density
        return self.mix_kept(tensors, weights, kept)

    def mix_kept(self, tensors: np.ndarray, weights: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """As `mix`, with the values to keep given: bool, of the tensors' shape."""
        rescaled = tensors * kept / self.density
        if self.election is None:
            return np.tensordot(weights, rescaled, 1)
        return _agreed(rescaled, weights, self.election)


Mixing: TypeAlias = Linear | Pruning | Ties | Dare


@dataclass(frozen=True)
class Concatenation:
    """The weighted sum of the updates, exactly: factors side by side, ranks added up."""


@dataclass(frozen=True)
class Truncation:
    """The best approximation of one rank to mixed updates, by their singular values.

    Of plain sums without forming them; another mixing forms one layer's updates at a time, and
    takes the whole singular value decomposition.
    """

    rank: int | None = None  # None: the largest of the adapters'
    mixing: Mixing = Linear()

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise InputError(f"Truncation.rank={self.rank}: expected at least 1, or None")
        if not isinstance(self.mixing, Mixing):
            raise InputError(
                f"Truncation.mixing={self.mixing!r}: expected Linear(), Pruning(), Ties() or Dare()"
            )


Method: TypeAlias = Mixing | Concatenation | Truncation


def combine(
    adapters: Sequence[tuple[LoRA, Params]],
    weights: Sequence[float],
    method: Method = Linear(),
) -> tuple[LoRA, Params]:
    """One adapter of several for the same base: it is trained, served and saved as any other.

    What PEFT computes of its modules is computed of kernels here: on a fused module, GPT-2's
    `c_attn`, queries, keys and values are trimmed and truncated each by themselves.

    Args:
      adapters: each a LoRA and its trainable tree, on hosts. A weight that some do not adapt is
        combined of those that do.
      weights: one for each, negative ones to subtract. They need not add up to 1.
      method: how.

    Returns:
      A LoRA of scale 1 and its trainable tree, float32 on the host.

    Raises InputError for transforms of another kind, trees of different models, and where a method
    mixes factors of different ranks.
    """
    if not adapters or len(adapters) != len(weights):
        raise InputError(
            f"{len(adapters)} adapters and {len(weights)} weights: expected one weight for each of "
            "one adapter or more"
        )
    if not isinstance(method, Method):
        raise InputError(
            f"combine.method={method!r}: expected Linear(), Pruning(), Ties(), Dare(), "
            "Concatenation() or Truncation()"
        )
    for transform, _ in adapters:
        if type(transform) is not LoRA:
            raise InputError(
                f"{type(transform).__name__} is no sum of low-rank updates: only LoRA adapters "
                "can be combined"
            )
        if transform.init == "pissa":
            raise InputError("PiSSA's factors are no update of the base: combine its `difference`")
    flat = [
        {path: np.asarray(leaf, np.float32) for path, leaf in trees.flatten(tree).items()}
        for _, tree in adapters
    ]
    paths = dict.fromkeys(path for tree in flat for path in targets.by_owner(tree, "a"))
    return _of_scale_one({path: _combined(path, adapters, flat, weights, method) for path in paths})


def difference(
    transform: LoRA, trainable: Params, base: Params, names: Params
) -> tuple[LoRA, Params]:
    """What PiSSA's adapter adds to the base it was split from, as a plain LoRA of twice the rank.

    `w + s (a b - a0 b0)`, with the factors that it started from; those are computed anew. With
    DoRA, as a DoRA. Any other LoRA is returned as it is. `names` are the axes of `base`.
    """
    if transform.init != "pissa":
        return transform, trainable
    start = trees.flatten(transform.split(base, names, jax.random.key(0))[0])
    flat, made = trees.flatten(trainable), {}
    for path, a in targets.by_owner(flat, "a").items():
        axis, b = 1 if targets.stacked(path) else 0, flat[f"{path}/b"]
        made[path] = (
            np.concatenate([a, start[f"{path}/a"]], axis=-1) * np.float32(transform.scale(path)),
            np.concatenate([b, -start[f"{path}/b"]], axis=axis),
        )
    plain, factors = _of_scale_one(made, type(transform))
    return plain, trees.unflatten({**flat, **trees.flatten(factors)})


def _of_scale_one(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], kind: type[LoRA] = LoRA
) -> tuple[LoRA, Params]:
    """A LoRA of these factors by path, whatever their ranks."""
    ranks = {path: a.shape[-1] for path, (a, _) in pairs.items()}
    rank = max(ranks.values())
    others = {re.escape(path): own for path, own in ranks.items() if own != rank}
    transform = kind(
        rank=rank,
        alpha=float(rank),
        targets=tuple(map(re.escape, pairs)),
        rank_rules=tuple(others.items()),
        alpha_rules=tuple((path, float(own)) for path, own in others.items()),
    )
    leaves: dict[str, Any] = {}
    for path, (a, b) in pairs.items():
        leaves |= {f"{path}/a": a, f"{path}/b": b}
    return transform, trees.unflatten(leaves)


def _combined(
    path: str,
    adapters: Sequence[tuple[LoRA, Params]],
    flat: Sequence[dict[str, np.ndarray]],
    weights: Sequence[float],
    method: Method,
) -> tuple[np.ndarray, np.ndarray]:
    """The new `a` and `b` of one weight, stacked as the old ones."""
    layers = 1 if targets.stacked(path) else 0
    found = []
    for (transform, _), tree, weight in zip(adapters, flat, weights, strict=True):
        if f"{path}/a" in tree:
            a, b = tree[f"{path}/a"], tree[f"{path}/b"]
            found.append((a, b, transform.scale(path), float(weight)))
    outer = {(a.shape[:-1], b.shape[layers + 1 :]) for a, b, _, _ in found}
    if len(outer) > 1:
        raise InputError(
            f"the adapters of '{path}' have shapes {sorted(outer)}: they belong to different models"
        )
    ((lead, outputs),) = outer
    ranks = sorted({a.shape[-1] for a, _, _, _ in found})
    if isinstance(method, Mixing) and len(ranks) > 1:
        raise InputError(
            f"the adapters of '{path}' have ranks {ranks}, and {type(method).__name__} mixes "
            "factors of one rank: use Concatenation(), or Truncation(), whose mixing can be "
            f"{type(method).__name__}()"
        )
    count = lead[0] if layers else 1
    matrices = [
        (
            a.reshape(count, -1, a.shape[-1]),
            b.reshape(count, b.shape[layers], -1),
            scale,
            weight,
        )
        for a, b, scale, weight in found
    ]
    made = []
    for layer in range(count):
        rngs = _Rngs(getattr(getattr(method, "mixing", method), "seed", 0), path, layer)
        factors = [(a[layer], b[layer], scale) for a, b, scale, _ in matrices]
        made.append(_layer(factors, np.array([weight for *_, weight in matrices]), method, rngs))
    a = np.stack([pair[0] for pair in made]).astype(np.float32)
    b = np.stack([pair[1] for pair in made]).astype(np.float32)
    stack, rank = lead[:layers], a.shape[-1]
    return a.reshape(*lead, rank), b.reshape(*stack, rank, *outputs)


@dataclass(frozen=True)
class _Rngs:
    """Generators keyed by place: what is drawn does not depend on what else is combined."""

    seed: int
    path: str
    layer: int

    def __call__(self, part: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, zlib.crc32(self.path.encode()), self.layer, part))


def _layer(
    factors: Sequence[_Factors], weights: np.ndarray, method: Method, rngs: _Rngs
) -> tuple[np.ndarray, np.ndarray]:
    """`a [in, rank]` and `b [rank, out]` of one layer."""
    scales = weights * np.array([scale for _, _, scale in factors])
    if isinstance(method, Mixing):
        # A negative weight's sign goes to one side: on both it would be none.
        roots = np.sqrt(np.abs(scales))
        a = method.mix(np.stack([a for a, _, _ in factors]), roots * np.sign(scales), rngs(0))
        return a, method.mix(np.stack([b for _, b, _ in factors]), roots, rngs(1))
    beside = np.concatenate([a * s for (a, _, _), s in zip(factors, scales, strict=True)], axis=1)
    below = np.concatenate([b for _, b, _ in factors])
    if isinstance(method, Concatenation):
        return beside, below
    rank = method.rank or max(a.shape[1] for a, _, _ in factors)
    if isinstance(method.mixing, Linear):
        left, upper = np.linalg.qr(beside)
        right, lower = np.linalg.qr(below.T)
        u, s, v = np.linalg.svd(upper @ lower.T)
        return _padded(left @ u, s[:, None] * (v @ right.T), rank)
    updates = np.stack([scale * a @ b for a, b, scale in factors])
    u, s, v = np.linalg.svd(method.mixing.mix(updates, weights, rngs(0)), full_matrices=False)
    return _padded(u, s[:, None] * v, rank)


def _padded(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `rank` of the factors' ranks, with zeros where there are fewer."""
    more = (0, max(0, rank - a.shape[1]))
    return np.pad(a[:, :rank], ((0, 0), more)), np.pad(b[:rank], (more, (0, 0)))


def _largest(tensors: np.ndarray, density: float) -> np.ndarray:
    """Each of `tensors [n, ...]` with zeros for all but its largest values."""
    flat = tensors.reshape(len(tensors), -1)
    count = int(density * flat.shape[1])
    places = np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :count]
    kept: np.ndarray = np.zeros(flat.shape, bool)
    np.put_along_axis(kept, places, True, axis=1)
    return tensors * kept.reshape(tensors.shape)


def _agreed(tensors: np.ndarray, weights: np.ndarray, election: Election) -> np.ndarray:
    """The mean of the weighted values whose sign has the majority, at each place."""
    votes = tensors if election == "total" else np.sign(tensors)
    majority = np.where(votes.sum(0) >= 0, 1, -1)
    agree = np.sign(tensors) == majority
    mixed = np.tensordot(weights, tensors * agree, 1)
    return mixed / np.maximum(agree.sum(0), 1)


def _check_density(method: Any) -> None:
    if not 0 < method.density <= 1:
        raise InputError(
            f"{type(method).__name__}.density={method.density}: expected more than 0, at most 1"
        )


def _check_election(method: Any) -> None:
    if method.election not in ("total", "frequency", None):
        raise InputError(
            f"{type(method).__name__}.election='{method.election}': expected 'total' or 'frequency'"
        )
