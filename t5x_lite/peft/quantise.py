"""Quantised weights under what is trained: QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from t5x_lite import trees
from t5x_lite.models import weights
from t5x_lite.peft import codes as coding
from t5x_lite.peft import targets
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.quantised import QuantisedWeight
from t5x_lite.peft.transform import Transform, flatten_names
from t5x_lite.types import Array, InputError, Params

FIELDS = ("codes", "scales", "groups", "mean")


@dataclass(frozen=True)
class Quantise(Transform):
    """Keeps what the targets match in 4 or 8 bits; trains nothing itself.

    `Compose((LoRA(), Quantise()))` is QLoRA. See `codes` for the two kinds. A kernel at `path`
    is frozen as arrays at `path/codes` and `path/scales`; with double quantisation the scales are
    codes, too, of `path/groups` and `path/mean`.
    """

    kind: Literal["nf4", "int8"] = "nf4"
    # Kernels of attention and feed-forward blocks: most of a large model's weights. Embeddings may
    # be named too; a head that is trained or of few labels is better left alone.
    targets: Sequence[str] = (".*/(self_attention|cross_attention|mlp)/[^/]+/kernel",)
    block: int | None = None  # inputs that share a scale; None: 64 of nf4, all of int8
    double_quantisation: bool = False  # scales in 8 bits: 4.13 bits a number in place of 4.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.kind not in ("nf4", "int8"):
            raise InputError(f"Quantise.kind='{self.kind}': expected 'nf4' or 'int8'")
        if not self.targets:
            raise InputError("Quantise.targets is empty: name at least one pattern")
        if self.block is not None and (self.block < 2 or self.block % 2):
            raise InputError(f"Quantise.block={self.block}: expected an even number above 0")

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        flat, flat_names = trees.flatten(base, is_leaf=weights.is_node), flatten_names(names)
        wanted = self._targeted(flat_names)
        frozen: dict[str, Any] = {}
        for path, leaf in flat.items():
            if isinstance(leaf, QuantisedWeight):
                self._check_same(path, leaf, path in wanted)
            elif path in wanted:
                leaf = self._quantise(path, leaf, flat_names[path])
            if isinstance(leaf, QuantisedWeight):
                parts = ((field, getattr(leaf, field)) for field in FIELDS)
                frozen |= {f"{path}/{field}": part for field, part in parts if part is not None}
            else:
                frozen[path] = leaf
        return {}, trees.unflatten(frozen)

    def split_names(self, names: Params) -> tuple[Params, Params]:
        flat = flatten_names(names)
        frozen: dict[str, Any] = dict(flat)
        for path in self._targeted(flat):
            axes = targets.divide(frozen.pop(path), flat[path])
            inputs, outputs = axes.inputs, axes.outputs
            if _is_embedding(path):
                scales = (*axes.stack, *inputs, self._scale_axis(outputs[0]))
            else:
                scales = (*axes.stack, self._scale_axis(inputs[0]), *outputs)
            frozen |= {f"{path}/codes": flat[path], f"{path}/scales": scales}
            if self.double_quantisation:
                frozen |= {f"{path}/groups": (*axes.stack, None), f"{path}/mean": axes.stack}
        return {}, trees.unflatten(frozen)

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        flat = trees.flatten(frozen, is_leaf=weights.is_node)
        for path in targets.by_owner(flat, "codes"):
            own = {field: flat.pop(f"{path}/{field}", None) for field in FIELDS}
            ndim = own["codes"].ndim - (1 if targets.stacked(path) else 0)
            flat[path] = QuantisedWeight(ndim=ndim, embedding=_is_embedding(path), **own)
        return trees.unflatten(flat)

    def takes(self, path: str) -> bool:
        """Whether a target matches."""
        return any(re.fullmatch(pattern, path) for pattern in self.targets)

    def _targeted(self, flat_names: dict[str, tuple[str, ...]]) -> list[str]:
        return targets.find(self.targets, flat_names, "Quantise target")

    def _scale_axis(self, name: str) -> str | None:
        """The axis of an output's scales: its inputs', unless all of them share one."""
        return None if self._block is None else name

    @property
    def _block(self) -> int | None:
        return 64 if self.block is None and self.kind == "nf4" else self.block

    def _quantise(self, path: str, weight: Array, names: tuple[str, ...]) -> QuantisedWeight:
        axes = targets.divide(names, weight.shape)
        embedding = _is_embedding(path)
        across, along = (axes.inputs, axes.outputs) if embedding else (axes.outputs, axes.inputs)
        count = math.prod(along)
        block = count if self._block is None else self._block
        if count % block or (self.kind == "nf4" and along[-1] % 2):
            raise InputError(
                f"Quantise: blocks of {block} do not divide the {count} inputs "
                f"({' x '.join(map(str, along))}) of '{path}': set Quantise.block to an even "
                "divisor, or narrow Quantise.targets"
            )
        ndim = len(names) - len(axes.stack)

        def one(w: Array) -> QuantisedWeight:
            w = w.reshape(math.prod(axes.inputs), -1)
            codes, scales = coding.quantise(w.T if embedding else w, self.kind, block)
            groups = mean = None
            if self.double_quantisation:
                scales, groups, mean = coding.quantise_scales(scales)
            if embedding:
                codes, scales = codes.T, scales.T
            else:
                codes = codes.reshape(*along[:-1], -1, *across)
                scales = scales.reshape(-1, *across)
            return QuantisedWeight(codes, scales, ndim, embedding, groups, mean)

        return jax.vmap(one)(weight) if axes.stack else one(weight)

    def _check_same(self, path: str, node: QuantisedWeight, wanted: bool) -> None:
        """Raises InputError unless a weight that comes quantised is as this transform makes it."""
        block = None if node.shares_all and self._block is None else node.block
        found = node.kind, block, node.groups is not None
        if wanted and found == (self.kind, self._block, self.double_quantisation):
            return
        double = " with double quantisation" if node.groups is not None else ""
        asks = f"asks for {self}" if wanted else "leaves it as it is"
        raise InputError(
            f"the base's '{path}' is quantised already, as {node.kind} in blocks of {node.block}"
            f"{double}, and this transform {asks}: take the Quantise that it was made with"
        )


@dataclass(frozen=True)
class Stored(Transform):
    """The transform of a folder that `scripts/quantize.py` wrote: its checkpoint holds the codes.

    So a run that starts from it never sees the weights in full. Nothing of it can be trained.
    """

    quantise: Quantise

    def split(self, base: Params, names: Params, rng: Array) -> tuple[Params, Params]:
        return self.quantise.split(base, names, rng)[::-1]

    def split_names(self, names: Params) -> tuple[Params, Params]:
        return self.quantise.split_names(names)[::-1]

    def apply(self, trainable: Params, frozen: Params, rng: Array | None = None) -> Params:
        return self.quantise.apply({}, trainable)


def find_quantise(transform: Transform) -> Quantise | None:
    """The part of a transform that quantises, if it has one."""
    parts = transform.transforms if isinstance(transform, Compose) else (transform,)
    return next((part for part in parts if isinstance(part, Quantise)), None)


def without_quantise(transform: Transform) -> Transform:
    """What of a transform is trained: of QLoRA, the LoRA."""
    if not isinstance(transform, Compose):
        return transform
    parts = [part for part in transform.transforms if not isinstance(part, Quantise)]
    return parts[0] if len(parts) == 1 else Compose(parts)


def _is_embedding(path: str) -> bool:
    return path.endswith("/embedding")
