"""What fine-tuning forgets: the loss of pretraining against the score of what is learned.

From one pretrained model, several methods learn a task. At several steps of each run both are
measured on held-out text: the task, and what the model was pretrained for. A method that learns as
much and loses less is better, and so the comparison is at equal task loss, never at equal steps or
rates: a run that has learned nothing has forgotten nothing. (Biderman et al. 2024,
arXiv:2405.09673, find that LoRA learns less and forgets less.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax
from rich.console import Console

from t5x_lite.studies import pages
from t5x_lite.studies.cloze import Cloze
from t5x_lite.studies.spread import Spread, spread
from t5x_lite.studies.trials import Found, Method, Recipe, Trial, run_all, settings
from t5x_lite.train import run as runs
from t5x_lite.train.evaluate import Evaluator
from t5x_lite.train.opening import open_model
from t5x_lite.train.plots import new_figure
from t5x_lite.train.session import Session
from t5x_lite.types import InputError

Curve = Sequence[tuple[float, float]]  # (task loss, kept loss) by step
ZERO_SHOT: Final = "zero_shot"


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Which of the recipe's evaluations say what."""

    task_loss: str = "test/loss"
    kept_loss: str = "pretraining/loss"
    task_score: str = "generate/chrf"  # higher is better; measured where its evaluation is

    @property
    def evaluations(self) -> set[str]:
        return {name.split("/")[0] for name in (self.task_loss, self.kept_loss, self.task_score)}


@dataclass(frozen=True)
class Row:
    """A method, over its seeds."""

    method: str
    learning_rate: float
    trained: int
    task_loss: Spread
    task_score: Spread
    kept_loss: Spread  # at the end
    kept_at_level: Spread | None  # when the task loss first was at the level; None: never
    zero_shot: Spread | None
    minutes: float


def study_forgetting(
    *,
    output: str,
    recipe: Recipe,
    base: runs.RunCheckpoint,
    methods: Mapping[str, Method],
    steps: int,
    eval_period: int,
    seeds: Sequence[int] = (0, 1),
    measures: Measures = Measures(),
    zero_shot: Cloze | None = None,
    level: float | None = None,
    title: str = "Learned and forgotten",
    console: Console | None = None,
) -> list[Row]:
    """Writes `forgetting.json`, `.md`, `.png` and `.html` to `output`, and prints the table.

    Runs that are done are not done again: see `trials`.

    Args:
      output: the study's folder.
      recipe: what all runs share.
      base: the pretrained run, where every method starts (a Method's own `initial` is left alone
        if it has one).
      methods: by the name that they have in the table.
      steps: of each run.
      eval_period: steps between points of a curve.
      seeds: one run of each method for each.
      measures: which evaluations are the task's and which are pretraining's.
      zero_shot: asked before any training, and of each run's end.
      level: the task loss at which what is kept is compared; None: the lowest that all runs reach.
      title: of the plot.
    """
    names = {evaluation.name for evaluation in recipe.evaluations}
    if missing := measures.evaluations - names:
        raise InputError(
            f"study_forgetting.measures name the evaluation '{min(missing)}', which the recipe "
            f"lacks; it has: {', '.join(sorted(names)) or 'none'}"
        )
    if not 0 < eval_period <= steps:
        raise InputError(f"study_forgetting.eval_period={eval_period}: expected 1 to {steps}")
    methods = {
        name: method if method.initial else dataclasses.replace(method, initial=base)
        for name, method in methods.items()
    }
    before = measure_base(output, recipe, base, zero_shot)
    trials = [Trial(method=name, steps=steps, seed=seed) for seed in seeds for name in methods]

    def asked(folder: str) -> dict[str, float]:
        if zero_shot is None:
            return {}
        found = zero_shot.ask(open_model(folder, partitioner=recipe.partitioner))
        return {f"{ZERO_SHOT}/{name}": value for name, value in found.items()}

    found = run_all(
        output, recipe, methods, trials, eval_period=eval_period, then=asked, console=console
    )
    curves = {name: mean_curve(_of(found, name), measures) for name in methods}
    if level is None:
        level = max(min(task for task, _ in curve_of(one, measures)) for one in found)
    rows = [summarise(name, methods[name], _of(found, name), measures, level) for name in methods]
    if jax.process_index() == 0:
        _write(output, before, found, rows, curves, measures, level, title, console)
    return rows


def measure_base(
    output: str, recipe: Recipe, base: runs.RunCheckpoint, zero_shot: Cloze | None
) -> dict[str, float]:
    """All evaluations of the model that the methods start from; kept in `before.json`."""
    path = os.path.join(output, "before.json")
    # As a method that trains nothing has them.
    shown = settings(
        recipe,
        Method(learning_rate=0.0, initial=base),
        Trial(method="before", steps=0, seed=zero_shot.seed if zero_shot else 0),
    )
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        if record["settings"] == shown:
            return record["scores"]
    session = Session(recipe.model, partitioner=recipe.partitioner.at_hand())
    params = runs.load_params(base, recipe.model, session.partitioner)
    found = Evaluator(session, recipe.evaluations).run(params, {})
    if zero_shot is not None:
        asked = zero_shot.ask(open_model(base.model_dir, partitioner=recipe.partitioner))
        found |= {f"{ZERO_SHOT}/{name}": value for name, value in asked.items()}
    pages.write_json(path, {"settings": shown, "scores": found})
    return found


# --- pure ----------------------------------------------------------------------------------------


def curve_of(found: Found, measures: Measures) -> list[tuple[float, float]]:
    """(task loss, kept loss) at each step where both were measured."""
    return [
        (at[measures.task_loss], at[measures.kept_loss])
        for _, at in sorted(found.scores.items())
        if measures.task_loss in at and measures.kept_loss in at
    ]


def mean_curve(found: Sequence[Found], measures: Measures) -> list[tuple[float, float]]:
    """The mean of the seeds' curves, step by step."""
    curves = [curve_of(one, measures) for one in found]
    return [
        (sum(task for task, _ in at) / len(at), sum(kept for _, kept in at) / len(at))
        for at in zip(*curves, strict=True)
    ]


def at_level(curve: Curve, level: float) -> float | None:
    """The kept loss where the task loss first falls to `level`, between points on a line.

        curve (5.0, 4.2) (4.0, 4.6), level 4.5    4.4

    None if it never does.
    """
    for index, (task, kept) in enumerate(curve):
        if task <= level:
            if index == 0:
                return kept
            earlier, was = curve[index - 1]
            return was + (kept - was) * (earlier - level) / (earlier - task)
    return None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats: none is as low in both and lower in one. By first value.

    [(1, 5), (2, 3), (3, 4), (4, 1)]    [0, 1, 3]
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept, lowest = [], math.inf
    for index in order:
        if points[index][1] < lowest:
            kept.append(index)
            lowest = points[index][1]
    return kept


def summarise(
    name: str, method: Method, found: Sequence[Found], measures: Measures, level: float
) -> Row:
    """The method's row of the table, over its runs."""
    last = [one.last for one in found]
    kept = [at_level(curve_of(one, measures), level) for one in found]
    reached = [value for value in kept if value is not None]
    asked = f"{ZERO_SHOT}/accuracy"
    return Row(
        name,
        method.learning_rate,
        found[0].trained,
        spread([one[measures.task_loss] for one in last]),
        spread([one[measures.task_score] for one in last]),
        spread([one[measures.kept_loss] for one in last]),
        spread(reached) if len(reached) == len(found) else None,
        spread([one[asked] for one in last]) if asked in last[0] else None,
        sum(one.minutes for one in found) / len(found),
    )


def table(
    rows: Sequence[Row], before: Mapping[str, float], measures: Measures, level: float
) -> pages.Table:
    columns = (
        "method",
        "trained parameters",
        "rate",
        "task loss",
        measures.task_score.split("/")[-1],
        "pretraining loss",
        f"at task loss {level:.2f}",
        "cloze, %",
        "minutes",
    )
    first = before.get(f"{ZERO_SHOT}/accuracy")
    lines = [
        (
            "before",
            "",
            "",
            f"{before[measures.task_loss]:.3f}",
            f"{before[measures.task_score]:.1f}",
            f"{before[measures.kept_loss]:.3f}",
            "",
            "" if first is None else f"{first:.1f}",
            "",
        )
    ]
    for row in rows:
        lines.append(
            (
                row.method,
                f"{row.trained:,}",
                f"{row.learning_rate:g}",
                _pm(row.task_loss, 3),
                _pm(row.task_score, 1),
                _pm(row.kept_loss, 3),
                "not reached" if row.kept_at_level is None else _pm(row.kept_at_level, 3),
                "" if row.zero_shot is None else _pm(row.zero_shot, 1),
                f"{row.minutes:.1f}",
            )
        )
    return pages.Table("Learned and forgotten", columns, lines)


def plot(
    curves: Mapping[str, Curve], found: Sequence[Found], measures: Measures, title: str
) -> Any:
    """Kept loss against task loss, a curve a method, a dot an evaluation; the front in grey."""
    figure = new_figure()
    axes = figure.subplots()
    everything = [point for curve in curves.values() for point in curve]
    best = [everything[i] for i in front(everything)]
    axes.step(
        [task for task, _ in best],
        [kept for _, kept in best],
        where="post",
        color="0.75",
        linewidth=5,
        alpha=0.6,
        label="nothing better (Pareto front)",
        zorder=0,
    )
    for index, (name, curve) in enumerate(curves.items()):
        color = f"C{index % 10}"
        for one in _of(found, name):
            own = curve_of(one, measures)
            axes.plot(*zip(*own, strict=True), color=color, linewidth=0.6, alpha=0.4)
        axes.plot(*zip(*curve, strict=True), "o-", color=color, ms=4, linewidth=1.6, label=name)
    start = next(iter(curves.values()))[0]
    axes.plot(*start, "*", color="k", ms=13, label="pretrained model", zorder=5)
    axes.set_xlabel(f"{measures.task_loss}, nats per token (learned: to the left)")
    axes.set_ylabel(f"{measures.kept_loss}, nats per token (forgotten: up)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


# --- files ---------------------------------------------------------------------------------------


def _write(
    output: str,
    before: Mapping[str, float],
    found: Sequence[Found],
    rows: Sequence[Row],
    curves: Mapping[str, Curve],
    measures: Measures,
    level: float,
    title: str,
    console: Console | None,
) -> None:
    console = console or Console(width=max(Console().width, 130))
    seeds = len({one.trial.seed for one in found})
    note = (
        f"Means over {seeds} seeds, +- half of Student's 95% interval of the mean."
        if seeds > 1
        else "One seed: no interval."
    ) + f" Compared at task loss {level:.3f}, where each method's curve first is that low."
    made = table(rows, before, measures, level)
    figure = plot(curves, found, measures, title)
    paths = pages.write(output, "forgetting", title=title, figure=figure, tables=[made], note=note)
    record = {
        "before": dict(before),
        "level": level,
        "rows": [dataclasses.asdict(row) for row in rows],
        "front": _named_front(curves),
        "runs": [
            {**dataclasses.asdict(one.trial), "scores": one.scores, **one.more} for one in found
        ],
    }
    pages.write_json(os.path.join(output, "forgetting.json"), record)
    made.show(console)
    console.print(note)
    console.print(f"Written: {', '.join(paths)}, forgetting.json", soft_wrap=True)


def _named_front(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """The Pareto front of all methods' mean curves, from the lowest task loss on."""
    points = [(name, point) for name, curve in curves.items() for point in curve]
    return [
        {"method": points[i][0], "task_loss": points[i][1][0], "kept_loss": points[i][1][1]}
        for i in front([point for _, point in points])
    ]


def _of(found: Sequence[Found], method: str) -> list[Found]:
    return [one for one in found if one.trial.method == method]


def _pm(values: Spread, digits: int) -> str:
    mean = f"{values.mean:.{digits}f}"
    return mean if math.isnan(values.low) else f"{mean} ± {values.high - values.mean:.{digits}f}"
