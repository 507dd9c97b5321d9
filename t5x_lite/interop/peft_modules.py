"""Which module of a Hugging Face model each kernel of ours is, as its adapters see it.

PEFT keeps `lora_A.weight [rank, in]` and `lora_B.weight [out, rank]` for a module; ours are
`a [*in, rank]` and `b [rank, *out]` for a kernel, stacked along the layers. The name maps of
`load_hf` say which kernel is which module, so whatever has one there has adapters too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t5x_lite.interop import choice
from t5x_lite.interop.axes import Axes
from t5x_lite.interop.name_maps import Architecture
from t5x_lite.interop.t5x import shapes_and_names
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.transformer import Transformer


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
    in_axes: Axes  # of `[*in]` in `[in]`
    out_axes: Axes  # of `[*out]` in `[out]`
    transposed: bool  # their weight is [in, out]: PEFT's fan_in_fan_out

    def a(self, theirs: np.ndarray) -> np.ndarray:
        """`a [*in, rank]` as a view of `lora_A.weight [rank, in]`."""
        return self.a_axes.view(theirs, (*self.inputs, theirs.shape[0]))

    def b(self, theirs: np.ndarray) -> np.ndarray:
        """`b [rank, *out]` as a view of `lora_B.weight [out, rank]`: of a fused one, its part."""
        return self.b_axes.view(theirs, (theirs.shape[1], *self.outputs))

    def over_inputs(self, theirs: np.ndarray) -> np.ndarray:
        """`[*in]` as a view of a number for each input, `[in]`."""
        return self.in_axes.view(theirs, self.inputs)

    def over_outputs(self, theirs: np.ndarray) -> np.ndarray:
        """`[*out]` as a view of a number for each output, `[out]`: of a fused one, its part."""
        return self.out_axes.view(theirs, self.outputs)

    @property
    def at(self) -> tuple[int, ...]:
        """Where the layer is in a leaf of ours."""
        return () if self.layer is None else (self.layer,)

    @property
    def sizes(self) -> tuple[int, int]:
        """The module's inputs and outputs, all fused parts together."""
        (inputs,) = self.in_axes.their_shape(self.inputs)
        (outputs,) = self.out_axes.their_shape(self.outputs)
        return inputs, outputs

    def their_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `lora_A.weight` and `lora_B.weight`."""
        return (
            self.a_axes.their_shape((*self.inputs, rank)),
            self.b_axes.their_shape((rank, *self.outputs)),
        )


@dataclass(frozen=True)
class Modules:
    """The slots of a model's modules, and what its parameters are."""

    model_type: str
    slots: Mapping[str, list[Slot]]
    shapes: Mapping[str, tuple[int, ...]]  # by path
    names: Mapping[str, tuple[str, ...]]

    def empty(self, slot: Slot, *shape: int, fill: float = 0.0) -> np.ndarray:
        """A leaf for all layers of a slot's kernel."""
        stack = () if slot.layer is None else self.shapes[slot.path][:1]
        return np.full((*stack, *shape), fill, np.float32)

    def unknown(self, found: Iterable[str]) -> list[str]:
        """Says of each module that is not there."""
        return [f"the model has no module '{name}'" for name in found if name not in self.slots]

    def adapting(self, paths: Iterable[str]) -> dict[str, list[Slot]]:
        """The slots of these kernels, by module."""
        wanted = set(paths)
        found = {
            module: [slot for slot in parts if slot.path in wanted]
            for module, parts in self.slots.items()
        }
        return {module: parts for module, parts in found.items() if parts}


def find_modules(
    config: ModelConfig, architectures: Sequence[Architecture], wanted: Iterable[str] | None = None
) -> Modules:
    """Under the names of the class that a model is saved as, or that has most of those wanted."""
    architecture, settings = choice.choose(config, architectures)
    structs, names = shapes_and_names(Transformer(config))
    shapes = {path: tuple(struct.shape) for path, struct in structs.items()}
    declared = architecture.classes[settings["architectures"][0]]
    bases = [declared]
    if wanted is not None:
        bases += architecture.classes.values()
    tables = [slots(architecture, config, base, shapes, names) for base in dict.fromkeys(bases)]
    asked = set(wanted or ())
    table = max(tables, key=lambda table: len(asked & set(table)))
    return Modules(architecture.model_type, table, shapes, names)


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
        in_axes, out_axes = Axes(inputs, (their_inputs,)), Axes(outputs, (their_outputs,))
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
                    in_axes,
                    out_axes,
                    transposed,
                )
            )
    return found
