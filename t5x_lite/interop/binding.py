"""An architecture's rules, bound to the parameters of one model: which tensor holds what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from t5x_lite.interop.axes import Axes
from t5x_lite.interop.name_maps import Architecture, Rule, Tensors
from t5x_lite.models.config import ModelConfig
from t5x_lite.types import Array, InputError

_SHOWN: Final = 8  # names in one message
_ROWS: Final = 4096  # compared at a time


@dataclass(frozen=True)
class Part:
    """One of our parameters, or one layer of it, and where it lies in a tensor of theirs."""

    path: str
    layer: int | None  # None: the whole parameter
    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]  # ours, without the layer axis
    axes: Axes

    @property
    def their_shape(self) -> tuple[int, ...]:
        return self.axes.their_shape(self.shape)


@dataclass(frozen=True)
class Binding:
    """All parts of a model's parameters, in the order of the architecture's rules."""

    parts: tuple[Part, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        config: ModelConfig,
        base: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Binding:
        """Raises InputError for a parameter that no rule of the architecture names."""
        rules = {r.path: r for r in architecture.rules(config) if r.path in shapes}
        unnamed = [path for path in shapes if path not in rules]
        if unnamed:
            raise InputError(
                f"the name map of '{architecture.model_type}' has no rule for "
                + ", ".join(unnamed[:_SHOWN])
            )
        parts = [part for rule in rules.values() for part in _parts(rule, shapes[rule.path], base)]
        return cls(tuple(parts), architecture.left_out)

    def read(self, tensors: Tensors) -> dict[str, list[np.ndarray]]:
        """For each of our paths, views of its layers (or of the whole) in their tensors.

        Raises InputError for tensors that are missing, of a wrong shape, or claimed by no rule, and
        for two that ought to be one and differ: all in one message.
        """
        problems: list[str] = []
        claimed = {part.name for part in self.parts}
        for part in self.parts:
            claimed |= {alias for alias in part.aliases if alias in tensors}
        views: dict[str, list[np.ndarray]] = {}
        own = {part.name for part in self.parts}
        for part in self.parts:
            found = [n for n in (part.name, *part.aliases) if n in tensors]
            found = [n for n in found if n == part.name or n not in own]
            if not found:
                problems.append(f"no tensor '{part.name}' (for {part.path})")
                continue
            tensor = tensors[found[0]]
            if tensor.shape != part.their_shape:
                problems.append(
                    f"'{found[0]}' has shape {tensor.shape}, expected {part.their_shape} "
                    f"(for {part.path})"
                )
                continue
            problems += [
                f"'{other}' differs from '{found[0]}', to which config.json says it is tied"
                for other in found[1:]
                if not _equal(tensor, tensors[other])
            ]
            views.setdefault(part.path, []).append(part.axes.view(tensor, part.shape))
        extra = [name for name in tensors if name not in claimed]
        unused = [n for n in extra if any(re.fullmatch(regex, n) for regex in self.left_out)]
        if unused:
            logging.info("left out, because nothing here uses them: %s", ", ".join(unused))
        unexpected = [name for name in extra if name not in unused]
        problems += [f"unexpected tensor '{name}'" for name in unexpected]
        problems = list(dict.fromkeys(problems))
        if problems:
            more = len(problems) - _SHOWN
            shown = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
            raise InputError("its tensors don't fit its config.json:\n  " + "\n  ".join(shown))
        return views

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that `write` yields, in its order."""
        return {part.name: part.their_shape for part in self.parts}

    def write(self, params: Mapping[str, Array]) -> Iterator[tuple[str, np.ndarray]]:
        """Their tensors one by one, filled from our parameters by path.

        Every process has to run through all of it: sharded arrays are gathered along the way.
        """
        grouped: dict[str, list[Part]] = {}
        for part in self.parts:
            grouped.setdefault(part.name, []).append(part)
        for name, parts in grouped.items():
            dtype = params[parts[0].path].dtype
            tensor: np.ndarray = np.empty(parts[0].their_shape, dtype)
            for part in parts:
                part.axes.view(tensor, part.shape)[...] = _fetch(params[part.path], part.layer)
            yield name, tensor


def _parts(rule: Rule, shape: tuple[int, ...], base: str) -> list[Part]:
    def full(name: str, layer: int | None) -> str:
        return name.replace("{base}", base).replace("{layer}", str(layer))

    layers: Sequence[int | None] = range(shape[0]) if rule.stacked else (None,)
    shape = shape[1:] if rule.stacked else shape
    return [
        Part(
            rule.path,
            layer,
            full(rule.name, layer),
            tuple(full(alias, layer) for alias in rule.aliases),
            shape,
            rule.layout(shape),
        )
        for layer in layers
    ]


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Bit by bit, without a copy of either."""
    if first.shape != second.shape:
        return False
    return all(
        np.array_equal(first[i : i + _ROWS], second[i : i + _ROWS])
        for i in range(0, len(first), _ROWS)
    )


@jax.jit
def _take(x: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def _fetch(x: Any, layer: int | None) -> np.ndarray:
    """One layer of a parameter, or all of it, on the host."""
    if isinstance(x, np.ndarray):
        return x if layer is None else x[layer]
    x = x if layer is None else _take(x, np.int32(layer))
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
