"""The devices of a run: which they are, in what slices, and what memory they reach."""

from __future__ import annotations

import collections
import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, Final

import jax

from t5x_lite.types import Array, InputError, Params

HOST: Final = "pinned_host"  # jax's name of the memory that offloading uses

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


def by_slice(num_slices: int = -1) -> tuple[tuple[Any, ...], ...]:
    """The run's devices, those of each slice together; see `Partitioner.num_slices`."""
    devices = _DESCRIBED.get() or jax.devices()
    groups: dict[int, list[Any]] = collections.defaultdict(list)
    for device in devices:
        # Of GPUs, too, jax says one, their host: no reason to keep an axis within it.
        own = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        groups[own].append(device)
    found = tuple(tuple(groups[index]) for index in sorted(groups))
    platform = devices[0].platform
    if len({len(part) for part in found}) > 1:
        raise InputError(
            f"this run's slices have {', '.join(str(len(part)) for part in found)} devices: "
            "expected as many in each"
        )
    if num_slices in (-1, len(found)):
        return found
    if len(found) > 1 or platform == "tpu":
        raise InputError(
            f"Partitioner.num_slices={num_slices}, but this run's devices say that they are in "
            f"{len(found)} slice(s): leave it at -1, which takes what they say"
        )
    count = len({device.process_index for device in devices})
    if len(devices) % num_slices or (count > 1 and count % num_slices):
        raise InputError(
            f"Partitioner.num_slices={num_slices}: expected a divisor of "
            + (f"the {count} processes" if count > 1 else f"the {len(devices)} devices")
            + f" ({platform}) that are to be cut into slices"
        )
    order = sorted(devices, key=lambda device: (device.process_index, device.id))
    size = len(order) // num_slices
    return tuple(tuple(order[i : i + size]) for i in range(0, len(order), size))


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
