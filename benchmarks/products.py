"""What the products of a training step take alone, by XLA and by torch.

    python benchmarks/products.py --row=t5_lora --hf_python=PATH/TO/python  # with torch
    python benchmarks/products.py --row=toy_lora                            # a toy, XLA alone

Reads the products of matrices in one of `peers.py`'s compiled steps, times each of their shapes by
itself, and sums them: no step of these products is faster on this machine, whatever stands between
them. Each shape is timed by both in turn, in processes of their own, as in `peers.py`; torch gets
the operands laid out as XLA has them. Before that, our step and Hugging Face's (eager) take turns,
so that the last lines say what our step would take, were its products as quick as torch's: that is
what XLA's costs it. Nothing is asserted.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass

import peers
from absl import app, flags
from costs import dims_of, sides_of
from rich.console import Console
from rich.table import Table
from sides import Side

from t5x_lite.planning.hlo import Instruction, Program

_ROW = flags.DEFINE_enum(
    "row", "t5_lora", [*peers.ROWS, *peers.TOYS], "Whose step; peers.py has the sizes."
)


@dataclass(frozen=True)
class Product:
    """A product of `[*batch, m, k]` or `[*batch, k, m]` with `[*batch, k, n]` or `[*batch, n, k]`.

    `equation` says which, as einsum reads it: `abmk,abkn->abmn`.
    """

    equation: str
    left: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def gigaflop(self) -> float:
        left, right = self.equation.split("->")[0].split(",")
        sides = dict(zip(left + right, self.left + self.right, strict=True))
        return 2 * math.prod(sides.values()) / 1e9

    def __str__(self) -> str:
        left, right = ("x".join(map(str, sides)) for sides in (self.left, self.right))
        return f"{left} , {right}"


def products_of(program: Program) -> Counter[Product]:
    """How often a run of the program makes each product."""

    def of(name: str) -> Counter[Product]:
        found: Counter[Product] = Counter()
        lines = program.computations.get(name, ())
        shapes = {line.name: line.shape for line in lines}
        for line in lines:
            if line.opcode == "dot":
                found[
                    _product(line, *(tuple(sides_of(shapes[name])) for name in line.operands))
                ] += 1
            elif line.opcode == "while":
                for product, count in of(line.calls[-1]).items():
                    found[product] += count * program.trips(line)
            elif line.opcode in ("fusion", "call"):
                for called in line.calls:
                    found += of(called)
        return found

    return of(program.entry)


def _product(line: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> Product:
    letters = []
    for side, own in (("lhs", "m"), ("rhs", "n")):
        batch, inner = (dims_of(line, f"{side}_{what}_dims") for what in ("batch", "contracting"))
        rank = len(left if side == "lhs" else right)
        if len(inner) != 1 or batch != list(range(len(batch))) or rank > len(batch) + 2:
            sys.exit(f"error: a product of another form: {line.shape} {line.rest[:200]}")
        # A vector is a matrix of one row.
        free = [own if i != inner[0] else "k" for i in range(len(batch), rank)]
        letters.append("abcd"[: len(batch)] + "".join(free))
    result = "abcd"[: len(batch)]
    result += "m" * ("m" in letters[0]) + "n" * ("n" in letters[1])
    return Product(f"{letters[0]},{letters[1]}->{result}", left, right)


def measured(
    counts: Counter[Product], ours: Side, torch: Side | None
) -> dict[Product, tuple[float, float | None]]:
    """Seconds of each product by itself, medians over the rounds: XLA's, and torch's if asked."""
    found: dict[Product, tuple[float, float | None]] = {}
    for product in counts:
        asked = dataclasses.asdict(product)
        times: dict[Side, list[float]] = {ours: []} if torch is None else {ours: [], torch: []}
        for _ in range(flags.FLAGS.rounds):
            for side, seconds in times.items():
                seconds.append(side.ask(product=asked)["wall"])
        own, *others = (statistics.median(seconds) for seconds in times.values())
        found[product] = own, others[0] if others else None
    return found


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: unexpected '{argv[1]}' (--help shows the flags)")
    work = {**peers.ROWS, **peers.TOYS}[_ROW.value]
    steps = peers.in_turn(work)
    counts = products_of(Program.parse(steps[peers.OURS].side.ask(program={})["text"]))
    for times in steps.values():
        times.side.close()
    ours = peers.process(peers.OURS)
    torch = peers.process("torch") if flags.FLAGS.hf_python else None
    found = measured(counts, ours, torch)

    table = Table(title=f"Products of a step of {_ROW.value}, each alone")
    table.add_column("operands", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("a step", "GFLOP", "XLA, ms", "GFLOP/s", "torch, ms", "GFLOP/s"):
        table.add_column(column, justify="right")
    for product in sorted(counts, key=lambda one: -counts[one] * found[one][0]):
        cells = [str(product), product.equation, str(counts[product]), f"{product.gigaflop:.2f}"]
        for seconds in found[product]:
            if seconds is not None:
                cells += [f"{1e3 * seconds:.2f}", f"{product.gigaflop / seconds:.0f}"]
        table.add_row(*cells)
    console = Console(width=max(Console().width, 120))
    console.print(table)
    gigaflop = sum(product.gigaflop * count for product, count in counts.items())
    sums = [sum(counts[p] * seconds for p, (seconds, _) in found.items())]
    if torch is not None:
        sums.append(sum(counts[p] * (seconds or 0.0) for p, (_, seconds) in found.items()))
    for name, seconds in zip(("XLA", "torch"), sums, strict=False):
        console.print(
            f"all {sum(counts.values())} by {name}: {seconds:.3f} s for {gigaflop:.0f} GFLOP, "
            f"{gigaflop / seconds:.0f} GFLOP/s"
        )
    step = steps[peers.OURS].step
    console.print(f"our step: {step:.3f} s, of which they are {100 * sums[0] / step:.0f}%")
    if torch is not None:
        other, could = steps["eager"].step, step - sums[0] + sums[1]
        console.print(f"Hugging Face's step: {other:.3f} s, {other / step:.2f} times ours")
        if could > 0:  # a toy's products take less in its step than alone
            console.print(
                f"our step, were its products as quick as torch's: {could:.3f} s; "
                f"Hugging Face's is {other / could:.2f} times that"
            )


if __name__ == "__main__":
    app.run(main)
