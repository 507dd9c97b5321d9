"""What quantising the base costs and saves: bytes, logits, and the loss of tuning beside it.

    make demo      (prepares the data; or what it runs up to demo_pretrain.gin: five minutes)
    python benchmarks/quantised_base.py --pretrained=runs/demo/pretrained

The demo's pretrained T5 is tuned with LoRA on KJV -> Basic English (runs/demo_lora.gin: same rank,
data, seed and steps) beside its weights in float32, int8, NF4, and NF4 with double quantisation.
Each quantised base is a folder of scripts/quantize.py, and is read from there. Losses are of the
test split, teacher-forced, in nats a token.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from t5x_lite.peft.quantise import Quantise
from t5x_lite.train.checkpoint import Checkpointer, find_step
from t5x_lite.train.quantize import Sizes, quantize

PRETRAINED = flags.DEFINE_string("pretrained", "runs/demo/pretrained", "The demo's pretrained run.")
OUTPUT = flags.DEFINE_string("output", None, "Where runs are kept; None: nowhere.")
STEPS = flags.DEFINE_integer("steps", 120, "Of tuning; 0: only sizes and logits.")
BASES = flags.DEFINE_list("bases", ["float32", "int8", "nf4", "double"], "What is tried.")

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "float32": None,
    "int8": Quantise("int8"),
    "nf4": Quantise("nf4"),
    "double": Quantise("nf4", double_quantisation=True),
}


@dataclasses.dataclass
class Row:
    """One base: what `quantize` told, if it was quantised, and the test's loss around tuning."""

    sizes: Sizes | None
    before: float | None = None
    after: float | None = None
    minutes: float | None = None


def tune(base: str, quantise: Quantise | None, model_dir: str, steps: int) -> tuple[float, float]:
    """The test's loss before the first step and after the last; a program of its own."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    command += ["--gin_file=runs/demo_lora.gin", f"--gin.PRETRAINED='{base}'"]
    command += [f"--gin.MODEL_DIR='{model_dir}'", f"--gin.STEPS={steps}"]
    command += ["--gin.EVALUATIONS=[@test_loss/TeacherForced()]"]
    if quantise is not None:
        command += ["--gin.TRANSFORM=@Compose()"]
        command += ["--gin.Compose.transforms=(@LoRA(), @Quantise())"]
        command += [f"--gin.Quantise.kind='{quantise.kind}'"]
        command += [f"--gin.Quantise.double_quantisation={quantise.double_quantisation}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(model_dir, "metrics.jsonl"), encoding="utf-8") as file:
        losses = [record["test/loss"] for record in map(json.loads, file) if "test/loss" in record]
    return losses[0], losses[-1]


def measure(pretrained: str, root: str, steps: int, bases: list[str]) -> dict[str, Row]:
    rows = {}
    for name in bases:
        quantise, sizes, base = KINDS[name], None, pretrained
        if quantise is not None:
            base = os.path.join(root, f"base_{name}")
            sizes = quantize(
                source=pretrained,
                output=base,
                kind=quantise.kind,
                double_quantisation=quantise.double_quantisation,
            )
        rows[name] = Row(sizes)
        if steps:
            began = time.monotonic()
            tuned = tune(base, quantise, os.path.join(root, f"lora_{name}"), steps)
            rows[name].before, rows[name].after = tuned
            rows[name].minutes = (time.monotonic() - began) / 60
    return rows


def show(rows: dict[str, Row], pretrained: str) -> Table:
    table = Table(title="LoRA beside quantised weights, KJV -> Basic English")
    headings = ("base", "disk", "memory", "quantised part", "largest logit change", "rms")
    for heading in (*headings, "same choice", "loss before", "loss after", "min"):
        table.add_column(heading, justify="left" if heading == "base" else "right")
    checkpointer = Checkpointer(pretrained)
    try:
        disk = checkpointer.nbytes(find_step(pretrained))["params"]
    finally:
        checkpointer.close()
    for name, row in rows.items():
        losses = ["" if number is None else f"{number:.4f}" for number in (row.before, row.after)]
        took = "" if row.minutes is None else f"{row.minutes:.1f}"
        if row.sizes is None:
            memory = [other.sizes.memory[0] for other in rows.values() if other.sizes]
            cells = [f"{number / 1e6:.2f} MB" for number in (disk, *memory[:1])]
            cells += [""] * (6 - len(cells))
        else:
            sizes, change = row.sizes, row.sizes.change
            cells = [f"{sizes.disk[1] / 1e6:.2f} MB", f"{sizes.memory[1] / 1e6:.2f} MB"]
            cells += [f"{sizes.part[0] / 1e6:.2f} -> {sizes.part[1] / 1e6:.2f} MB"]
            cells += [f"{change.largest:.3f}", f"{change.root_mean_square:.4f}"]
            cells += [f"{change.same_choice:.1%}"]
        table.add_row(name, *cells, *losses, took)
    return table


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    pretrained = os.path.abspath(PRETRAINED.value)
    with tempfile.TemporaryDirectory() as scratch:
        root = scratch if OUTPUT.value is None else os.path.abspath(OUTPUT.value)
        rows = measure(pretrained, root, STEPS.value, BASES.value)
        Console(width=150).print(show(rows, pretrained))


if __name__ == "__main__":
    app.run(main)
