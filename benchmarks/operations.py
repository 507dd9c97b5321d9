"""Where a training step's time goes in ours and in Hugging Face's, by the same kinds of operation.

    python benchmarks/operations.py --row=t5_lora --hf_python=PATH/TO/python
    python benchmarks/operations.py --row=toy_lora                            # a toy, ours alone

Steps of `peers.py`'s work take turns, then each side traces one: XLA's trace as `costs` reads it,
torch's by its own profiler (eager). The last column is what ours takes longer with that kind. An
operation that XLA makes of several counts once, as a product if there is one in it. Of each side's
trace its shares are taken, and its own untraced median step is divided by them: tracing costs time.
Nothing is asserted.
"""

from __future__ import annotations

import sys

import kinds
import peers
from absl import app, flags
from rich.console import Console
from rich.table import Table

_ROW = flags.DEFINE_enum(
    "row", "t5_lora", [*peers.ROWS, *peers.TOYS], "Whose step; peers.py has the sizes."
)


def seconds(times: peers.Times, found: dict[str, float]) -> dict[str, float]:
    """Of the side's median step, by kind, as they share a traced one."""
    whole = sum(found.values())
    return {name: times.step * found.get(name, 0.0) / whole for name in kinds.KINDS}


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: unexpected '{argv[1]}' (--help shows the flags)")
    work = {**peers.ROWS, **peers.TOYS}[_ROW.value]
    sides = peers.in_turn(work)
    spent: list[dict[str, float]] = []
    for name, times in sides.items():
        found: dict[str, float] = {}
        for operation in times.side.ask(trace={})["operations"]:
            ours = name == peers.OURS
            own = kinds.of(*operation[:3]) if ours else kinds.of_torch(operation[0])
            found[own] = found.get(own, 0.0) + operation[-1]
        times.side.close()
        spent.append(seconds(times, found))

    table = Table(title=f"A step of {_ROW.value}, float32")
    table.add_column("operations", no_wrap=True)
    for column in ("ours, s", "torch, s", "more, s")[: 1 if len(spent) == 1 else 3]:
        table.add_column(column, justify="right")
    for name in (*kinds.KINDS, "all"):
        cells = [sum(found.values()) if name == "all" else found[name] for found in spent]
        cells += [cells[0] - other for other in cells[1:]]
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    Console().print(table)


if __name__ == "__main__":
    app.run(main)
