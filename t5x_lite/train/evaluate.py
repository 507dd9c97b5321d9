"""Evaluation in the loop and alone: teacher-forced loss, and generate-and-score."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from t5x_lite import types
from t5x_lite.data.pipeline import EvaluationBatches, iterate
from t5x_lite.decode import prompts
from t5x_lite.decode.generate import generate
from t5x_lite.decode.sampling import Greedy, Strategy
from t5x_lite.train.session import Session
from t5x_lite.train.step import eval_step
from t5x_lite.types import InputError, Params

PREDICTIONS = "predictions"


@dataclass(frozen=True, kw_only=True)
class TeacherForced:
    """Loss and accuracy of the next token, given the true ones before it: `<name>/loss`, ..."""

    name: str
    batches: EvaluationBatches
    period: int = 1  # every so many evaluations, and always at the last step


@dataclass(frozen=True, kw_only=True)
class Generate:
    """The task's metrics on decoded text; predictions are written beside the scores."""

    name: str
    batches: EvaluationBatches
    max_tokens: int = 64  # the most new tokens of a prediction
    period: int = 1
    strategy: Strategy = Greedy()  # Sampling draws by the run's seed

    def __post_init__(self) -> None:
        if not self.batches.task.metrics:
            raise InputError(
                f"evaluation '{self.name}' generates, but task '{self.batches.task.name}' has no "
                "metrics: set Task.metrics, for instance to [@chrf, @bleu]"
            )


Evaluation = TeacherForced | Generate


class Evaluator:
    """Runs evaluations on one session's parameters; each compiles its program once."""

    def __init__(self, session: Session, evaluations: Sequence[Evaluation]):
        names = [evaluation.name for evaluation in evaluations]
        if len(set(names)) < len(names):
            raise InputError(f"two evaluations have one name: {', '.join(names)}; rename one")
        self.session, self.evaluations = session, tuple(evaluations)
        model, transform = session.model, session.transform
        replicated = session.partitioner.replicated

        def decode(
            params: Params,
            frozen: Params,
            batch: types.Batch,
            number: int,
            how: tuple[Strategy, int],
            ids: tuple[int, int, int],
        ) -> types.Array:
            strategy, max_tokens = how
            eos, pad, start = ids
            return generate(
                model,
                transform.apply(params, frozen),
                prompts.of_batch(batch),
                strategy=strategy,
                max_tokens=max_tokens,
                eos_id=eos,
                pad_id=pad,
                start_id=start,
                rng=jax.random.fold_in(jax.random.key(session.seed), number),
            )

        self._score = jax.jit(
            functools.partial(eval_step, model=model, transform=transform),
            out_shardings=replicated,
        )
        # Replicated, so that every process can read every row.
        self._decode = jax.jit(decode, static_argnums=(4, 5), out_shardings=replicated)

    def run(
        self,
        params: Params,
        frozen: Params,
        *,
        which: Iterable[Evaluation] | None = None,
        predictions: str | None = None,
    ) -> dict[str, float]:
        """Metrics by `<evaluation>/<metric>`.

        Args:
          params, frozen: the session's trainable and frozen parameters.
          which: some of the evaluations; None: all.
          predictions: path with a `{name}` to write what was generated to, as JSON lines.
        """
        found: dict[str, float] = {}
        for evaluation in self.evaluations if which is None else which:
            if isinstance(evaluation, TeacherForced):
                values = self._teacher_forced(evaluation, params, frozen)
            else:
                path = None if predictions is None else predictions.format(name=evaluation.name)
                values = self._generate(evaluation, params, frozen, path)
            found |= {f"{evaluation.name}/{key}": value for key, value in values.items()}
        return found

    def _batches(self, batches: EvaluationBatches) -> Iterable[dict[str, jax.Array]]:
        partitioner = self.session.partitioner
        rows = partitioner.local_rows(batches.batch_size)
        for batch in iterate(batches, rows=rows):
            yield partitioner.put_batch(batch, batches.batch_size)

    def _teacher_forced(
        self, evaluation: TeacherForced, params: Params, frozen: Params
    ) -> dict[str, float]:
        with self.session.partitioner.activate():
            sums = [self._score(params, frozen, b) for b in self._batches(evaluation.batches)]
        # Read once, at the end: the device never waits for the host between batches.
        total: dict[str, Any] = jax.tree.map(lambda *values: np.sum(values), *jax.device_get(sums))
        weight = max(float(total["weight"]), 1e-9)
        return {
            "loss": float(total["cross_entropy"]) / weight,
            "accuracy": float(total["accuracy"]) / weight,
        }

    def _generate(
        self, evaluation: Generate, params: Params, frozen: Params, path: str | None
    ) -> dict[str, float]:
        task = evaluation.batches.task
        vocabulary = task.vocabulary
        decoded: list[jax.Array] = []
        with self.session.partitioner.activate():
            how = evaluation.strategy, evaluation.max_tokens
            for number, batch in enumerate(self._batches(evaluation.batches)):
                ids = (vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id)
                decoded.append(self._decode(params, frozen, batch, number, how, ids))
        records: list[dict[str, Any]] = []
        for step, tokens in enumerate(jax.device_get(decoded)):
            real = evaluation.batches.records(step)
            for record, row in zip(real, tokens[: len(real)], strict=True):
                records.append({**record, "prediction": vocabulary.decode(row)})
        clean = task.postprocess or (lambda text: text)
        targets = [clean(record["targets"]) for record in records]
        predicted = [clean(record["prediction"]) for record in records]
        if path is not None and jax.process_index() == 0:
            write_jsonl(path, records)
        scores: dict[str, float] = {}
        for metric in task.metrics:
            scores |= metric(targets, predicted)
        return scores


def write_jsonl(path: str, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    os.replace(path + ".tmp", path)
