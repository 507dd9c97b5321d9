"""Which weights a method adapts, and how their axes fall into layers, inputs and outputs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from t5x_lite import trees
from t5x_lite.types import Array, InputError

AxisNames = tuple[str, ...]


@dataclass(frozen=True)
class Axes:
    """A weight's axes in three parts: `[*stack, *inputs, *outputs]`.

    `stack` is the layer axis or nothing. Heads and their width count as one input.
    """

    stack: tuple
    inputs: tuple
    outputs: tuple


def divide(names: AxisNames, parts: Sequence) -> Axes:
    """`parts` (names, or sizes) of a weight whose axes have these names."""
    layers = 1 if names[0] == "layers" else 0
    inputs = layers + (2 if names[layers] == "heads" else 1)
    parts = tuple(parts)
    return Axes(parts[:layers], parts[layers:inputs], parts[inputs:])


def find(
    patterns: Sequence[str],
    flat_names: Mapping[str, AxisNames],
    what: str,
    leaves: tuple[str, ...] = ("kernel", "embedding"),
) -> list[str]:
    """Paths of the matrices that the patterns match.

    Raises InputError for a pattern that matches nothing, or something that is no matrix.
    """
    chosen = trees.match_first([(pattern, True) for pattern in patterns], flat_names, what=what)
    paths = [path for path, hit in chosen.items() if hit]
    for path in paths:
        axes = flat_names[path]
        if path.rsplit("/", 1)[-1] not in leaves or not divide(axes, axes).outputs:
            raise InputError(
                f"{what} '{path}' {axes} is not a matrix that inputs are multiplied by: "
                f"narrow the pattern to {' or '.join(f'{leaf}s' for leaf in leaves)}"
            )
    return paths


def stacked(path: str) -> bool:
    """Whether a parameter has a layer axis; part of the contract of paths."""
    return "/layers/" in path


def key_of(rng: Array, path: str) -> Array:
    """A key of the path's own: what is drawn does not depend on what else is adapted."""
    return jax.random.fold_in(rng, zlib.crc32(path.encode()))


def by_owner(trainable: Mapping[str, Array], leaf: str) -> dict[str, Array]:
    """Leaves of this name by the path of the weight that they adapt."""
    end = f"/{leaf}"
    return {
        path.removesuffix(end): array for path, array in trainable.items() if path.endswith(end)
    }
