"""Scores of predicted texts against target texts, all in percent.

A metric is a function `(targets, predictions) -> {name: value}` over a whole evaluation set.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from t5x_lite.types import InputError

Metric: TypeAlias = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """`exact_match`: the percentage of predictions equal to their target, to the character."""
    _check(targets, predictions)
    hits = sum(t == p for t, p in zip(targets, predictions, strict=True))
    return {"exact_match": 100.0 * hits / len(targets)}


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """`bleu`: corpus BLEU (Papineni et al. 2002) as sacrebleu computes it by default.

    0 to 100; tokenizer 13a, case kept, exponential smoothing (Post 2018, arXiv:1804.08771).
    """
    _check(targets, predictions)
    score = _sacrebleu().corpus_bleu(list(predictions), [list(targets)])
    return {"bleu": float(score.score)}


def chrf(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """`chrf`: chrF2, an F-score of character 1- to 6-grams (Popovic 2015), by sacrebleu; 0 to 100.

    Steadier than BLEU on small sets and short sentences.
    """
    _check(targets, predictions)
    score = _sacrebleu().corpus_chrf(list(predictions), [list(targets)])
    return {"chrf": float(score.score)}


def _check(targets: Sequence[str], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions):
        raise InputError(
            f"a metric got {len(targets)} targets and {len(predictions)} predictions; "
            "expected one prediction for each target"
        )
    if not targets:
        raise InputError("a metric got no examples: is the evaluation split empty?")


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu")
    except ImportError as error:
        raise InputError(
            "BLEU and chrF need the package sacrebleu: pip install t5x_lite[eval]"
        ) from error
