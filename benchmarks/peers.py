"""Times a training step beside Hugging Face transformers' and PEFT's, on the same CPU.

    python benchmarks/peers.py --hf_python=PATH/TO/python   # with torch, transformers and peft
    python benchmarks/peers.py --hf_python=PATH/TO/python --rows=bert,gpt2 --dtypes=float32
    python benchmarks/peers.py --rows=t5 --t5x=PATH/TO/t5x  # a clone of google-research/t5x
    python benchmarks/peers.py --rows=t5                    # ours alone

The same work on all sides: models of the same shapes and the same number of trained parameters
(that is checked), random weights and tokens, no padding, no dropout, AdamW (torch's is fused).
Torch runs as it comes (eager) and under torch.compile; its bfloat16 is autocast's. Ours is the
library's step with the settings of gin_configs/hardware/cpu.gin. T5X's networks and loss,
unchanged, are two more sides where all of T5 is trained. A masked language model's head answers at
15% of the tokens with ours, and at all of them with Hugging Face's, which knows no other way; the
loss is of those 15% either way.

Each side of a row is a process of its own, started for that row and allocating from huge pages.
They take turns, round by round, and wait while they are not asked: so all see the same machine, and
a peak of memory is of one row and one side. The matmul ceiling is that of products of the model's
own feed-forward shape, in turn with them. Nothing is asserted.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table
from sides import Side


@dataclass(frozen=True)
class Work:
    """A model and its batch; what is trained of it."""

    family: str  # t5, bert or gpt2
    layers: int  # of each stack
    embed: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    rows: int
    encoder: int  # tokens of a row; 0: there is none
    decoder: int
    slots: int = 0  # tokens of a row that are masked
    positions: int = 512  # that are learned; T5 learns none
    method: str = "full"  # or lora: rank 8, on queries and values

    @property
    def tokens(self) -> int:
        return self.rows * (self.encoder + self.decoder)


T5 = Work("t5", 8, 512, 6, 64, 1024, 32128, 8, 512, 114)
TOY = Work("t5", 1, 16, 2, 8, 32, 64, 2, 16, 8)
ROWS = {
    "t5": T5,
    "bert": Work("bert", 6, 512, 8, 64, 2048, 30522, 8, 128, 0, slots=19),
    "gpt2": Work("gpt2", 6, 512, 8, 64, 2048, 50257, 8, 0, 512, positions=1024),
    "t5_lora": dataclasses.replace(T5, method="lora"),
    # A fine-tuning task of short texts.
    "t5_short": dataclasses.replace(T5, rows=16, encoder=128, decoder=64),
    "t5_short_lora": dataclasses.replace(T5, rows=16, encoder=128, decoder=64, method="lora"),
}
TOYS = {
    "toy_t5": TOY,
    "toy_bert": dataclasses.replace(TOY, family="bert", decoder=0, slots=3),
    "toy_gpt2": dataclasses.replace(TOY, family="gpt2", encoder=0),
    "toy_lora": dataclasses.replace(TOY, method="lora"),
}
PEERS = ("eager", "compiled")
DTYPES = ("float32", "bfloat16")
OURS = "t5x_lite"
T5X = {"t5x": "t5", "t5x scalable": "scalable_t5"}  # sides, and which of its examples they are
# What README advises for Linux, given to all sides; torch.compile's seconds are of a first run.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}

_ROWS = flags.DEFINE_list("rows", list(ROWS), f"Of {', '.join(ROWS)}; toys: {', '.join(TOYS)}.")
_PEERS = flags.DEFINE_list("peers", list(PEERS), "How torch runs: eager, compiled, or both.")
_DTYPES = flags.DEFINE_list("dtypes", list(DTYPES), "Compute dtypes.")
_STEPS = flags.DEFINE_integer("steps", 3, "Timed steps of each side in a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each side.", lower_bound=1)
_HF_PYTHON = flags.DEFINE_string("hf_python", None, "A Python with torch, transformers and peft.")
_T5X = flags.DEFINE_string("t5x", None, "A clone of google-research/t5x, whose T5 is a side too.")


@dataclass
class Times:
    """One side's measurements of a row, in seconds and GiB."""

    side: Side
    first: float  # from sizes to the end of the first step: weights, compilation and the step
    made: dict[str, Any]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, steps: int) -> None:
        found = self.side.ask(run={"steps": steps})
        self.wall += found["wall"]
        self.cpu += found["cpu"]

    @property
    def step(self) -> float:
        return statistics.median(self.wall)


def process(name: str) -> Side:
    """A side's process, which waits."""
    python, program = _HF_PYTHON.value, "peers_hf.py"
    if name == OURS or name in T5X:
        python, program = sys.executable, "peers_ours.py" if name == OURS else "peers_t5x.py"
    return Side(python, program, {**ENVIRONMENT, **os.environ})


def start(name: str, work: Work, dtype: str) -> Times:
    """A side's process, which has taken its first step."""
    side = process(name)
    began = time.perf_counter()
    asked: dict[str, Any] = {
        **dataclasses.asdict(work),
        "dtype": dtype,
        "compiled": name == "compiled",
    }
    if name in T5X:
        asked |= {"t5x": _T5X.value, "example": T5X[name]}
    made = side.ask(make=asked)
    return Times(side, time.perf_counter() - began, made)


def in_turn(work: Work) -> dict[str, Times]:
    """Ours, and Hugging Face's eager one if there is a Python for it, after rounds of steps."""
    names = [OURS, "eager"] if _HF_PYTHON.value else [OURS]
    sides = {name: start(name, work, "float32") for name in names}
    for _ in range(_ROUNDS.value):
        for times in sides.values():
            times.run(_STEPS.value)
    return sides


def measured(work: Work, dtype: str, names: list[str]) -> tuple[dict[str, Times], float]:
    """Every side's times, and the ceiling in GFLOP/s."""
    products = process(OURS)
    shape = {"rows": work.rows * (work.encoder or work.decoder), "inner": work.embed}
    sides = {name: start(name, work, dtype) for name in names}
    counts = {name: times.made["trained"] for name, times in sides.items()}
    counts.pop("t5x scalable", None)  # its layers have tables of positions of their own
    if len(set(counts.values())) > 1:
        sys.exit(f"error: the sides do not train the same number of parameters: {counts}")
    rates = []
    for _ in range(_ROUNDS.value):
        for times in sides.values():
            times.run(_STEPS.value)
        found = products.ask(products={**shape, "outer": work.mlp, "dtype": dtype})
        rates.append(found["gigaflops"])
    products.close()
    return sides, statistics.median(rates)


def lines(work: Work, sides: dict[str, Times], ceiling: float) -> dict[str, list[str]]:
    """The table's cells of each side, which is ended."""
    ours, cells = sides[OURS], {}
    for name, times in sides.items():
        count = ours.made["gigaflop" if name == OURS else "gigaflop_everywhere"]
        cells[name] = [
            f"{times.step:.3f}",
            f"{min(times.wall):.3f}",
            f"{statistics.median(times.cpu):.3f}",
            f"{work.tokens / times.step:,.0f}",
            "" if name == OURS else f"{times.step / ours.step:.2f}",
            f"{100 * count / times.step / ceiling:.0f}",
            f"{times.side.peak():.2f}",
            f"{times.first:.1f}",
        ]
        times.side.close()
    return cells


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: unexpected '{argv[1]}' (--help shows the flags)")
    for flag, known in ((_ROWS, {**ROWS, **TOYS}), (_PEERS, PEERS), (_DTYPES, DTYPES)):
        for value in flag.value:
            if value not in known:
                sys.exit(f"error: --{flag.name} has '{value}'; known: {', '.join(known)}")
    if _T5X.value and not (Path(_T5X.value).expanduser() / "t5x/examples/t5/network.py").is_file():
        sys.exit(
            f"error: --t5x={_T5X.value} has no t5x/examples/t5/network.py; expected a clone of "
            "https://github.com/google-research/t5x"
        )
    names = [OURS, *(_PEERS.value if _HF_PYTHON.value else ())]
    table = Table()
    for column in ("row", "side"):
        table.add_column(column, no_wrap=True)
    for column in (
        *("step, s", "least", "CPU-s", "tokens/s", "to ours"),
        *("% of ceiling", "peak GiB", "first step, s"),
    ):
        table.add_column(column, justify="right")
    versions: dict[str, str] = {}
    for row in _ROWS.value:
        for dtype in _DTYPES.value:
            work = {**ROWS, **TOYS}[row]
            has_t5x = _T5X.value and (work.family, work.method) == ("t5", "full")
            sides, ceiling = measured(work, dtype, [*names, *T5X] if has_t5x else names)
            for times in sides.values():
                versions |= times.side.hello
            title = f"{row}, {dtype}"
            print(f"{title}: ceiling {ceiling:.0f} GFLOP/s", file=sys.stderr)
            for name, cells in lines(work, sides, ceiling).items():
                print(" | ".join((title, name, *cells)), file=sys.stderr, flush=True)
                table.add_row(title if name == OURS else "", name, *cells)
            table.add_section()
    table.title = ", ".join(f"{name} {version}" for name, version in versions.items())
    Console(width=max(Console().width, 130)).print(table)


if __name__ == "__main__":
    app.run(main)
