"""Prefix tuning: trained keys and values ahead of a text (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import flax.struct
import jax
import jax.numpy as jnp

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.peft import targets
from t5x_lite.peft.transform import Transform, flatten_names
from t5x_lite.types import Array, InputError, Params

_LEAF: Final = "prefix"
_KERNELS: Final = ("key/kernel", "value/kernel")


@flax.struct.dataclass
class Prefixed(weights.StructuredWeight):
    """A kernel of keys or values that multiplies as ever, and carries rows that attention reads.

    See `weights.prefix_rows`; with a leading layer axis on both inside a stack.
    """

    w: Array | weights.StructuredWeight  # [embed, kv heads, kv], frozen
    prefix: Array  # [prefix, kv heads, kv]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def dense(self) -> Array:
        raise NotImplementedError("no weight makes a prefix")

    def project(self, x: Array, in_axes: int) -> Array:
        return weights.project(x, self.w, in_axes)

    def square_sums(self, in_axes: int) -> Array:
        return weights.square_sums(self.w, in_axes)


@dataclass(frozen=True)
class PrefixTuning(Transform):
    """Trains `length` keys and values a layer, which every token sees ahead of its text.

    They take the text's first positions, as Hugging Face's past keys do: real tokens stand behind
    them, be it in learned positions, in angles, or in T5's relative bias. In packed rows each text
    sees the same prefix, at the same distance. Nothing can be a no-op here, for a softmax has to
    share itself out. The paper makes prefixes by an MLP while they are trained; here, as in PEFT's
    `prefix_projection=False`, they are trained themselves.
    """

    length: int = 20
    stddev: float = 0.02  # of fresh ones. PEFT: 1.0; 0.0: its init_weights="zero"
    # Regexes on whole paths, of the kernels of both keys and values; empty: self-attention of the
    # last stack (a decoder's, if there is one), as PEFT has it.
    targets: Sequence[str] = ()

    leaves: ClassVar[tuple[str, ...]] = (_LEAF,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.length < 1 or self.stddev < 0:
            raise InputError(
                f"PrefixTuning(length={self.length}, stddev={self.stddev}): expected a length from "
                "1 on and a stddev from 0 on"
            )

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        flat = trees.flatten(base, is_leaf=weights.is_node)
        rows = {}
        for path in self._targeted(flatten_names(names)):
            layers, _, *inner = flat[path].shape
            key = targets.key_of(rng, path)
            shape = (layers, self.length, *inner)
            rows[f"{path}/{_LEAF}"] = self.stddev * jax.random.normal(key, shape, jnp.float32)
        return trees.unflatten(rows), base

    def split_names(self, names: Params) -> tuple[Params, Params]:
        flat = flatten_names(names)
        rows = {
            f"{path}/{_LEAF}": (flat[path][0], "places", *flat[path][2:])
            for path in self._targeted(flat)
        }
        return trees.unflatten(rows), names

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        flat = trees.flatten(frozen, is_leaf=weights.is_node)
        for path, rows in targets.by_owner(trees.flatten(trainable), _LEAF).items():
            flat[path] = Prefixed(flat[path], rows)
        return trees.unflatten(flat)

    def merge(self, trainable: Params, frozen: Params) -> Params:
        raise InputError(
            "PrefixTuning can't be merged: no weight of the base makes its keys and values. Keep "
            "the run's folder and name it as the adapter (infer.adapter), or share it by save_peft"
        )

    def _targeted(self, names: dict[str, tuple[str, ...]]) -> list[str]:
        """Paths of the kernels, of keys and of values."""
        stack = "decoder" if any(path.startswith("decoder/") for path in names) else "encoder"
        patterns = self.targets or (f"{stack}/layers/self_attention/(key|value)/kernel",)
        paths = targets.find(patterns, names, "PrefixTuning target")
        for path in paths:
            if not path.endswith(_KERNELS):
                raise InputError(
                    f"PrefixTuning target '{path}' is no kernel of keys or values: narrow the "
                    "pattern, for instance to '.*/self_attention/(key|value)/kernel'"
                )
        blocks = {path.rsplit("/", 2)[0] for path in paths}
        for block in sorted(blocks):
            if missing := [name for name in _KERNELS if f"{block}/{name}" not in paths]:
                raise InputError(
                    f"PrefixTuning targets one half of '{block}': widen the pattern to {missing[0]}"
                )
        return paths
