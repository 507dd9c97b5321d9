"""Evaluation of labels: what a head answers at its slots, scored by the task's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t5x_lite.data.objectives.base import is_labelled
from t5x_lite.data.pipeline import EvaluationBatches
from t5x_lite.evaluation.bootstrap import measure_all
from t5x_lite.types import InputError


@dataclass(frozen=True, kw_only=True)
class Label:
    """The task's metrics on what a SequenceHead or TokenHead predicts, with 95% intervals.

    Classes, tags, numbers or answers: what the task's objective asks for. Predictions are written
    beside the scores: each record with its `target` and `prediction`.
    """

    name: str
    batches: EvaluationBatches
    period: int = 1  # every so many evaluations, and always at the last step
    resamples: int = 1000  # 0: no intervals

    def __post_init__(self) -> None:
        task = self.batches.task
        if not is_labelled(task.objective):
            raise InputError(
                f"evaluation '{self.name}' asks for labels, but {type(task.objective).__name__} of "
                f"task '{task.name}' asks for tokens: use TeacherForced or Generate"
            )
        if not task.metrics:
            raise InputError(
                f"evaluation '{self.name}' has no metrics: set Task.metrics of '{task.name}', for "
                "instance to [@accuracy]"
            )

    def answers(self, step: int, scores: np.ndarray, weights: np.ndarray) -> list[dict[str, Any]]:
        """The records of batch `step`, each with its target and prediction.

        Args:
          step: of the batch.
          scores: float `[rows, slots, labels]`: the head's answer.
          weights: float `[rows, slots]`: 0 where a slot isn't used.
        """
        objective = self.batches.task.objective
        assert is_labelled(objective)
        return [
            {
                **record,
                "target": objective.truth(record),
                "prediction": objective.answer(record, row[used > 0]),
            }
            for record, row, used in zip(self.batches.records(step), scores, weights, strict=False)
        ]

    def right(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record as if it were answered rightly."""
        objective = self.batches.task.objective
        assert is_labelled(objective)
        truth = objective.truth(record)
        several = objective.asks == "span"  # answers, of which any is right
        return {**record, "target": truth, "prediction": truth[0] if several else truth}

    def score(
        self, records: Sequence[dict[str, Any]], resamples: int | None = None
    ) -> dict[str, float]:
        """The task's metrics on the records of all batches; `resamples`: None: its own."""
        task = self.batches.task
        clean = task.postprocess or (lambda value: value)
        targets, predictions = (
            [clean(record[name]) for record in records] for name in ("target", "prediction")
        )
        resamples = self.resamples if resamples is None else resamples
        return measure_all(task.metrics, targets, predictions, resamples)
