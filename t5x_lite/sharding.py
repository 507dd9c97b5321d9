"""Where arrays live: logical axis names -> mesh axes -> `NamedSharding`.

Modules name their axes and know nothing of meshes. One rule table says on which mesh axes a
logical axis is split; everything else follows: the shardings of parameters, optimizer state and
batches, and the few constraints on activations.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite import devices, trees
from t5x_lite.types import Array, Batch, InputError, Params

MESH_AXES = ("data", "fsdp", "model")
OFFLOADED: Final = ("optimizer", "frozen")  # what can be
AxisRule = str | tuple[str, ...] | None
Names = Sequence[str | None]

# Parameters are split over `fsdp` along the embedding and over `model` along heads, MLP and
# vocabulary (Megatron's pairing: one all-reduce a block). Activations keep the embedding whole,
# because `fsdp` already splits their batch.
DEFAULT_RULES: tuple[tuple[str, AxisRule], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("heads", "model"),
    ("mlp", "model"),
    ("embed", "fsdp"),
    ("kv", None),
    ("layers", None),
    ("rank", None),
    ("buckets", None),
    ("labels", None),
    ("places", None),
    ("types", None),
    ("length", None),
    ("activation_embed", None),
)


@dataclass(frozen=True, kw_only=True)
class Partitioner:
    """A mesh `(data, fsdp, model)` over all devices of the run, and the rules that fill it.

    An axis size of -1 takes the devices that the others leave. Devices in several slices, each of
    which has fast links inside and only the data-centre network to the others, are blocks of `data`
    one after another: fsdp and model stay within a slice, and so does what is sent for them.
    """

    data: int = -1  # replicas: parameters whole (unless fsdp), batch split
    fsdp: int = 1  # batch split, and parameters split along the embedding
    model: int = 1  # heads, MLP and vocabulary split
    num_slices: int = -1  # -1: those that the devices say they are in, or else one; see `by_slice`
    rules: Sequence[tuple[str, AxisRule]] = DEFAULT_RULES
    # What the devices' hosts hold between its uses: "optimizer", the optimizer's state; "frozen",
    # the kernels and embeddings that a transform freezes.
    offload: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.offload, str) or set(self.offload) - set(OFFLOADED):
            raise InputError(
                f"Partitioner.offload={self.offload!r}: expected a tuple, of {OFFLOADED}"
            )
        sizes = (self.data, self.fsdp, self.model)
        if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(
                f"mesh data={self.data}, fsdp={self.fsdp}, model={self.model}: sizes must be "
                "positive, and at most one of them -1 (the devices that are left)"
            )
        if self.num_slices != -1 and self.num_slices < 1:
            raise InputError(
                f"Partitioner.num_slices={self.num_slices}: expected a positive number, or -1, "
                "which takes what the devices say"
            )
        for name, axes in self.rules:
            for axis in _as_tuple(axes):
                if axis not in MESH_AXES:
                    raise InputError(
                        f"sharding rule ('{name}', {axes!r}): the mesh has axes {MESH_AXES}, "
                        f"not '{axis}'"
                    )

    @functools.cached_property
    def by_slice(self) -> tuple[tuple[Any, ...], ...]:
        """The run's devices, those of each slice together. Raises InputError; see `num_slices`.

        TPUs say which slice they are in. Other devices, virtual ones too, are cut into `num_slices`
        equal parts in the order of their processes, and no process is on both sides of a cut.
        """
        return devices.by_slice(self.num_slices)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The device mesh. Raises InputError if it does not use every device exactly once."""
        sizes = [self.data, self.fsdp, self.model]
        slices = self.by_slice
        count = sum(map(len, slices))
        if -1 in sizes:
            others = -math.prod(sizes)
            if count % others:
                raise InputError(
                    f"mesh data={self.data}, fsdp={self.fsdp}, model={self.model}: the fixed axes "
                    f"take {others} devices, which does not divide the {count} there are"
                )
            sizes[sizes.index(-1)] = count // others
        shape = "x".join(map(str, sizes))
        if math.prod(sizes) != count:
            raise InputError(
                f"mesh {shape} (data x fsdp x model) needs "
                f"{math.prod(sizes)} devices, but this run has {count} "
                f"({slices[0][0].platform}): set one of Partitioner.data, "
                ".fsdp, .model to -1 to take what is left"
            )
        if sizes[0] % len(slices):
            raise InputError(
                f"mesh {shape} (data x fsdp x model): its devices are {len(slices)} slices of "
                f"{len(slices[0])}, over which data alone runs, and {sizes[0]} does not divide by "
                f"{len(slices)}: set Partitioner.data={len(slices)}, or a multiple of it, and "
                ".fsdp or .model to -1"
            )
        # By slice and along data, as create_hybrid_device_mesh of jax's mesh_utils does; but that
        # asks devices where they are, and only TPUs know.
        types = (jax.sharding.AxisType.Auto,) * len(sizes)
        inner = (sizes[0] // len(slices), *sizes[1:])
        try:
            meshes = [
                jax.make_mesh(inner, MESH_AXES, axis_types=types, devices=part).devices
                for part in slices
            ]
        except NotImplementedError as error:
            places = [device.coords for device in slices[0]]
            sides = "x".join(str(max(side) + 1) for side in zip(*places, strict=True))
            raise InputError(
                f"mesh {'x'.join(map(str, inner))} (data x fsdp x model) of a slice: every axis "
                f"must be a side of the slice's torus, {sides}, or a product of sides"
            ) from error
        return Mesh(np.concatenate(meshes), MESH_AXES, axis_types=types)

    def spec(self, names: Names, shape: Sequence[int] | None = None, what: str = "array") -> Any:
        """The `PartitionSpec` for axes named `names` (None: not split).

        With `shape`, also checks that every dimension divides. Raises InputError for a name without
        a rule, two dimensions on one mesh axis, or a dimension that does not divide.
        """
        table = dict(reversed(tuple(self.rules)))  # the first rule of a name wins
        entries: list[Any] = []
        used: dict[str, str] = {}
        for index, name in enumerate(names):
            if name is None:
                entries.append(None)
                continue
            if name not in table:
                raise InputError(
                    f"{what} has an axis '{name}' without a sharding rule; rules exist for "
                    + ", ".join(table)
                )
            # An axis of size one splits nothing: leaving it out keeps specs easy to read.
            axes = tuple(a for a in _as_tuple(table[name]) if self.mesh.shape[a] > 1)
            for axis in axes:
                if axis in used:
                    raise InputError(
                        f"{what}: axes '{used[axis]}' and '{name}' are both split over mesh axis "
                        f"'{axis}'; change one of the two rules"
                    )
                used[axis] = name
            parts = math.prod(self.mesh.shape[axis] for axis in axes)
            if shape is not None and shape[index] % parts:
                raise InputError(
                    f"{what}: axis '{name}' of size {shape[index]} does not divide over "
                    f"{parts} devices (mesh {dict(self.mesh.shape)}, axes {axes}); use a mesh "
                    f"whose '{' x '.join(axes)}' size divides {shape[index]}"
                )
            entries.append(axes[0] if len(axes) == 1 else (axes or None))
        return PartitionSpec(*entries)

    def sharding(
        self, names: Names, shape: Sequence[int] | None = None, what: str = "array"
    ) -> NamedSharding:
        """`NamedSharding` of the spec for `names`; see `spec` for the errors."""
        return NamedSharding(self.mesh, self.spec(names, shape, what))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def between_uses(self, what: str, spec: PartitionSpec) -> NamedSharding:
        """The sharding of arrays of `what`, one of `OFFLOADED`, while nothing computes with them.

        In the hosts' memory if `offload` has it. Raises InputError for devices that reach none.
        """
        if what not in self.offload:
            return NamedSharding(self.mesh, spec)
        devices.check_host_memory(self.mesh.devices.flat[0])
        return NamedSharding(self.mesh, spec, memory_kind=devices.HOST)

    def at_hand(self) -> Partitioner:
        """The same mesh with nothing offloaded: for weights that are merged, asked or served."""
        if not self.offload:
            return self
        found = replace(self, offload=())
        found.__dict__["mesh"] = self.mesh
        return found

    @property
    def batch_sharding(self) -> NamedSharding:
        """For `[batch, length]` arrays: rows split over the data axes."""
        return self.sharding(("batch", None))

    @property
    def batch_shards(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return math.prod(
            self.mesh.shape[a] for a in _as_tuple(dict(reversed(tuple(self.rules)))["batch"])
        )

    def tree_shardings(self, shapes: Params, names: Params) -> Params:
        """Shardings for a tree of shape structs, from a like tree of name tuples."""
        flat_names = trees.flatten(names, is_leaf=lambda x: isinstance(x, tuple))
        return trees.map_with_path(
            lambda path, x: self.sharding(flat_names[path], x.shape, f"parameter '{path}'"), shapes
        )

    def check_batch_size(self, batch_size: int, microbatches: int = 1) -> None:
        """Raises InputError unless the rows divide over microbatches and data devices."""
        need = self.batch_shards * microbatches
        if batch_size % need:
            near = max(need, round(batch_size / need) * need)
            raise InputError(
                f"batch_size={batch_size} is not divisible by {need} ({self.batch_shards} data "
                f"devices x {microbatches} microbatches); the nearest that is: {near}"
            )

    def local_rows(self, batch_size: int) -> slice:
        """The rows of a global batch that this process has to load.

        Processes that hold the same rows on different `model` shards load the same rows. Raises
        InputError where a process's rows are not one contiguous range.
        """
        index_map = self.batch_sharding.addressable_devices_indices_map((batch_size, 1))
        bounds = sorted({index[0].indices(batch_size)[:2] for index in index_map.values()})
        rows = slice(bounds[0][0], bounds[-1][1])
        if sum(stop - start for start, stop in bounds) != rows.stop - rows.start:
            raise InputError(
                "this mesh gives a process rows that are not next to each other; order the mesh "
                "so that each process's devices are neighbours along the data axes"
            )
        return rows

    def put_batch(self, batch: Batch, batch_size: int) -> dict[str, jax.Array]:
        """Global sharded arrays from this process's rows `[local rows, length]`."""
        return {
            key: jax.make_array_from_process_local_data(
                self.batch_sharding, np.asarray(value), (batch_size, *value.shape[1:])
            )
            for key, value in batch.items()
        }

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """While tracing inside, `constrain` places activations by this partitioner's rules."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


_ACTIVE: contextvars.ContextVar[Partitioner | None] = contextvars.ContextVar(
    "partitioner", default=None
)


def constrain(x: Array, *names: str | None) -> Array:
    """`x` placed by its axis names; unchanged without an active partitioner, or on one device."""
    partitioner = _ACTIVE.get()
    if partitioner is None or partitioner.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, partitioner.sharding(names, x.shape, f"activation {names}")
    )


def whole(x: Array, axis: int) -> Array:
    """`x` with one axis whole on every device; the compiler says how the others are split."""
    partitioner = _ACTIVE.get()
    if partitioner is None or partitioner.mesh.size == 1:
        return x
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(partitioner.mesh, PartitionSpec(*spec))
    )


def on_shards(
    function: Callable[..., Array], inputs: Sequence[Names], output: Names
) -> Callable[..., Array]:
    """`function` of each device's shards, named as for `constrain`: for kernels, which XLA can't
    divide. Unchanged without an active partitioner, or on one device.
    """
    partitioner = _ACTIVE.get()
    if partitioner is None or partitioner.mesh.size == 1:
        return function
    mapped: Callable[..., Array] = jax.shard_map(
        function,
        mesh=partitioner.mesh,
        in_specs=tuple(partitioner.spec(names) for names in inputs),
        out_specs=partitioner.spec(output),
        check_vma=False,
    )
    return mapped


def platform() -> str:
    """Of the devices that programs are compiled for: "cpu", "gpu" or "tpu"."""
    partitioner = _ACTIVE.get()
    if partitioner is None:
        return jax.default_backend()
    found: str = partitioner.mesh.devices.flat[0].platform
    return found


def splits(*names: str) -> bool:
    """Whether the active partitioner's rules split any of these axes over several devices.

    Raises InputError for a name without a rule.
    """
    partitioner = _ACTIVE.get()
    return partitioner is not None and any(partitioner.spec((name,))[0] for name in names)


def local_size(names: Names, shape: Sequence[int]) -> int:
    """How many numbers of an activation one device holds, by the active partitioner's rules."""
    partitioner = _ACTIVE.get()
    if partitioner is None or partitioner.mesh.size == 1:
        return math.prod(shape)
    what = f"activation {tuple(names)}"
    return math.prod(partitioner.sharding(names, shape, what).shard_shape(tuple(shape)))


def local_bytes(leaf: Any) -> int:
    """Bytes of one device's shard of an array or shape struct with a sharding."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * int(leaf.dtype.itemsize)


def _as_tuple(axes: AxisRule) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
