"""Where a compiled program's time goes on the CPU, by operation: from a trace of a few runs.

XLA:CPU has several operations under way at once, and divides large ones among its threads. So a
moment counts for all that are under way, in equal parts, and seconds add up to the program's.
"""

from __future__ import annotations

import collections
import glob
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import jax
from rich.table import Table

from t5x_lite.planning import hlo

CONTROL: Final = ("while", "call", "conditional")  # what is in them counts
# An operation, or a fusion of several, is of the first kind that one of its own names.
KINDS: Final = {
    **dict.fromkeys(("dot", "convolution"), "product"),
    **dict.fromkeys(hlo.COLLECTIVES, "collective"),
    **dict.fromkeys(("gather", "scatter", "sort"), "gather, scatter, sort"),
    **dict.fromkeys(("reduce", "reduce-window"), "reduction"),
    "dynamic-update-slice": "write to a stack",
    "dynamic-slice": "read from a stack",
}
MOVES: Final = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "reshape"),
    *("copy", "transpose", "broadcast", "slice", "concatenate", "pad", "reverse"),
}


@dataclass(frozen=True)
class Cost:
    """Operations of one kind at one place of the model, in one run of the program."""

    place: str
    kind: str
    shape: str  # of products: mxkxn, for [m, k] by [k, n]
    count: float  # how often they run
    seconds: float
    gigaflop: float  # of products


def measure(
    compiled: Any, run: Callable[[], Any], place: Callable[[str], str], runs: int = 3
) -> list[Cost]:
    """What `run`, which runs the compiled program once, spends where; the dearest first.

    `place` names the place that an operation's path in the traced program belongs to. What the
    threads wait, or spend outside of the program, is the last.
    """
    text = compiled.as_text()
    module = re.match(r"HloModule ([\w.\-]+)", text)
    assert module is not None, "a program's text opens with its name"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(run())
        (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        found = spans(jax.profiler.ProfileData.from_file(path), module[1])
    operations = _operations(hlo.Program.parse(text), place)
    leaves = [span for span in found if operations[span[0]].kind not in CONTROL]
    seconds, idle = share(leaves)
    count = collections.Counter(name for name, *_ in leaves)
    rows: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0.0] * 3)
    for name, spent in seconds.items():
        one = operations[name]
        row = rows[one.place, one.kind, one.shape]
        for column, value in enumerate((count[name], spent, count[name] * one.gigaflop)):
            row[column] += value / runs
    costs = [Cost(*key, *values) for key, values in rows.items()]
    costs.sort(key=lambda cost: -cost.seconds)
    return [*costs, Cost("nothing under way", "", "", 0, idle / runs, 0)]


@dataclass(frozen=True)
class _Operation:
    place: str
    kind: str
    shape: str
    gigaflop: float


def _operations(program: hlo.Program, place: Callable[[str], str]) -> dict[str, _Operation]:
    found = {}
    for lines in program.computations.values():
        own = products(lines)
        for line in lines:
            parts, made = [line.opcode], [own[line.name]] if line.name in own else []
            if line.opcode == "fusion":
                inner = [program.computations[name] for name in line.calls]
                parts = [part.opcode for one in inner for part in one]
                made = [sides for one in inner for sides in products(one).values()]
            found[line.name] = _Operation(
                place(line.source),
                line.opcode if line.opcode in CONTROL else kind(parts),
                " + ".join(f"{b} of " * (b > 1) + f"{m}x{k}x{n}" for b, m, k, n in made),
                sum(2 * math.prod(sides) for sides in made) / 1e9,
            )
    return found


def kind(opcodes: Iterable[str]) -> str:
    """Of an operation that is made of all these."""
    opcodes = {*opcodes}
    named = (name for opcode, name in KINDS.items() if opcode in opcodes)
    return next(named, "copy" if opcodes <= MOVES else "elementwise")


def products(lines: Iterable[hlo.Instruction]) -> dict[str, tuple[int, int, int, int]]:
    """Batch, m, k and n of the matrix products of a computation, by name."""
    shapes = {line.name: sides_of(line.shape) for line in lines}
    found = {}
    for line in lines:
        if line.opcode == "dot":
            left, right = (shapes[name] for name in line.operands[:2])
            batch = math.prod(left[i] for i in dims_of(line, "lhs_batch_dims"))
            inner = math.prod(left[i] for i in dims_of(line, "lhs_contracting_dims"))
            m, n = (math.prod(sides) // (batch * inner) for sides in (left, right))
            found[line.name] = batch, m, inner, n
    return found


def sides_of(shape: str) -> list[int]:
    """Of an array's shape, as text."""
    match = re.match(r"\w+\[([\d,]*)\]", shape)
    return [int(side) for side in match[1].split(",") if side] if match else []


def dims_of(line: hlo.Instruction, name: str) -> list[int]:
    """An attribute of a product, such as lhs_batch_dims; empty where it has none."""
    match = re.search(rf"{name}=\{{([\d,]*)\}}", line.rest)
    return [int(dim) for dim in match[1].split(",") if dim] if match else []


def spans(profile: Any, module: str) -> list[tuple[str, float, float]]:
    """Name, start and end in seconds of every operation of a module that a trace has.

    An operation may end on another thread than it started on: a number joins the two events.
    """
    starts: dict[int, tuple[str, float]] = {}
    ends: dict[int, float] = {}
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == module and "_p" in stats:
                    starts[stats["_p"]] = stats["hlo_op"], event.start_ns / 1e9
                elif event.name.startswith("end: ") and "_c" in stats:
                    ends[stats["_c"]] = event.end_ns / 1e9
    return [(name, start, ends[key]) for key, (name, start) in starts.items() if key in ends]


def share(spans: Iterable[tuple[str, float, float]]) -> tuple[dict[str, float], float]:
    """Seconds by name, each moment divided among all that are under way; and those of no one."""
    spans = list(spans)
    edges = sorted(
        edge for i, (_, start, end) in enumerate(spans) for edge in ((start, 1, i), (end, -1, i))
    )
    seconds: dict[str, float] = collections.defaultdict(float)
    opened: dict[int, float] = {}
    running, each, idle = 0, 0.0, 0.0  # `each`: what one that ran from the first edge would have
    before = edges[0][0] if edges else 0.0
    for now, step, i in edges:
        if running:
            each += (now - before) / running
        else:
            idle += now - before
        running, before = running + step, now
        if step > 0:
            opened[i] = each
        else:
            seconds[spans[i][0]] += each - opened[i]
    return dict(seconds), idle


def tables(costs: list[Cost], ceiling: float, rows: int, title: str) -> tuple[Table, Table]:
    """By kind of operation, and by place and kind, the `rows` dearest. `ceiling`: GFLOP/s."""
    whole = sum(cost.seconds for cost in costs)

    def row(names: Iterable[str], group: list[Cost]) -> list[str]:
        spent, gigaflop = (sum(getattr(c, n) for c in group) for n in ("seconds", "gigaflop"))
        speed = gigaflop / spent if spent else 0.0
        cells = [f"{sum(cost.count for cost in group):,.0f}", f"{1e3 * spent:.1f}"]
        cells.append(f"{100 * spent / whole:.1f}")
        cells += [f"{speed:.0f}", f"{100 * speed / ceiling:.0f}"] if speed else ["", ""]
        return [*names, *cells]

    figures = ("runs", "ms", "percent", "GFLOP/s", "% of ceiling")
    by_kind = Table(title=f"{title}, by kind of operation")
    by_place = Table(title=f"{title}, by place")
    for table, names in ((by_kind, ("operation",)), (by_place, ("part", "operation"))):
        for name in (*names, *figures):
            table.add_column(name, justify="left" if name in names else "right")
    kinds: dict[str, list[Cost]] = collections.defaultdict(list)
    for cost in costs:
        kinds[cost.kind or cost.place].append(cost)
    for name, group in sorted(kinds.items(), key=lambda item: -sum(c.seconds for c in item[1])):
        by_kind.add_row(*row([name], group))
    for cost in sorted(costs, key=lambda cost: -cost.seconds)[:rows]:
        by_place.add_row(*row([cost.place, f"{cost.kind} {cost.shape}".strip()], [cost]))
    return by_kind, by_place
