"""The demo's closing table: what pretraining and LoRA brought, from the runs' own folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from t5x_lite import trees
from t5x_lite.evaluation.bootstrap import bootstrap_difference, with_intervals
from t5x_lite.evaluation.metrics import bleu, chrf
from t5x_lite.train.checkpoint import Checkpointer, find_step
from t5x_lite.train.evaluate import PREDICTIONS
from t5x_lite.train.plots import plot_curves
from t5x_lite.train.run import FILE, Run
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
    # chrf, bleu, in percent, with their 95% intervals (chrf_low, ...); loss in nats a token
    scores: dict[str, float]
    trained: int | None = None  # parameters
    checkpoint_bytes: dict[str, int] | None = None  # on disk, by item


def report(
    *, folder: str = "runs/demo", samples: int = 3, fall: float | None = None, console: Any = None
) -> list[Row]:
    """Prints the table and sample outputs of the demo's four runs, and draws their curves.

    Of a single pretraining run, prints how far its loss on held-out text fell, and draws its curve.

    Args:
      folder: holds the runs `pretrained`, `lora_random`, `lora` and `full`, or is one run.
      samples: how many test verses to show.
      fall: by how much a single run's loss has to have fallen, in nats an asked token.

    Returns:
      The table's rows. Raises InputError for a run that is missing or not finished, or whose loss
      did not fall by `fall`.
    """
    console = console or Console(width=max(Console().width, 110))
    if os.path.exists(os.path.join(folder, FILE)):
        return report_pretraining(folder, fall, console)
    losses = held_out_losses(os.path.join(folder, PRETRAINED))
    runs = {label: os.path.join(folder, name) for name, label in TUNED.items()}
    predictions = {label: read_predictions(path) for label, path in runs.items()}
    rows = [copy_row(next(iter(predictions.values())))]
    rows += [tuned_row(label, path, predictions[label]) for label, path in runs.items()]

    console.print(
        f"\n[bold]Pretraining[/bold] (span corruption, three Bibles): loss on held-out chapters "
        f"{losses[0]:.3f} at the start, {losses[-1]:.3f} at the end"
    )
    console.print(_table(rows, len(next(iter(predictions.values())))))
    for line in differences(predictions):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
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


def report_pretraining(folder: str, fall: float | None, console: Any) -> list[Row]:
    """One pretraining run's held-out loss at its start and its end; see `report`."""
    losses = held_out_losses(folder)
    name = os.path.basename(os.path.normpath(folder))
    if len(losses) < 2:
        raise InputError(f"'{folder}' has no evaluation after step 0 yet: finish the run first")
    fell = losses[0] - losses[-1]
    console.print(
        f"\n[bold]{folder}[/bold]: loss on held-out chapters {losses[0]:.3f} at the start, "
        f"{losses[-1]:.3f} at the end: it fell by {fell:.3f}",
        soft_wrap=True,
    )
    metrics = {name: os.path.join(folder, "metrics.jsonl")}
    picture = plot_curves(metrics, os.path.join(folder, "pretraining.png"), title="Pretraining")
    console.print(f"Curve: {picture}", soft_wrap=True)
    if fall is not None and not fell >= fall:  # a loss that is not a number has not fallen
        raise InputError(
            f"the held-out loss of '{folder}' fell by {fell:.3f}, less than the {fall} that this "
            "run is known to reach"
        )
    return [Row(name, {"loss": losses[-1]})]


def held_out_losses(run: str) -> list[float]:
    """The losses of a pretraining run's evaluations, in order."""
    records = read_jsonl(os.path.join(run, "metrics.jsonl"))
    return [record["held_out/loss"] for record in records if "held_out/loss" in record]


def copy_row(records: Sequence[dict[str, Any]]) -> Row:
    """The baseline that any tuned model has to be compared with: the source as its own output."""
    sources = [record["inputs"] for record in records]
    return Row("copying the source", _scores(records, sources))


def _scores(records: Sequence[dict[str, Any]], texts: Sequence[str]) -> dict[str, float]:
    targets = [record["targets"] for record in records]
    return {**with_intervals(chrf, targets, texts), **with_intervals(bleu, targets, texts)}


def differences(predictions: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """What pretraining brought, and what is left to copying, in chrF with paired 95% intervals."""
    records = predictions[TUNED["lora"]]
    targets = [record["targets"] for record in records]
    texts = {label: [r["prediction"] for r in made] for label, made in predictions.items()}
    texts["copying the source"] = [record["inputs"] for record in records]
    best, random = TUNED["lora"], TUNED["lora_random"]
    lines = []
    for one, other in ((best, random), (TUNED["full"], best), (best, "copying the source")):
        (low, high) = bootstrap_difference(chrf, targets, texts[one], texts[other])["chrf"]
        value = chrf(targets, texts[one])["chrf"] - chrf(targets, texts[other])["chrf"]
        lines.append(f"chrF of {one} - {other}: {value:+.1f} ({low:+.1f} to {high:+.1f})")
    return lines


def tuned_row(label: str, path: str, predictions: Sequence[dict[str, Any]]) -> Row:
    """Scores of a run's last evaluation, and what its checkpoint holds."""
    records = read_jsonl(os.path.join(path, "metrics.jsonl"))
    losses = [record["test/loss"] for record in records if "test/loss" in record]
    if not losses:
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
        {**_scores(predictions, [r["prediction"] for r in predictions]), "loss": losses[-1]},
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
    title = f"KJV to Basic English, {verses} verses of held-out chapters (95% intervals)"
    table = Table(title=title)
    table.add_column("system")
    for column in ("chrF", "BLEU", "loss", "trained parameters", "weights, bytes", "optimizer"):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = row.checkpoint_bytes or {}
        table.add_row(
            row.label,
            _with_interval(row.scores, "chrf"),
            _with_interval(row.scores, "bleu"),
            f"{row.scores['loss']:.3f}" if "loss" in row.scores else "",
            "" if row.trained is None else f"{row.trained:,}",
            f"{sizes['params']:,}" if sizes else "",
            f"{sizes['optimizer']:,}" if sizes else "",
        )
    return table


def _with_interval(scores: Mapping[str, float], name: str) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(
        *(scores[name + end] for end in ("", "_low", "_high"))
    )
