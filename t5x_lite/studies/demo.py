"""The demo's closing table: what pretraining and LoRA brought, from the runs' own folders."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from t5x_lite import trees
from t5x_lite.evaluation.metrics import bleu, chrf
from t5x_lite.train.checkpoint import Checkpointer, find_step
from t5x_lite.train.evaluate import PREDICTIONS
from t5x_lite.train.plots import plot_curves
from t5x_lite.train.run import Run
from t5x_lite.train.session import Session
from t5x_lite.train.writers import read_jsonl
from t5x_lite.types import InputError

PRETRAINED = "pretrained"
TUNED = {
    "lora_random": "LoRA from random weights",
    "lora": "LoRA from pretrained",
    "full": "full fine-tuning from pretrained",
}


@dataclass(frozen=True)
class Row:
    """One system of the table."""

    label: str
    scores: dict[str, float]  # chrf, bleu, in percent; loss in nats a token
    trained: int | None = None  # parameters
    checkpoint_bytes: dict[str, int] | None = None  # on disk, by item


def report(*, folder: str = "runs/demo", samples: int = 3, console: Any = None) -> list[Row]:
    """Prints the table and sample outputs of the demo's four runs, and draws their curves.

    Args:
      folder: holds the runs `pretrained`, `lora_random`, `lora` and `full`.
      samples: how many test verses to show.

    Returns:
      The table's rows. Raises InputError for a run that is missing or not finished.
    """
    console = console or Console(width=max(Console().width, 110))
    losses = [
        record["held_out/loss"]
        for record in read_jsonl(os.path.join(folder, PRETRAINED, "metrics.jsonl"))
        if "held_out/loss" in record
    ]
    runs = {label: os.path.join(folder, name) for name, label in TUNED.items()}
    predictions = {label: read_predictions(path) for label, path in runs.items()}
    rows = [copy_row(next(iter(predictions.values())))]
    rows += [tuned_row(label, path) for label, path in runs.items()]

    console.print(
        f"\n[bold]Pretraining[/bold] (span corruption, three Bibles): loss on held-out chapters "
        f"{losses[0]:.3f} at the start, {losses[-1]:.3f} at the end"
    )
    console.print(_table(rows, len(next(iter(predictions.values())))))
    for index in range(samples):
        console.print()
        shown = predictions[TUNED["lora"]][index]
        console.print(f"KJV        {shown['inputs']}", markup=False, highlight=False)
        console.print(f"BBE        {shown['targets']}", markup=False, highlight=False)
        for label, records in predictions.items():
            text = f"{label}: {records[index]['prediction']}"
            console.print(f"  {text}", markup=False, highlight=False)
    metrics = {label: os.path.join(path, "metrics.jsonl") for label, path in runs.items()}
    first = {PRETRAINED: os.path.join(folder, PRETRAINED, "metrics.jsonl")}
    pictures = [
        plot_curves(first, os.path.join(folder, "pretraining.png"), title="Pretraining"),
        plot_curves(metrics, os.path.join(folder, "fine_tuning.png"), title="KJV to Basic English"),
    ]
    console.print("\nCurves: " + ", ".join(map(str, pictures)))
    return rows


def copy_row(records: Sequence[dict[str, Any]]) -> Row:
    """The baseline that any tuned model has to be compared with: the source as its own output."""
    targets = [record["targets"] for record in records]
    sources = [record["inputs"] for record in records]
    return Row("copying the source", {**chrf(targets, sources), **bleu(targets, sources)})


def tuned_row(label: str, path: str) -> Row:
    """Scores of a run's last evaluation, and what its checkpoint holds."""
    records = read_jsonl(os.path.join(path, "metrics.jsonl"))
    scores = [record for record in records if "generate/chrf" in record]
    if not scores:
        raise InputError(f"'{path}' has no evaluation yet: finish the run first")
    run = Run.read(path)
    session = Session(run.model, run.transform, seed=run.seed)
    checkpointer = Checkpointer(path)
    try:
        nbytes = checkpointer.nbytes(find_step(path))
    finally:
        checkpointer.close()
    return Row(
        label,
        {
            "chrf": scores[-1]["generate/chrf"],
            "bleu": scores[-1]["generate/bleu"],
            "loss": scores[-1]["test/loss"],
        },
        trees.count(session.split_shapes[0]),
        nbytes,
    )


def read_predictions(path: str) -> list[dict[str, Any]]:
    """What a run's last evaluation generated, beside inputs and targets."""
    name = os.path.join(path, PREDICTIONS, f"generate-{find_step(path)}.jsonl")
    try:
        with open(name, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except OSError as error:
        raise InputError(f"can't read the predictions '{name}': {error.strerror}") from error


def _table(rows: Sequence[Row], verses: int) -> Table:
    table = Table(title=f"KJV to Basic English, {verses} verses of held-out chapters")
    table.add_column("system")
    for column in ("chrF", "BLEU", "loss", "trained parameters", "weights, bytes", "optimizer"):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = row.checkpoint_bytes or {}
        table.add_row(
            row.label,
            f"{row.scores['chrf']:.1f}",
            f"{row.scores['bleu']:.1f}",
            f"{row.scores['loss']:.3f}" if "loss" in row.scores else "",
            "" if row.trained is None else f"{row.trained:,}",
            f"{sizes['params']:,}" if sizes else "",
            f"{sizes['optimizer']:,}" if sizes else "",
        )
    return table
