"""Evaluation of a run's checkpoints alone, outside of training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import jax

from t5x_lite.interop.settings import unnamed
from t5x_lite.sharding import Partitioner
from t5x_lite.train import checks, writers
from t5x_lite.train import run as runs
from t5x_lite.train.checkpoint import all_steps, find_step
from t5x_lite.train.evaluate import Evaluation, Evaluator, behind_prompt
from t5x_lite.train.session import Session
from t5x_lite.types import InputError


def evaluate_run(
    *,
    model_dir: str,
    evaluations: Sequence[Evaluation],
    step: int | Literal["all", "best"] | None = None,
    partitioner: Partitioner = Partitioner(),
) -> dict[int, dict[str, float]]:
    """Evaluates checkpoints of a run; scores go to `<model_dir>/eval/metrics.jsonl`.

    Checkpoints that have scores there are not evaluated again, so that a run over all of them can
    be stopped and started.

    Args:
      model_dir: the run's folder. Tuned runs find their base by themselves.
      evaluations: what to measure; predictions are written to `<model_dir>/eval/`.
      step: one checkpoint, "all", "best" by the run's `CheckpointPolicy.best_metric`, or None for
        the latest.
      partitioner: any mesh, whatever the run was trained on.

    Returns:
      Metrics by step. Raises InputError before compilation for what does not fit.
    """
    if not evaluations:
        raise InputError("evaluate_run.evaluations is empty: name at least one evaluation")
    partitioner = partitioner.at_hand()
    run = runs.Run.read(model_dir)
    for evaluation in evaluations:
        partitioner.check_batch_size(evaluation.batches.batch_size)
        if evaluation.batches.task.fingerprint != run.vocabulary_fingerprint:
            raise InputError(
                f"evaluation '{evaluation.name}': its vocabulary is not the one that "
                f"'{model_dir}' was trained with; use '{model_dir}/{runs.VOCABULARY_FILE}'"
            )
        labels = evaluation.batches.task.labels
        if run.labels and not unnamed(run.labels) and labels != run.labels:
            raise InputError(
                f"evaluation '{evaluation.name}' has the labels {labels}, but '{model_dir}' was "
                f"trained with {run.labels}: their names and order must agree"
            )
    tuned = Session(run.model, run.transform, partitioner, run.seed)
    evaluations = behind_prompt(tuned, evaluations)
    checks.check_evaluations(run.model, evaluations, tuned.prefix)
    steps = all_steps(model_dir) if step == "all" else [find_step(model_dir, step)]
    path = os.path.join(model_dir, "eval", "metrics.jsonl")
    names = {evaluation.name for evaluation in evaluations}
    known = {
        record["step"]: {key: value for key, value in record.items() if key != "step"}
        for record in (writers.read_jsonl(path) if os.path.exists(path) else [])
        if names <= {key.split("/")[0] for key in record}
    }
    log = writers.MultiWriter(
        [
            writers.on_first_process(lambda: writers.JsonlWriter(path)),
            writers.on_first_process(lambda: writers.ConsoleWriter(steps[-1])),
        ]
    )
    results = {}
    session, frozen, evaluator = None, None, None
    for at in steps:
        if at in known and step == "all":
            results[at] = known[at]
            continue
        if session is None:
            session, trainable, frozen = runs.load(runs.RunCheckpoint(model_dir, at), partitioner)
            evaluator = Evaluator(session, evaluations)
        else:
            trainable = runs.load_trainable(runs.RunCheckpoint(model_dir, at), session)
        assert evaluator is not None
        predictions = os.path.join(model_dir, "eval", f"{{name}}-{at}.jsonl")
        results[at] = evaluator.run(trainable, frozen, predictions=predictions)
        log.write(at, results[at])
        del trainable
    log.close()
    if jax.process_index() == 0:
        print(f"Scores and predictions are in {os.path.join(model_dir, 'eval')}")
    return results
