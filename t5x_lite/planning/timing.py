"""What a program takes on a machine, in seconds: see `request.METHOD`.

Collectives run on the links while what stands between their start and their end computes.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from t5x_lite.planning.hlo import (
    BETWEEN_SLICES,
    COLLECTIVES,
    FROM_HOST,
    SLICE_START,
    TO_HOST,
    Instruction,
    Program,
)
from t5x_lite.planning.shapes import elements, hbm_bytes, nbytes, on_host, parts


@dataclass
class Traffic:
    """Collectives of one kind, over all turns of loops; bytes are what a chip sends.

    Copies "to the host" and "from the host" are kinds too, of what goes over PCIe.
    """

    kind: str
    count: float = 0
    sent: float = 0
    seconds: float = 0

    def add(self, other: Traffic, times: float) -> None:
        self.count += times * other.count
        self.sent += times * other.sent
        self.seconds += times * other.seconds


@dataclass
class Times:
    """What a program is expected to take, in seconds."""

    compute: float = 0.0
    exposed: float = 0.0  # waiting for collectives, or the host's memory
    between: float = 0.0  # of that, for those between slices
    network: float = 0.0  # that the network between slices is busy
    by_source: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    traffic: dict[str, Traffic] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    def add(self, other: Times, times: float) -> None:
        self.compute += times * other.compute
        self.exposed += times * other.exposed
        self.between += times * other.between
        self.network += times * other.network
        for source, seconds in other.by_source.items():
            self.by_source[source] += times * seconds
        for kind, traffic in other.traffic.items():
            self.traffic.setdefault(kind, Traffic(kind)).add(traffic, times)


@dataclass(frozen=True)
class Machine:
    """What a program runs on; see `chips.Chip`."""

    clock: float
    flops: float
    hbm_bandwidth: float
    chips: int  # of a slice
    ring_bandwidth: Callable[[int], float]  # of a collective among so many, bytes a second
    slices: int = 1
    dcn_bandwidth: float = math.inf  # of a chip, bytes a second
    host_bandwidth: float = math.inf  # of a chip, bytes a second, each way
    cautious: bool = False

    def seconds(self, program: Program, shapes: Mapping[str, str], line: Instruction) -> float:
        """What an operation takes.

        Products: the compiler's cycles, and no less than their operations at the chip's peak. What
        its cost model does not cover, elementwise loops and copies: bytes to and from HBM at full
        bandwidth, if that is less than the cycles. Kernels: the greater of both rooflines.

        `cautious`: the compiler's cycles for everything, and kernels at half of their rooflines.
        """
        moved = sum(map(hbm_bytes, (line.shape, *(shapes.get(name, "") for name in line.operands))))
        if line.opcode == "custom-call" and "tpu_custom_call" in line.rest:
            roof = max(_kernel_flops(line, shapes) / self.flops, moved / self.hbm_bandwidth)
            return 2 * roof if self.cautious else roof
        least = program.product_flops(line, shapes) / self.flops
        seconds = line.cycles / self.clock
        if not line.modelled and not self.cautious:
            seconds = min(seconds, moved / self.hbm_bandwidth)
        return max(seconds, least)


# Products of length x length x head width that splash attention's kernels make; no tile that its
# mask leaves out is taken off, which stands for what a kernel loses to its softmax.
_SPLASH: Final = (("splash_mha_fwd", 2), ("splash_mha_dkv", 5), ("splash_mha_dq", 3))


def _kernel_flops(line: Instruction, shapes: Mapping[str, str]) -> float:
    """A Pallas kernel's operations: as it says itself, or as is known of it; else 0."""
    if found := re.search(r'"flops":"?(\d+)', line.rest):
        return float(found[1])
    products = next((count for name, count in _SPLASH if line.name.startswith(name)), 0)
    query = max((shapes.get(name, "") for name in line.operands), key=elements, default="")
    sides = re.search(r"\w+\[([\d,]*)\]", query)
    if not products or sides is None:
        return 0.0
    length = [int(side) for side in sides[1].split(",")][-2]
    return 2.0 * products * elements(query) * length


def estimate(program: Program, machine: Machine) -> Times:
    """The program's times on a machine."""
    known: dict[str, Times] = {}

    def of(name: str) -> Times:
        if name not in known:
            known[name] = Times()  # a computation never calls itself
            known[name] = run(program.computations.get(name, ()))
        return known[name]

    def run(lines: tuple[Instruction, ...]) -> Times:
        times, now, network = Times(), 0.0, 0.0
        free: dict[str, float] = {}  # when a way is: the links, to the host, from the host
        ready: dict[str, float] = {}  # when what was started has come, by the start's name
        channels: dict[str, str] = {}  # the start's name, by channel
        arrives: dict[str, float] = {}  # when a transfer between slices has, by its rendezvous
        shapes = {line.name: line.shape for line in lines}
        meetings = {line.name: line.rendezvous for line in lines if line.opcode == "recv"}
        for line in lines:
            if line.opcode == "while":
                turns = of(line.calls[-1])
                times.add(turns, trips := program.trips(line))
                now += trips * turns.total
                # What is on its way meanwhile shares the network with the loop's own transfers.
                arrives = {key: when + trips * turns.network for key, when in arrives.items()}
                continue
            if line.opcode in ("call", "conditional"):
                slowest = max(map(of, line.calls), key=lambda t: t.total, default=Times())
                times.add(slowest, 1)
                now += slowest.total
                continue
            if line.transfer:
                traffic = _transferred(line, shapes, machine)
                times.traffic.setdefault(traffic.kind, Traffic(traffic.kind)).add(traffic, 1)
                times.network += traffic.seconds
                arrives[line.rendezvous] = network = max(network, now) + traffic.seconds
                continue
            if line.opcode == "recv-done":
                meeting = meetings.get(line.operands[0], "")
                if (wait := arrives.pop(meeting, now) - now) > 0:
                    times.exposed += wait
                    times.between += wait
                    times.by_source[f"waiting:{BETWEEN_SLICES}"] += wait
                    now += wait
                continue
            found = program.collective(line) or (line if line.copies_host else None)
            channel = "" if found is None else found.channel
            started = channels.get(channel) if channel else None
            if started is None:  # a done that names its start
                started = next((name for name in line.operands if name in ready), None)
            if started in ready and "-done" in line.name:
                if (wait := ready.pop(started) - now) > 0:
                    times.exposed += wait
                    times.by_source[f"waiting: {short(line.source)}"] += wait
                    now += wait
            elif found is not None and started is None:
                traffic = _sent(found, machine)
                times.traffic.setdefault(traffic.kind, Traffic(traffic.kind)).add(traffic, 1)
                way = "links" if traffic.kind in COLLECTIVES else traffic.kind
                free[way] = link = max(free.get(way, 0.0), now) + traffic.seconds
                if "-start" in line.name:
                    ready[line.name] = link
                    if channel:
                        channels[channel] = line.name
                else:
                    times.exposed += link - now
                    times.by_source[f"waiting: {short(line.source)}"] += link - now
                    now = link
            # Parts of a collective may be fused with products, which run meanwhile.
            seconds = machine.seconds(program, shapes, line)
            times.compute += seconds
            times.by_source[short(line.source)] += seconds
            now += seconds
        return times

    return of(program.entry)


def _sent(line: Instruction, machine: Machine) -> Traffic:
    """What each chip sends in a collective within a slice, or to or from its host, and how long."""
    kind = line.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        copied = parts(line.shape)[line.opcode == SLICE_START]
        kind, size = TO_HOST if on_host(copied) else FROM_HOST, nbytes(copied)
        return Traffic(kind, 1, size, size / machine.host_bandwidth)
    group = line.group or machine.chips
    size = nbytes(_results(line)) * (group if kind == "reduce-scatter" else 1)
    sent, speed = _round(kind, size, group), machine.ring_bandwidth(group)
    if kind == "collective-permute":  # to a neighbour, over one link
        speed = machine.ring_bandwidth(2) / 2
    return Traffic(kind, 1, sent, sent / speed)


def _transferred(line: Instruction, shapes: Mapping[str, str], machine: Machine) -> Traffic:
    """What each chip sends to other slices in a transfer, and how long that takes."""
    kind, slices = line.transfer, line.slices or machine.slices
    size = nbytes(shapes[line.operands[0]]) * (slices if kind == "all-gather" else 1)
    sent = _round(kind, size, slices)
    return Traffic(kind + BETWEEN_SLICES, 1, sent, sent / machine.dcn_bandwidth)


def _round(kind: str, size: int, group: int) -> float:
    """Bytes that each of a group sends round a ring, of a whole of `size`."""
    if kind == "collective-permute":
        return float(size)
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group * size


def _results(line: Instruction) -> str:
    """The shapes that a collective ends with: several arrays go together, as a tuple.

    What starts a gather or an exchange has what it sends in front of them: `(sent, results, ...)`.
    """
    if line.opcode not in ("all-gather-start", "collective-permute-start"):
        return line.shape
    found = parts(line.shape)
    return found[1] if len(found) > 1 else line.shape


def short(source: str) -> str:
    """`jit(train_step)/jvp(Transformer)/decoder/while/body/mlp/wi_0/dot_general` -> its parts."""
    backward = "backward " if "transpose(" in source else ""
    dropped = (
        r"jit\(.*?\)|jvp\(.*?\)+|transpose\(.*|vmap\(.*?\)|while|body|closed_call|checkpoint"
        r"|rematted.*|shard_map"
    )
    named = (part for part in source.split("/") if part and not re.fullmatch(dropped, part))
    kept = [part for part, _ in itertools.groupby(named)]
    return backward + ("/".join(kept[-3:]) or "what XLA adds")
