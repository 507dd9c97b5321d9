"""Evaluation in the loop and alone: teacher-forced loss, and generate-and-score."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import programs, types
from t5x_lite.data.objectives.base import is_labelled
from t5x_lite.data.pipeline import EvaluationBatches, iterate
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Vocabulary, count_bytes
from t5x_lite.decode import prompts
from t5x_lite.decode.generate import generate
from t5x_lite.decode.sampling import Greedy, Strategy
from t5x_lite.evaluation.bootstrap import measure_all
from t5x_lite.train.label_evaluation import Label
from t5x_lite.train.losses import MEANS
from t5x_lite.train.session import Session
from t5x_lite.train.step import eval_step
from t5x_lite.types import InputError, Params

PREDICTIONS = "predictions"


@dataclass(frozen=True, kw_only=True)
class TeacherForced:
    """How well each token is foretold, given the true ones before it: `<name>/loss`, ...

    `loss` is in nats a token, `accuracy` a share of tokens, `perplexity` exp(loss). Of a decoder's
    targets also `bits_per_byte`: all their bits over the bytes of UTF-8 of their text, so that
    models of different vocabularies compare; what specials cost (eos, sentinels) is in it.
    """

    name: str
    batches: EvaluationBatches
    period: int = 1  # every so many evaluations, and always at the last step


@dataclass(frozen=True, kw_only=True)
class Generate:
    """The task's metrics on decoded text; predictions are written beside the scores.

    Beside each `<name>/<metric>` stand `<metric>_low` and `<metric>_high`, which hold 95% of its
    values on resamples of the examples: see `evaluation.bootstrap`.
    """

    name: str
    batches: EvaluationBatches
    max_tokens: int = 64  # the most new tokens of a prediction
    period: int = 1
    strategy: Strategy = Greedy()  # Sampling draws by the run's seed
    resamples: int = 1000  # 0: no intervals

    def __post_init__(self) -> None:
        if not self.batches.task.metrics:
            raise InputError(
                f"evaluation '{self.name}' generates, but task '{self.batches.task.name}' has no "
                "metrics: set Task.metrics, for instance to [@chrf, @bleu]"
            )


Evaluation = TeacherForced | Generate | Label


def behind_prompt(session: Session, evaluations: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """The evaluations with the session's soft prompt, if it has one, in front of every example."""
    if not session.prompt_ids:
        return tuple(evaluations)

    def behind(evaluation: Evaluation) -> Evaluation:
        task = evaluation.batches.task.behind(session.prompt_ids)
        batches = dataclasses.replace(evaluation.batches, task=task)
        return dataclasses.replace(evaluation, batches=batches)

    return tuple(map(behind, evaluations))


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

        def score(
            params: Params, frozen: Params, batch: types.Batch, nbytes: types.Array
        ) -> dict[str, types.Array]:
            sums = eval_step(params, frozen, batch, model=model, transform=transform)
            return {**sums, "bytes": jnp.sum(nbytes)}

        def label(
            params: Params, frozen: Params, batch: types.Batch
        ) -> tuple[types.Array, types.Array]:
            scores = model.apply({"params": transform.apply(params, frozen)}, batch)
            return scores.astype(jnp.float32), batch[types.MASKED_LOSS_WEIGHTS]

        scored = jax.jit(score, out_shardings=replicated)
        self._score = programs.Kept(scored, session.partitioner, session.config, transform)
        self._label = jax.jit(label, out_shardings=replicated)
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
                if isinstance(evaluation, Label):
                    values = self._labels(evaluation, params, frozen, path)
                else:
                    values = self._generate(evaluation, params, frozen, path)
            found |= {f"{evaluation.name}/{key}": value for key, value in values.items()}
        return found

    def _batches(self, batches: EvaluationBatches) -> Iterator[dict[str, Any]]:
        """This process's rows, and so that every process has as many batches."""
        yield from iterate(batches, rows=self.session.partitioner.local_rows(batches.batch_size))

    def _teacher_forced(
        self, evaluation: TeacherForced, params: Params, frozen: Params
    ) -> dict[str, float]:
        put, size = self.session.partitioner.put_batch, evaluation.batches.batch_size
        vocabulary = evaluation.batches.task.vocabulary
        sums = []
        with self.session.partitioner.activate():
            for batch in self._batches(evaluation.batches):
                # Rows go to devices, and so do their bytes: each is counted on one of them.
                nbytes = put({"bytes": target_bytes(batch, vocabulary)}, size)["bytes"]
                sums.append(self._score(params, frozen, put(batch, size), nbytes))
        # Read once, at the end: the device never waits for the host between batches.
        total: dict[str, Any] = jax.tree.map(
            lambda *values: np.sum(values, dtype=np.float64), *jax.device_get(sums)
        )
        weight = max(float(total["weight"]), 1e-9)
        means = {name: float(total[name]) / weight for name in MEANS if name in total}
        loss = means.get("cross_entropy", means.get("squared_error", 0.0))
        found = {"loss": loss}
        if "accuracy" in means:
            found["accuracy"] = means["accuracy"]
        if not is_labelled(evaluation.batches.task.objective):
            found["perplexity"] = math.exp(min(loss, 700.0))  # beyond, no float holds it
        if total["bytes"] > 0:
            bits = float(total["cross_entropy"]) / math.log(2)
            found["bits_per_byte"] = bits / float(total["bytes"])
        return found

    def _generate(
        self, evaluation: Generate, params: Params, frozen: Params, path: str | None
    ) -> dict[str, float]:
        task = evaluation.batches.task
        vocabulary = task.vocabulary
        decoded: list[jax.Array] = []
        with self.session.partitioner.activate():
            how = evaluation.strategy, evaluation.max_tokens
            for number, rows in enumerate(self._batches(evaluation.batches)):
                batch = self.session.partitioner.put_batch(rows, evaluation.batches.batch_size)
                ids = (vocabulary.eos_id, vocabulary.pad_id, vocabulary.start_id)
                decoded.append(self._decode(params, frozen, batch, number, how, ids))
        records: list[dict[str, Any]] = []
        for step, tokens in enumerate(jax.device_get(decoded)):
            real = evaluation.batches.records(step)
            for record, row in zip(real, tokens[: len(real)], strict=True):
                records.append({**record, "prediction": vocabulary.decode(row)})
        if path is not None and jax.process_index() == 0:
            write_jsonl(path, records)
        return score_records(task, records, evaluation.resamples)

    def _labels(
        self, evaluation: Label, params: Params, frozen: Params, path: str | None
    ) -> dict[str, float]:
        put, size = self.session.partitioner.put_batch, evaluation.batches.batch_size
        with self.session.partitioner.activate():
            found = [
                self._label(params, frozen, put(batch, size))
                for batch in self._batches(evaluation.batches)
            ]
        records: list[dict[str, Any]] = []
        for step, (scores, weights) in enumerate(jax.device_get(found)):
            records += evaluation.answers(step, scores, weights)
        if path is not None and jax.process_index() == 0:
            write_jsonl(path, records)
        return evaluation.score(records)


def score_records(
    task: Task, records: Sequence[Mapping[str, Any]], resamples: int = 0
) -> dict[str, float]:
    """The task's metrics of records with `targets` and `prediction`, with intervals if asked for.

    A record's `references`, where it has them, stand in the place of its `targets`.
    """
    clean = task.postprocess or (lambda text: text)

    def cleaned(target: Any) -> Any:
        if isinstance(target, str):
            return clean(target)
        return [clean(text) for text in target] if isinstance(target, list | tuple) else target

    targets = [
        cleaned(record["references"] if "references" in record else record["targets"])
        for record in records
    ]
    predicted = [clean(record["prediction"]) for record in records]
    return measure_all(task.metrics, targets, predicted, resamples)


def metric_names(evaluation: Evaluation) -> set[str] | None:
    """What an evaluation measures; None: not to be known before it runs.

    Of text and labels by scoring the first records as if they were answered rightly.
    """
    task = evaluation.batches.task
    if isinstance(evaluation, TeacherForced):
        found = {"loss"}
        if getattr(task.objective, "asks", None) != "value":
            found.add("accuracy")
        if not is_labelled(task.objective):
            found.add("perplexity")
        return found | ({"bits_per_byte"} if "decoder" in task.lengths else set())
    records = evaluation.batches.records(0)
    try:
        if isinstance(evaluation, Generate):
            right = [{**record, "prediction": record["targets"]} for record in records]
            scores = score_records(task, right)
        else:
            scores = evaluation.score([evaluation.right(record) for record in records], 0)
    except InputError:
        raise
    except Exception:  # somebody's own metric, which wants other examples than these
        return None
    ends = ("", "_low", "_high") if evaluation.resamples else ("",)
    return {name + end for name in scores for end in ends}


def target_bytes(batch: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """float32 `[rows, 1]`: bytes of the text that a row asks of the decoder; 0 without one."""
    if types.DECODER_TARGET_TOKENS not in batch:
        return np.zeros((len(next(iter(batch.values()))), 1), np.float32)
    pairs = zip(
        batch[types.DECODER_TARGET_TOKENS], batch[types.DECODER_LOSS_WEIGHTS] > 0, strict=True
    )
    return np.array([[count_bytes(vocabulary, row[asked])] for row, asked in pairs], np.float32)


def write_jsonl(path: str, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=_plain) + "\n")
    os.replace(path + ".tmp", path)


def _plain(value: Any) -> Any:
    """What JSON has no word for: arrays as lists, all else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
