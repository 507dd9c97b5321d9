"""Times LoRA's training step beside full fine-tuning's, and beside Hugging Face PEFT's on torch.

    python benchmarks/lora_step.py --hf_python=/path/to/python   # with torch, transformers, peft
    python benchmarks/lora_step.py                               # ours alone
    python benchmarks/lora_step.py --method=dora --remat=none

Same model, batch and optimizer (T5 1.1 small, 8 rows of 512 -> 114, AdamW), random weights, no
dropout. The sides take turns, round by round, so that all see the same machine; PEFT's is a process
of its own, which sleeps while it is not asked. Memory is XLA's own account of a compiled step:
arguments, results and temporaries, without the base's weights. XLA counts a loop's body once, so
operations are counted on steps with their layers unrolled and all logits at once, compiled for
that alone. `--costs=N` sets how many rows say where each side's time goes. Nothing is asserted.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import sides
import train_step
from absl import app, flags
from rich.console import Console
from rich.table import Table

from t5x_lite.peft.ia3 import IA3
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.train import step as steps

TARGETS = (".*/(query|value)/kernel",)  # PEFT's default for T5: q and v
METHODS: dict[str, Callable[[], Transform]] = {
    "lora": lambda: LoRA(rank=8, targets=TARGETS),
    "dora": lambda: DoRA(rank=8, targets=TARGETS),
    "ia3": IA3,
}

_METHOD = flags.DEFINE_enum("method", "lora", sorted(METHODS), "What is beside full fine-tuning.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds of --steps steps on each side.")
_COUNT = flags.DEFINE_boolean("count", True, "Count operations; compiles two steps more.")
_HF_PYTHON = flags.DEFINE_string("hf_python", None, "A Python with torch, transformers and peft.")


class Ours(train_step.Training):
    """A compiled step of one transform, and what XLA says of it."""

    def __init__(self, transform: Transform, unroll: int = 1, loss: steps.Loss = train_step.LOSS):
        shape = train_step.SHAPES[flags.FLAGS.config]
        super().__init__(
            train_step.config_of(shape, flags.FLAGS.dtype, flags.FLAGS.remat, unroll),
            train_step.random_batch(shape),
            train_step.OPTIMIZERS[flags.FLAGS.optimizer],
            transform,
            loss,
        )

    @property
    def memory(self) -> int:
        """Bytes beyond the base's weights."""
        used = self.compiled.memory_analysis()
        total = (
            used.argument_size_in_bytes
            + used.output_size_in_bytes
            - used.alias_size_in_bytes
            + used.temp_size_in_bytes
        )
        return total - self.base_bytes

    @property
    def gigaflop(self) -> float:
        """By XLA's cost analysis, loops counted once."""
        found = self.compiled.cost_analysis()
        return (found[0] if isinstance(found, list) else found)["flops"] / 1e9


class Theirs(sides.Side):
    """PEFT's step, in the process of `peers_hf.py`."""

    def __init__(self, python: str):
        super().__init__(python, "peers_hf.py")
        shape = train_step.SHAPES[flags.FLAGS.config]
        self.ask(
            make={
                "family": "t5",
                "method": _METHOD.value,
                "dtype": flags.FLAGS.dtype,
                "compiled": False,
                "layers": shape.stack.num_layers,
                "heads": shape.stack.num_heads,
                "head_dim": shape.stack.head_dim,
                "mlp": shape.stack.mlp_dim,
                "embed": shape.embed,
                "vocab": shape.vocab,
                "rows": shape.rows,
                "encoder": shape.encoder,
                "decoder": shape.decoder,
            }
        )
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def repeat(self, times: int) -> None:
        found = self.ask(run={"steps": times})
        self.wall += found["wall"]
        self.cpu += found["cpu"]


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: unexpected '{argv[1]}' (--help shows the flags)")
    name = _METHOD.value
    ours = {"full": Ours(Full()), name: Ours(METHODS[name]())}
    theirs = None if _HF_PYTHON.value is None else Theirs(_HF_PYTHON.value)
    timed = {side: one.timed for side, one in ours.items()}
    if theirs is not None:
        timed[f"PEFT {name}"] = theirs
    for _ in range(_ROUNDS.value):
        for side in timed.values():
            side.repeat(max(1, flags.FLAGS.steps // _ROUNDS.value))

    console = Console(width=max(Console().width, 100))
    shape = train_step.SHAPES[flags.FLAGS.config]
    table = Table(
        title=f"T5 1.1 {flags.FLAGS.config}, batch {shape.rows}, {shape.encoder} -> "
        f"{shape.decoder}, {flags.FLAGS.dtype}, remat {flags.FLAGS.remat}"
    )
    for column in ("step", "trained", "compile s", "step s", "least", "CPU-s", "beyond base, MiB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for side, times in timed.items():
        one = ours.get(side)
        table.add_row(
            side,
            f"{one.trained:,}" if one else "",
            f"{one.compile_seconds:.1f}" if one else "",
            f"{statistics.median(times.wall):.3f}",
            f"{min(times.wall):.3f}",
            f"{statistics.median(times.cpu):.3f}",
            f"{one.memory / 2**20:,.0f}" if one else "",
        )
    console.print(table)
    median = {side: statistics.median(times.wall) for side, times in timed.items()}
    print(f"{name} against full: time {median[name] / median['full']:.2f}, ", end="")
    print(f"memory beyond the base {ours[name].memory / ours['full'].memory:.2f}")
    if theirs is not None:
        print(f"torch and PEFT against ours: time {median[f'PEFT {name}'] / median[name]:.2f}")
        print(json.dumps(theirs.hello))
    if _COUNT.value:
        layers = shape.stack.num_layers
        whole = steps.Loss(logits_bytes=0)  # a loop over chunks would be counted once too
        counts = {
            "full": Ours(Full(), layers, whole).gigaflop,
            name: Ours(METHODS[name](), layers, whole).gigaflop,
        }
        print(
            f"GFLOP by XLA, layers unrolled: full {counts['full']:,.0f}, {name} "
            f"{counts[name]:,.0f}: ratio {counts[name] / counts['full']:.3f}"
        )
    products, gigaflop = train_step.ceiling(
        shape.rows * shape.encoder, shape.embed, shape.stack.mlp_dim, flags.FLAGS.dtype
    )
    product = train_step.Timed(products)
    product.repeat(5)
    for side, one in ours.items():
        speed = gigaflop / statistics.median(product.wall)
        train_step.print_costs(console, one, speed, f"a step of {side}")


if __name__ == "__main__":
    app.run(main)
