"""TPU chips and slices: what they have, and their description for the compiler.

Figures: Google Cloud's pages of TPU v4, v5e, v5p and v6e; bandwidth of memory and links also "How
to Scale Your Model" (Austin et al. 2025), whose links are those that a program can reach, and which
reckons with 15 GB/s a chip over PCIe. The data-centre network (DCN): that book, too, and Google's
pages of v5e, v5p and v6e (6.4 and 25.6 Tbit/s for 256 chips of v5e and v6e, 50 Gbit/s for one of
v5p); v4's is the book's 25 GB/s of a host over four chips.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from t5x_lite.planning.timing import Machine
from t5x_lite.types import InputError


@dataclass(frozen=True)
class Chip:
    """One chip."""

    flops: float  # of bfloat16 products, a second
    clock: float  # cycles a second, of its tensor cores
    hbm_bytes: int
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second over one link of the torus, one way
    dcn_bandwidth: float  # bytes a second that it sends out of its slice, one way
    options: tuple[tuple[str, str], ...] = ()  # what the compiler is told of it
    host_bandwidth: float = 1.5e10  # bytes a second to its host over PCIe, and as many back


CHIPS: Final = {
    "v4": Chip(
        275e12, 1.05e9, 32 * 2**30, 1.2e12, 4.5e10, 6.25e9, (("chip_config_name", "megacore"),)
    ),
    "v5e": Chip(197e12, 1.5e9, 16 * 2**30, 8.1e11, 4.5e10, 3.125e9),
    "v5p": Chip(
        459e12, 1.75e9, 95 * 2**30, 2.8e12, 9e10, 6.25e9, (("chip_config_name", "megacore"),)
    ),
    "v6e": Chip(918e12, 1.75e9, 32 * 2**30, 1.6e12, 9e10, 1.25e10),
}


@dataclass(frozen=True)
class Slice:
    """Chips of one kind on a torus, or several such slices on DCN: `Slice.parse("v5e:4x4", 2)`."""

    kind: str
    shape: tuple[int, ...]
    count: int = 1

    @classmethod
    def parse(cls, name: str, count: int = 1) -> Slice:
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
        if match is None or match[1] not in CHIPS:
            raise InputError(
                f"topology '{name}': expected a chip and the sides of its slice, such as v5e:4x4 "
                f"or v4:4x4x4 (several such slices: --num_slices); chips: {', '.join(CHIPS)}"
            )
        if count < 1:
            raise InputError(f"num_slices={count}: expected a positive number")
        return cls(match[1], tuple(map(int, match[2].split("x"))), count)

    @property
    def topology(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.topology if self.count == 1 else f"{self.count} slices of {self.topology}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Chips, of all slices together."""
        return self.count * math.prod(self.shape)

    @property
    def machine(self) -> Machine:
        """What programs are timed on."""
        chip = self.chip
        return Machine(
            clock=chip.clock,
            flops=chip.flops,
            hbm_bandwidth=chip.hbm_bandwidth,
            chips=self.size // self.count,
            ring_bandwidth=self.ring_bandwidth,
            slices=self.count,
            dcn_bandwidth=chip.dcn_bandwidth,
            host_bandwidth=chip.host_bandwidth,
        )

    def ring_bandwidth(self, chips: int) -> float:
        """Bytes a second that a chip sends in a collective among so many of a slice.

        Both ways round a ring, on as many axes of the torus as it takes to reach them all.
        """
        reached, axes = 1, 0
        for side in sorted(self.shape, reverse=True):
            if reached < chips:
                reached, axes = reached * side, axes + 1
        return 2 * max(axes, 1) * self.chip.link_bandwidth

    def devices(self) -> Sequence[Any]:
        """The devices as the compiler knows them. Raises InputError without libtpu."""
        # No TPU is asked for: there is none.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        from jax.experimental import topologies

        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=self.topology, **self._options()
            )
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"topology '{self}' is not to be had ({reason}): libtpu compiles for it, "
                "pip install 't5x_lite[plan]', and knows the slices that Google rents out"
            ) from error
        devices: Sequence[Any] = described.devices
        return devices

    def _options(self) -> dict[str, Any]:
        several = {} if self.count == 1 else {"num_slices": self.count}
        return {**dict(self.chip.options), **several}
