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
from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite import trees
from t5x_lite.types import Array, Batch, InputError, Params

MESH_AXES = ("data", "fsdp", "model")
HOST: Final = "pinned_host"  # jax's name of the memory that offloading uses
OFFLOADED: Final = ("optimizer",)  # what can be
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

    An axis size of -1 takes the devices that the others leave.
    """

    data: int = -1  # replicas: parameters whole (unless fsdp), batch split
    fsdp: int = 1  # batch split, and parameters split along the embedding
    model: int = 1  # heads, MLP and vocabulary split
    rules: Sequence[tuple[str, AxisRule]] = DEFAULT_RULES
    # What the devices' hosts hold between its uses: "optimizer", the optimizer's state.
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
        for name, axes in self.rules:
            for axis in _as_tuple(axes):
                if axis not in MESH_AXES:
                    raise InputError(
                        f"sharding rule ('{name}', {axes!r}): the mesh has axes {MESH_AXES}, "
                        f"not '{axis}'"
                    )

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The device mesh. Raises InputError if it does not use every device exactly once."""
        sizes = [self.data, self.fsdp, self.model]
        described = _DESCRIBED.get()
        devices = jax.device_count() if described is None else len(described)
        if -1 in sizes:
            others = -math.prod(sizes)
            if devices % others:
                raise InputError(
                    f"mesh data={self.data}, fsdp={self.fsdp}, model={self.model}: the fixed axes "
                    f"take {others} devices, which does not divide the {devices} there are"
                )
            sizes[sizes.index(-1)] = devices // others
        if math.prod(sizes) != devices:
            raise InputError(
                f"mesh {'x'.join(map(str, sizes))} (data x fsdp x model) needs "
                f"{math.prod(sizes)} devices, but this run has {devices} "
                f"({(described or jax.devices())[0].platform}): set one of Partitioner.data, "
                ".fsdp, .model to -1 to take what is left"
            )
        types = (jax.sharding.AxisType.Auto,) * len(sizes)
        try:
            return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=described)
        except NotImplementedError as error:
            places = [device.coords for device in described or jax.devices()]
            sides = "x".join(str(max(side) + 1) for side in zip(*places, strict=True))
            raise InputError(
                f"mesh {'x'.join(map(str, sizes))} (data x fsdp x model): every axis must be a "
                f"side of the slice's torus, {sides}, or a product of sides"
            ) from error

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
        check_host_memory(self.mesh.devices.flat[0])
        return NamedSharding(self.mesh, spec, memory_kind=HOST)

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


_DESCRIBED: contextvars.ContextVar[Sequence[Any] | None] = contextvars.ContextVar(
    "described devices", default=None
)


@contextlib.contextmanager
def described(devices: Sequence[Any]) -> Iterator[None]:
    """Meshes made inside are of these devices, which need not be there: see `planning`."""
    token = _DESCRIBED.set(devices)
    try:
        yield
    finally:
        _DESCRIBED.reset(token)


def check_host_memory(device: Any) -> None:
    """Raises InputError for a device that no array can be offloaded from."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise InputError(
            f"Partitioner.offload: {device} has no memory of kind {HOST}, but {', '.join(kinds)}; "
            "leave offload empty"
        )


def fetched(tree: Params) -> Params:
    """`tree` for computing: its arrays in hosts' memory brought to the devices, the others as is.

    The compiler says when: as early as it likes to hide the copying, where it has the memory.
    """

    def fetch(x: Array) -> Array:
        away = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if away else x

    return jax.tree.map(fetch, tree)


def constrain(x: Array, *names: str | None) -> Array:
    """`x` placed by its axis names; unchanged without an active partitioner, or on one device."""
    partitioner = _ACTIVE.get()
    if partitioner is None or partitioner.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, partitioner.sharding(names, x.shape, f"activation {names}")
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


def local_size(names: Names, shape: Sequence[int]) -> int:
    """How many numbers of an activation one device holds, by the active partitioner's rules."""
    partitioner = _ACTIVE.get()
    if partitioner is None or partitioner.mesh.size == 1:
        return math.prod(shape)
    what = f"activation {tuple(names)}"
    return math.prod(partitioner.sharding(names, shape, what).shard_shape(tuple(shape)))


def _as_tuple(axes: AxisRule) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
