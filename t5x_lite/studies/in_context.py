"""Does a model learn in context, and what taught it to? Accuracy against shots, with a control.

Two models of one shape and one budget: one pretrained on texts in which a key's value is what the
text itself showed (`data.mappings`), the other on texts of the same keys, values and pairs in which
nothing shows anything. Both are asked for values in texts with a mapping that they never saw.
After Chan et al. (2022, arXiv:2205.05055) and Garg et al. (2022, arXiv:2208.01066).
"""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from t5x_lite.data.mappings import Mappings
from t5x_lite.decode.choices import choices
from t5x_lite.decode.loaded import Loaded
from t5x_lite.evaluation.bootstrap import with_intervals
from t5x_lite.evaluation.metrics import exact_match
from t5x_lite.sharding import Partitioner
from t5x_lite.train.evaluate import write_jsonl
from t5x_lite.train.opening import open_model
from t5x_lite.train.plots import new_figure
from t5x_lite.types import InputError

# What a mapping asked about is made of.
ASKED = {"validation": "new mappings", "held_out": "mappings of pairs never seen"}


@dataclass(frozen=True)
class Point:
    """A model's accuracy behind so many shots, in percent."""

    model: str
    split: str
    shots: int
    examples: int
    accuracy: float
    low: float  # of an interval of 95%
    high: float
    shown: float  # of the questions' keys, in percent: their value stood in the prompt


def study_in_context(
    *,
    structured: str,
    control: str,
    output: str,
    texts: Mappings = Mappings(),
    shots: Sequence[int] = (0, 1, 2, 4, 8, 16, 31),
    examples: int = 500,
    batch_size: int = 50,
    samples: int = 1000,
    partitioner: Partitioner = Partitioner(),
) -> list[Point]:
    """Writes `in_context.png`, `in_context.md` and `in_context.jsonl`, and prints the table.

    Args:
      structured, control: the folders of the two runs.
      output: the folder to write to.
      texts: what is asked about: structured ones, of the splits "validation" and "held_out".
      shots: pairs of key and value before the key that is asked for.
      examples: of each split, the same for each number of shots.
      batch_size: prompts at a time.
      samples: resamples of the bootstrap.
      partitioner: the mesh.

    Returns:
      One point a model, split and number of shots.
    """
    shots = tuple(shots)
    if not shots or min(shots) < 0 or max(shots) >= texts.pairs:
        raise InputError(
            f"study_in_context.shots={shots}: expected numbers from 0 to {texts.pairs - 1}, for a "
            f"text has {texts.pairs} pairs (Mappings.pairs)"
        )
    points: list[Point] = []
    for name, folder in (("structured", structured), ("control", control)):
        loaded = open_model(folder, partitioner=partitioner)
        for split in ASKED:
            for count in shots:
                points.append(
                    measure(loaded, name, texts, split, count, examples, batch_size, samples)
                )
    if jax.process_index() == 0:
        chance = 100.0 / (texts.values - texts.values // texts.held_out)
        write_jsonl(os.path.join(output, "in_context.jsonl"), map(asdict, points))
        plot(points, chance, os.path.join(output, "in_context.png"))
        found = table(points)
        Path(output, "in_context.md").write_text(found, encoding="utf-8")
        Console(soft_wrap=True).print(found, markup=False, highlight=False)
    return points


def measure(
    loaded: Loaded,
    name: str,
    texts: Mappings,
    split: str,
    shots: int,
    examples: int,
    batch_size: int,
    samples: int,
) -> Point:
    """The share of keys whose right value is the likeliest of all, behind so many pairs."""
    records = texts.open(split)
    values = string.ascii_uppercase[: texts.values]
    asked = [records[index]["text"][: 2 * shots + 2] for index in range(examples)]
    questions = [(text[:-1], values) for text in asked]
    scores = choices(loaded, questions, batch_size=batch_size)
    best = [values[int(np.argmax([score.logprob for score in row]))] for row in scores]
    found = with_intervals(exact_match, [text[-1] for text in asked], best, samples=samples)
    shown = 100.0 * float(np.mean([text[-2] in text[:-2] for text in asked]))
    low, high = found["exact_match_low"], found["exact_match_high"]
    return Point(name, split, shots, examples, found["exact_match"], low, high, shown)


def table(points: Sequence[Point]) -> str:
    """Accuracy in percent with its interval, as Markdown: a row a number of shots."""
    lines = []
    for split, what in ASKED.items():
        part = [point for point in points if point.split == split]
        names = list(dict.fromkeys(point.model for point in part))
        lines += [
            f"| shots, {what} | {' | '.join(names)} | value shown |",
            "|---" * (2 + len(names)) + "|",
        ]
        for shots in dict.fromkeys(point.shots for point in part):
            row = [point for point in part if point.shots == shots]
            cells = [f"{p.accuracy:.1f} [{p.low:.1f}, {p.high:.1f}]" for p in row]
            lines.append(f"| {shots} | {' | '.join(cells)} | {row[0].shown:.1f} |")
        lines.append("")
    return "\n".join(lines)


def plot(points: Sequence[Point], chance: float, path: str) -> None:
    """Accuracy against shots with intervals; dotted: how often the prompt held the answer."""
    figure = new_figure()
    for axes, (split, what) in zip(figure.subplots(1, 2, sharey=True), ASKED.items(), strict=True):
        part = [point for point in points if point.split == split]
        for index, name in enumerate(dict.fromkeys(point.model for point in part)):
            curve = [point for point in part if point.model == name]
            places = [point.shots for point in curve]
            low, high = [point.low for point in curve], [point.high for point in curve]
            axes.fill_between(places, low, high, color=f"C{index}", alpha=0.25, linewidth=0)
            accuracy = [point.accuracy for point in curve]
            axes.plot(
                places, accuracy, "o-", color=f"C{index}", label=f"pretrained on {name} texts"
            )
        first = [point for point in part if point.model == part[0].model]
        shown = [point.shown for point in first]
        axes.plot([p.shots for p in first], shown, ":", color="0.4", label="value is in the prompt")
        if split == "validation":
            axes.axhline(chance, color="0.7", linewidth=0.8, label="guessing among values seen")
        axes.set_title(what)
        axes.set_xlabel("shots")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend(frameon=False, loc="center right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
