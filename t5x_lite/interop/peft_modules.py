"""Which module of a Hugging Face model each kernel of ours is, as its adapters see it.

PEFT keeps `lora_A.weight [rank, in]` and `lora_B.weight [out, rank]` for a module; ours are
`a [*in, rank]` and `b [rank, *out]` for a kernel, stacked along the layers. The name maps of
`load_hf` say which kernel is which module, so whatever has one there has adapters too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t5x_lite.interop.axes import Axes
from t5x_lite.interop.name_maps import Architecture
from t5x_lite.models.config import ModelConfig


@dataclass(frozen=True)
class Slot:
    """One layer of one of our kernels, and its place in a module of theirs.

    Several slots share a module where theirs is fused: GPT-2's `c_attn` is query, key and value.
    """

    path: str
    layer: int | None  # None: the kernel is outside of the layers
    module: str
    inputs: tuple[int, ...]  # shape
    outputs: tuple[int, ...]
    a_axes: Axes  # of `[*in, rank]` in `[rank, in]`
    b_axes: Axes  # of `[rank, *out]` in `[out, rank]`
    transposed: bool  # their weight is [in, out]: PEFT's fan_in_fan_out

    def a(self, theirs: np.ndarray) -> np.ndarray:
        """`a [*in, rank]` as a view of `lora_A.weight [rank, in]`."""
        return self.a_axes.view(theirs, (*self.inputs, theirs.shape[0]))

    def b(self, theirs: np.ndarray) -> np.ndarray:
        """`b [rank, *out]` as a view of `lora_B.weight [out, rank]`: of a fused one, its part."""
        return self.b_axes.view(theirs, (theirs.shape[1], *self.outputs))

    def their_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `lora_A.weight` and `lora_B.weight`."""
        return (
            self.a_axes.their_shape((*self.inputs, rank)),
            self.b_axes.their_shape((rank, *self.outputs)),
        )


def slots(
    architecture: Architecture,
    config: ModelConfig,
    base: str,
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, Sequence[str | None]],
) -> dict[str, list[Slot]]:
    """The slots of each module, in order of the name map; `base` is the class's prefix.

    `shapes` and `names` (of axes) are those of the model's parameters, by path.
    """
    found: dict[str, list[Slot]] = {}
    for rule in architecture.rules(config):
        if rule.path not in shapes or not rule.path.endswith("/kernel"):
            continue
        shape, axes = shapes[rule.path], tuple(names[rule.path])
        if rule.stacked:
            shape, axes = shape[1:], axes[1:]
        count = 2 if axes[0] == "heads" else 1  # axes that the kernel contracts
        layout = rule.layout(shape)
        inputs, outputs = layout.ours[:count], layout.ours[count:]
        their_inputs, their_outputs = layout.theirs
        transposed = set(inputs) <= set(their_inputs)
        if not transposed:
            their_inputs, their_outputs = their_outputs, their_inputs
        a_axes = Axes((*inputs, "rank"), (("rank",), their_inputs))
        b_axes = Axes(("rank", *outputs), (their_outputs, ("rank",)))
        for layer in range(shapes[rule.path][0]) if rule.stacked else (None,):
            weight = rule.name.replace("{base}", base).replace("{layer}", str(layer))
            module = weight.removesuffix(".weight")
            found.setdefault(module, []).append(
                Slot(
                    rule.path,
                    layer,
                    module,
                    shape[:count],
                    shape[count:],
                    a_axes,
                    b_axes,
                    transposed,
                )
            )
    return found
