"""What pretraining is worth: fine-tuning from pretrained and from random weights, by examples.

Each method learns from the same labelled examples in the same order for the same steps, at several
numbers of examples and with several seeds, which draw the examples, their order, fresh weights and
dropout. Where the curves meet, pretraining has been paid for by labels (Hernandez et al. 2021,
arXiv:2102.01293, call the distance between them the data that transfer is worth).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console

from t5x_lite.studies import pages
from t5x_lite.studies.spread import Spread, spread
from t5x_lite.studies.trials import Found, Method, Recipe, Trial, run_all
from t5x_lite.train.plots import new_figure
from t5x_lite.types import InputError


@dataclass(frozen=True)
class Point:
    """A method's score from so many examples, over the seeds."""

    method: str
    examples: int
    steps: int
    values: tuple[float, ...]  # by seed
    spread: Spread
    trained: int  # parameters
    minutes: float  # mean by the clock of a run, its evaluation included
    cpu_minutes: float


def study_pretraining(
    *,
    output: str,
    recipe: Recipe,
    methods: Mapping[str, Method],
    budgets: Mapping[int, int],
    metric: str,
    seeds: Sequence[int] = (0, 1, 2),
    title: str = "Fine-tuning by number of labelled examples",
    console: Console | None = None,
) -> list[Point]:
    """Writes `transfer.json`, `.md`, `.png` and `.html` to `output`, and prints the table.

    Runs that are done are not done again: see `trials`.

    Args:
      output: the study's folder.
      recipe: what all runs share.
      methods: by the name that they have in the table; the first is what others are compared with.
      budgets: numbers of labelled examples, and the steps of training on each.
      metric: `<evaluation>/<metric>`, such as "test/accuracy".
      seeds: one run of each method on each number of examples for each.
      title: of the plot.

    Returns:
      One point a method and number of examples.
    """
    seeds, budgets = tuple(seeds), dict(sorted(budgets.items()))
    if not methods or not budgets or not seeds:
        raise InputError("study_pretraining needs a method, a number of examples and a seed")
    names = {evaluation.name for evaluation in recipe.evaluations}
    if metric.split("/")[0] not in names:
        raise InputError(
            f"study_pretraining.metric='{metric}' is of no evaluation; there are: "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    for examples in budgets:
        recipe.batches_of(examples, 0)  # fewer than asked for: an error now, and not in an hour
    # Seed by seed: a study that is stopped has all methods with fewer seeds.
    trials = [
        Trial(method=method, steps=steps, seed=seed, examples=examples)
        for seed in seeds
        for examples, steps in budgets.items()
        for method in methods
    ]
    found = run_all(output, recipe, methods, trials, console=console)
    points = summarise(found, metric)
    if jax.process_index() == 0:
        _write(output, points, found, metric, title, console)
    return points


def summarise(found: Sequence[Found], metric: str) -> list[Point]:
    """One point a method and number of examples, in the trials' order."""
    groups: dict[tuple[str, int | None, int], list[Found]] = {}
    for one in found:
        key = one.trial.method, one.trial.examples, one.trial.steps
        groups.setdefault(key, []).append(one)
    points = []
    for (method, examples, steps), ones in groups.items():
        missing = next((one for one in ones if metric not in one.last), None)
        if missing is not None:
            raise InputError(
                f"'{missing.trial}' has no '{metric}'; it measured: {', '.join(missing.last)}"
            )
        assert examples is not None
        values = tuple(one.last[metric] for one in ones)
        minutes = sum(one.minutes for one in ones) / len(ones)
        cpu = sum(one.cpu_minutes for one in ones) / len(ones)
        points.append(
            Point(method, examples, steps, values, spread(values), ones[0].trained, minutes, cpu)
        )
    return points


def differences(points: Sequence[Point]) -> list[tuple[str, int, Spread]]:
    """The first method's scores minus each other's, seed by seed: (other, examples, spread)."""
    first = {p.examples: p for p in points if p.method == points[0].method}
    return [
        (p.method, p.examples, spread([a - b for a, b in zip(own.values, p.values, strict=True)]))
        for p in points
        if p.method != points[0].method and (own := first[p.examples])
    ]


def tables(points: Sequence[Point], metric: str) -> list[pages.Table]:
    """Scores by number of examples, differences, and what each method costs."""
    methods = list(dict.fromkeys(p.method for p in points))
    counts = list(dict.fromkeys(p.examples for p in points))
    at = {(p.method, p.examples): p for p in points}
    scores = [[f"{n:,}", *(str(at[m, n].spread) for m in methods)] for n in counts]
    apart = {(other, n): s for other, n, s in differences(points)}
    minus = [[f"{n:,}", *(str(apart[m, n]) for m in methods[1:])] for n in counts]
    cost = [
        [
            m,
            f"{at[m, n].trained:,}",
            f"{n:,}",
            f"{at[m, n].steps:,}",
            f"{at[m, n].minutes:.1f}",
            f"{at[m, n].cpu_minutes:.1f}",
        ]
        for m in methods
        for n in counts
    ]
    columns = ("method", "trained parameters", "examples", "steps", "minutes", "CPU-minutes")
    made = [pages.Table(metric, ("examples", *methods), scores)]
    if len(methods) > 1:
        title = f"{metric}: {methods[0]} minus"
        made.append(pages.Table(title, ("examples", *methods[1:]), minus))
    return [*made, pages.Table("What a run costs", columns, cost)]


def plot(points: Sequence[Point], metric: str, title: str) -> Any:
    """Score against examples, a curve a method with a band of its interval and a dot a seed."""
    figure = new_figure()
    axes = figure.subplots()
    for index, method in enumerate(dict.fromkeys(p.method for p in points)):
        curve = sorted((p for p in points if p.method == method), key=lambda p: p.examples)
        places, color = [p.examples for p in curve], f"C{index % 10}"
        axes.plot(places, [p.spread.mean for p in curve], "o-", color=color, label=method)
        low, high = [p.spread.low for p in curve], [p.spread.high for p in curve]
        if len(curve) > 1:
            axes.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
        else:  # a band has no width in a single place
            axes.vlines(places, low, high, color=color, alpha=0.4, linewidth=6)
        for point in curve:
            axes.plot([point.examples] * len(point.values), point.values, ".", color=color, ms=4)
    axes.set_xscale("log")
    axes.set_xlabel("labelled examples")
    axes.set_ylabel(metric)
    axes.set_title(title)
    # One lucky band should not make the axis: the values are what is to be seen.
    values = [value for point in points for value in point.values]
    margin = 0.15 * (max(values) - min(values) or 1.0)
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _write(
    output: str,
    points: Sequence[Point],
    found: Sequence[Found],
    metric: str,
    title: str,
    console: Console | None,
) -> None:
    console = console or Console(width=max(Console().width, 110))
    count = len(points[0].values)
    note = (
        f"Means over {count} seeds with Student's 95% interval of the mean; a seed draws the "
        "examples, their order, fresh weights and dropout. Differences are taken seed by seed."
        if count > 1
        else "One seed: no interval."
    )
    record = {
        "metric": metric,
        "points": [dataclasses.asdict(point) for point in points],
        "differences": [
            {"minus": other, "examples": n, **dataclasses.asdict(s)}
            for other, n, s in differences(points)
        ],
        "runs": [
            {**dataclasses.asdict(one.trial), "scores": dict(one.last), "minutes": one.minutes}
            for one in found
        ],
    }
    made = tables(points, metric)
    paths = pages.write(
        output, "transfer", title=title, figure=plot(points, metric, title), tables=made, note=note
    )
    pages.write_json(os.path.join(output, "transfer.json"), record)
    for table in made:
        table.show(console)
    console.print(note)
    console.print(f"Written: {', '.join(paths)}, transfer.json", soft_wrap=True)
