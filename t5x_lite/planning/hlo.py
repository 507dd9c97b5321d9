"""A compiled TPU program's text, and what it says of each operation.

The text is scheduled: operations stand in the order in which they run. Each has the cycles that the
compiler expects of it; loops run as often as their condition says. Collectives between slices are
transfers, `send` and `recv`, which libtpu's runtime carries out; what each slice adds up or gathers
for them is a collective of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from t5x_lite.planning.shapes import elements, on_host, parts

COLLECTIVES: Final = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
TO_HOST: Final = "to the host"
FROM_HOST: Final = "from the host"
SLICE_START: Final = "dynamic-slice-start"
REDUCTIONS: Final = ("all-reduce", "reduce-scatter")
BETWEEN_SLICES: Final = " between slices"  # behind a collective's kind
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
        """Whether it starts a copy between HBM and the host's memory.

        Of an array, `(to, from, ...)`, or of a layer out of a stack, `((from, ...), to, ...)`.
        """
        if self.opcode not in ("copy-start", SLICE_START):
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

    @property
    def rendezvous(self) -> str:
        """What a `send` and a `recv` of one transfer have in common; empty for all others."""
        match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def transfer(self) -> str:
        """The collective between slices that a `send` is part of; empty for all others."""
        match = re.search(r'_xla_megascale_transfer_type="(\w+)"', self.rest)
        if self.opcode != "send" or match is None:
            return ""
        kind = match[1].lower().replace("_", "-")
        return "collective-permute" if kind == "one-to-one" else kind

    @property
    def slices(self) -> int:
        """How many slices take part in a transfer; 0: not said."""
        # "{1,2}x{0:3}", slices and chips of each; or groups of chips, one of each slice.
        match = re.search(r'_xla_megascale_target="?\{+([\d,:]+)\}', self.rest)
        ends = [part.split(":") for part in match[1].split(",")] if match else []
        return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


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
            elif lines:  # what a kernel says of itself has line breaks
                lines[-1] = dataclasses.replace(lines[-1], rest=lines[-1].rest + line)
        return cls(computations, entry)

    def trips(self, loop: Instruction) -> int:
        """How often a loop turns: what its condition compares a counter with, from its start on."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match[1])
        match = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        lines = self.computations[match[1]] if match else ()
        constants = [
            int(found[1])
            for line in lines
            if line.opcode == "constant" and (found := re.match(r"\(?(\d+)\)", line.rest))
        ]
        return max(constants, default=1) - self._start(loop, lines)

    def _start(self, loop: Instruction, condition: tuple[Instruction, ...]) -> int:
        """A loop's counter at first: above 0 where the compiler has taken turns out in front."""
        places = [
            int(found[1])
            for line in condition
            if line.opcode == "get-tuple-element"
            and (found := re.search(r"index=(\d+)", line.rest))
        ]
        state = self._lines.get(loop.operands[0])
        if not places or state is None or state.opcode != "tuple":
            return 0
        line = self._lines.get(state.operands[places[0]])
        while line is not None and line.opcode == "copy":
            line = self._lines.get(line.operands[0])
        found = re.match(r"\(?(\d+)\)", line.rest) if line and line.opcode == "constant" else None
        return int(found[1]) if found else 0

    @functools.cached_property
    def _lines(self) -> Mapping[str, Instruction]:
        """All lines by name, which no two computations have in common."""
        return {line.name: line for lines in self.computations.values() for line in lines}

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
