"""A compiled TPU program's text: where its time goes, by the compiler's own cycles.

The text is scheduled: operations stand in the order in which they run. Each has the cycles that the
compiler expects of it; loops run as often as their condition says; collectives run on the links
while what stands between their start and their end computes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from t5x_lite.planning.shapes import elements, hbm_bytes, nbytes, on_host, parts

COLLECTIVES: Final = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
TO_HOST: Final = "to the host"
FROM_HOST: Final = "from the host"
REDUCTIONS: Final = ("all-reduce", "reduce-scatter")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str  # of its result, as text
    rest: str  # operands and attributes

    @property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", _balanced(self.rest)))

    @property
    def calls(self) -> tuple[str, ...]:
        """Computations that it runs, a loop's body last."""
        found = re.findall(r"(?:calls|to_apply|condition|body)=%?([\w.\-]+)", self.rest)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return (*found, *(re.findall(r"%?([\w.\-]+)", branches[1]) if branches else ()))

    @property
    def cycles(self) -> float:
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        # More than any program has: the compiler's way to say that it does not know.
        return float(match[1]) if match and len(match[1]) < 15 else 0.0

    @property
    def modelled(self) -> bool:
        """Whether the compiler's cost model stands behind the cycles, or they are a guess."""
        return "COST_MODEL_TYPE_INVALID" not in self.rest

    @property
    def copies_host(self) -> bool:
        """Whether it starts a copy between HBM and the host's memory: `(to, from, ...)`."""
        if self.opcode != "copy-start":
            return False
        return sum(map(on_host, parts(self.shape)[:2])) == 1

    @property
    def source(self) -> str:
        """The path of the operation in the program that was traced."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def channel(self) -> str:
        match = re.search(r"channel_id=(\d+)", self.rest)
        return match[1] if match else ""

    @property
    def group(self) -> int:
        """How many chips take part in each group of a collective; 0: not said."""
        if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", self.rest):
            return int(match[2])
        if match := re.search(r"replica_groups=\{\{([\d,]*)\}", self.rest):
            return len(match[1].split(","))
        if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", self.rest):
            sides = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
            return math.prod(int(sides[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
        return 0


@dataclass(frozen=True)
class Program:
    """Computations by name, and which is run."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        computations: dict[str, tuple[Instruction, ...]] = {}
        entry, name, lines = "", "", list[Instruction]()
        for line in text.splitlines():
            if head := _HEAD.match(line):
                name, lines = head[2], []
                entry = name if head[1] else entry
            elif line == "}":
                computations[name] = tuple(lines)
            elif found := _INSTRUCTION.match(line):
                shape, opcode, rest = _split(found[2])
                lines.append(Instruction(found[1], opcode, shape, rest))
        return cls(computations, entry)

    def trips(self, loop: Instruction) -> int:
        """How often a loop turns: what its condition compares a counter from 0 with."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match[1])
        match = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        lines = self.computations[match[1]] if match else ()
        constants = [
            int(found[1])
            for line in lines
            if line.opcode == "constant" and (found := re.match(r"\(?(\d+)\)", line.rest))
        ]
        return max(constants, default=1)

    def product_flops(self, line: Instruction, shapes: Mapping[str, str]) -> float:
        """Operations of the matrix products in an operation; of batches of them, not known: 0."""
        total = 0.0
        if line.opcode in ("fusion", "async-start"):
            for name in line.calls:
                inner = self.computations.get(name, ())
                own = {part.name: part.shape for part in inner}
                total += sum(self.product_flops(part, own) for part in inner)
        elif line.opcode in ("dot", "convolution") and "window=" not in line.rest:
            three = [line.shape, *(shapes.get(name, "") for name in line.operands[:2])]
            # m n, m k and k n: the root of their product is m n k.
            total = 2 * math.sqrt(math.prod(map(elements, three)))
        return total

    def collective(self, line: Instruction) -> Instruction | None:
        """The collective that an operation is, starts, or has inside."""
        if line.opcode.removesuffix("-start") in COLLECTIVES:
            return line
        if line.opcode in ("fusion", "async-start", "custom-call"):
            for name in line.calls:
                for inner in self.computations.get(name, ()):
                    if (found := self.collective(inner)) is not None:
                        return found
        return None


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
    chips: int
    ring_bandwidth: Callable[[int], float]  # of a collective among so many, bytes a second
    host_bandwidth: float = math.inf  # bytes a second, each way
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
        times, now = Times(), 0.0
        free: dict[str, float] = {}  # when a way is: the links, to the host, from the host
        ready: dict[str, float] = {}  # when what was started has come, by the start's name
        channels: dict[str, str] = {}  # the start's name, by channel
        shapes = {line.name: line.shape for line in lines}
        for line in lines:
            if line.opcode == "while":
                turns = of(line.calls[-1])
                times.add(turns, trips := program.trips(line))
                now += trips * turns.total
                continue
            if line.opcode in ("call", "conditional"):
                slowest = max(map(of, line.calls), key=lambda t: t.total, default=Times())
                times.add(slowest, 1)
                now += slowest.total
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
                traffic, seconds = _sent(found, machine)
                times.traffic.setdefault(traffic.kind, Traffic(traffic.kind)).add(traffic, 1)
                way = "links" if traffic.kind in COLLECTIVES else traffic.kind
                free[way] = link = max(free.get(way, 0.0), now) + seconds
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


def _sent(line: Instruction, machine: Machine) -> tuple[Traffic, float]:
    """What each chip sends round a ring in a collective, or to or from its host, and how long."""
    kind = line.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        copied = parts(line.shape)[0]
        kind, size = TO_HOST if on_host(copied) else FROM_HOST, nbytes(copied)
        return Traffic(kind, 1, size, size / machine.host_bandwidth), size / machine.host_bandwidth
    group = line.group or machine.chips
    size = nbytes(_results(line)) * (group if kind == "reduce-scatter" else 1)
    if kind == "collective-permute":  # to a neighbour, over one link
        sent, speed = float(size), machine.ring_bandwidth(2) / 2
    else:
        share = (group - 1) / group
        sent = (2 if kind == "all-reduce" else 1) * share * size
        speed = machine.ring_bandwidth(group)
    return Traffic(kind, 1, sent, sent / speed), sent / speed


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
    dropped = r"jit\(.*?\)|jvp\(.*?\)+|transpose\(.*|while|body|closed_call|checkpoint|rematted.*"
    kept = [part for part in source.split("/") if part and not re.fullmatch(dropped, part)]
    return backward + ("/".join(kept[-3:]) or "what XLA adds")


def _split(text: str) -> tuple[str, str, str]:
    """`bf16[2,3]{1,0} fusion(%a, %b), kind=kLoop` -> shape, opcode, the rest from `(` on."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character == " ":
            match = _OPCODE.match(text, place)
            if match:
                return text[:place], match[1], text[match.end() - 1 :]
    return text, "", ""


def _balanced(text: str) -> str:
    """The parenthesis that `text` begins with."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: place + 1]
    return text
