"""Loss curves of one or more runs as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite.train.writers import read_jsonl
from t5x_lite.types import InputError

Curve = tuple[list[int], list[float]]  # steps, values


def plot_curves(
    runs: Mapping[str, str | os.PathLike[str]],
    out_png: str | os.PathLike[str],
    *,
    title: str = "Loss",
    metric: str = "loss",
) -> Path:
    """Draws `metric` against the step, in training and in evaluations, for each run.

    A run has one colour: a thin line for training, a dashed one with markers for an evaluation.

    Args:
      runs: label -> path of the run's metrics.jsonl.
      out_png: the picture to write (its folder is made).
      metric: the last part of the names to draw: `loss` draws `loss`, `train/loss`, `eval/loss`.

    Returns:
      The path of the picture.

    Raises:
      InputError: matplotlib isn't installed, or a file is missing, damaged or without the metric.
    """
    curves = {label: read_curves(path, metric) for label, path in runs.items()}
    if not curves:
        raise InputError("plot_curves got no runs: expected at least one label and metrics.jsonl")
    figure = new_figure()
    axes = figure.subplots()
    for index, (label, series) in enumerate(curves.items()):
        color = f"C{index % 10}"
        for name, (steps, values) in series.items():
            text = f"{label}, {name}"
            if name == "training":
                axes.plot(steps, values, color=color, linewidth=1.0, alpha=0.6, label=text)
            else:
                axes.plot(
                    steps, values, "o--", color=color, linewidth=1.8, markersize=5, label=text
                )
    axes.set_xlabel("step")
    axes.set_ylabel(f"{metric} (nats per token)" if metric == "loss" else metric)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def read_curves(path: str | os.PathLike[str], metric: str = "loss") -> dict[str, Curve]:
    """`{"training": (steps, values), "eval": ...}`: the metric's curves in a metrics.jsonl.

    A name without a path, or under `train`, is training; others are named by their path. Values
    that weren't finite are left out. Raises InputError if there are none at all.
    """
    curves: dict[str, Curve] = {}
    for record in read_jsonl(path):
        for key, value in record.items():
            *parents, name = key.split("/")
            if name == metric and value is not None:
                series = "training" if parents in ([], ["train"]) else "/".join(parents)
                steps, values = curves.setdefault(series, ([], []))
                steps.append(record["step"])
                values.append(value)
    if not curves:
        raise InputError(f"{path} holds no '{metric}': expected records such as '{metric}'")
    return curves


def new_figure() -> Any:
    """A figure without pyplot: no global state, no window, whatever the display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install t5x_lite[studies]") from error
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
