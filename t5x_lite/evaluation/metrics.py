"""Scores of predicted texts against target texts, all in percent.

A metric is a function `(targets, predictions) -> {name: value}` over a whole evaluation set. A
target is a text, or a sequence of texts of which any will do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from t5x_lite.evaluation.additive import Statistics, additive, percentages
from t5x_lite.types import InputError

Target: TypeAlias = str | Sequence[str]
Metric: TypeAlias = Callable[[Sequence[Target], Sequence[str]], dict[str, float]]


@additive
def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> Statistics:
    """`exact_match`: the percentage of predictions equal to their target, to the character."""
    hits = [[p in references(t)] for t, p in zip(targets, predictions, strict=True)]
    return percentages(["exact_match"], hits)


@additive
def bleu(targets: Sequence[Target], predictions: Sequence[str]) -> Statistics:
    """`bleu`: corpus BLEU (Papineni et al. 2002) as sacrebleu computes it by default.

    0 to 100; tokenizer 13a, case kept, exponential smoothing (Post 2018, arXiv:1804.08771).
    """
    return _sacrebleu("bleu", "BLEU", targets, predictions)


@additive
def chrf(targets: Sequence[Target], predictions: Sequence[str]) -> Statistics:
    """`chrf`: chrF2, an F-score of character 1- to 6-grams (Popovic 2015), by sacrebleu; 0 to 100.

    Steadier than BLEU on small sets and short sentences.
    """
    return _sacrebleu("chrf", "CHRF", targets, predictions)


def references(target: Target) -> tuple[str, ...]:
    """The texts of a target."""
    return (target,) if isinstance(target, str) else tuple(target)


def _sacrebleu(
    name: str, kind: str, targets: Sequence[Target], predictions: Sequence[str]
) -> Statistics:
    """A sacrebleu metric's own sentence statistics, and its own score of their sum.

    Both are methods that sacrebleu's bootstrap calls on its metrics (`sacrebleu.significance`).
    """
    metric = getattr(require("sacrebleu", "BLEU and chrF"), kind)()
    several = [references(target) for target in targets]
    width = max(map(len, several))
    streams = [[r[i] if i < len(r) else None for r in several] for i in range(width)]
    rows: np.ndarray = np.array(metric._extract_corpus_statistics(predictions, streams), np.float64)

    def score(total: np.ndarray) -> dict[str, float]:
        return {name: metric._compute_score_from_stats(total.round().astype(int).tolist()).score}

    return Statistics(rows, score)


def require(package: str, what: str) -> Any:
    """The imported package. Raises InputError, saying how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0].replace("_", "-")
        raise InputError(f"{what} need the package {name}: pip install t5x_lite[eval]") from error
