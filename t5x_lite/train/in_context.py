"""A model asked in context: scores by the number of shots, with intervals, and what it answered."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from t5x_lite.evaluation import fewshot
from t5x_lite.evaluation.bootstrap import with_intervals
from t5x_lite.sharding import Partitioner
from t5x_lite.train.evaluate import write_jsonl
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError


def evaluate_in_context(
    *,
    model_dir: str,
    task: fewshot.InContext,
    output: str,
    shots: Sequence[int] = (0, 1, 2, 4),
    adapter: str | None = None,
    step: int | None = None,
    batch_size: int = 8,
    samples: int = 1000,
    partitioner: Partitioner = Partitioner(),
) -> list[dict[str, Any]]:
    """Scores a task with k solved examples in front of each question, for every k.

    Args:
      model_dir: a run's folder, or a Hugging Face directory.
      task: its records, template and answers.
      output: a folder for `table.md`, `scores.jsonl`, and `predictions-<k>.jsonl`: prompt, shots,
        target, answer and, of choices, their scores.
      shots: the values of k.
      adapter: a PEFT directory, or a run that was tuned on `model_dir`.
      step: the checkpoint; None: the latest.
      batch_size: prompts that are read together; a prompt's choices share its cache.
      samples: resamples of the bootstrap, for intervals of 95%.
      partitioner: the mesh.

    Returns:
      One record a k: `shots`, `examples`, and each metric's value, `_low` and `_high`. With
      choices, a last one without `shots`: the commonest target as the answer to everything.
    """
    shots = tuple(shots)
    if not shots or len(set(shots)) < len(shots):
        raise InputError(
            f"evaluate_in_context.shots={shots}: expected different numbers, from 0 on"
        )
    loaded = open_model(model_dir, adapter=adapter, step=step, partitioner=partitioner)
    rows: list[dict[str, Any]] = []
    main, targets = jax.process_index() == 0, []
    for count in shots:
        answers = fewshot.answer(loaded, task, count, batch_size=batch_size)
        targets = [record["target"] for record in answers]
        given = [record["prediction"] for record in answers]
        rows.append({"shots": count, **_scores(task, targets, given, samples)})
        if main:
            write_jsonl(os.path.join(output, f"predictions-{count}.jsonl"), answers)
    if isinstance(task.answer, fewshot.Choose):
        commonest = Counter(targets).most_common(1)[0][0]
        same = [commonest] * len(targets)
        rows.append({"always": commonest, **_scores(task, targets, same, samples)})
    if main:
        write_jsonl(os.path.join(output, "scores.jsonl"), rows)
        text = table(task.name, rows)
        with open(os.path.join(output, "table.md"), "w", encoding="utf-8") as file:
            file.write(text)
        Console(soft_wrap=True).print(text, markup=False, highlight=False)
    return rows


def _scores(
    task: fewshot.InContext, targets: list[str], given: list[str], samples: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"examples": len(targets)}
    for metric in task.metrics:
        found |= with_intervals(metric, targets, given, samples=samples)
    return found


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The scores as Markdown, one row a number of shots, with 95% intervals."""
    kept = ("shots", "always", "examples")
    names = [key for key in rows[0] if key not in kept and f"{key}_low" in rows[0]]
    lines = [f"| {name}, shots | examples | {' | '.join(names)} |"]
    lines.append("|---" * (2 + len(names)) + "|")
    for row in rows:
        label = row["shots"] if "shots" in row else f"always '{row['always']}'"
        values = [
            f"{row[key]:.1f} [{row[f'{key}_low']:.1f}, {row[f'{key}_high']:.1f}]" for key in names
        ]
        lines.append(f"| {label} | {row['examples']} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"
