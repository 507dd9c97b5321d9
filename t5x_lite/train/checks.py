"""What a run can be refused for before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from t5x_lite import trees
from t5x_lite.data.objectives.base import is_labelled, wrapping
from t5x_lite.data.pipeline import Batches
from t5x_lite.data.tasks import Mixture, Task
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.interop.hf_tokenizers import find_vocabulary
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import LMHead, SequenceHead, TokenHead
from t5x_lite.models.config_positions import Learned
from t5x_lite.train import run as runs
from t5x_lite.train import step as steps
from t5x_lite.train.checkpoint import CheckpointPolicy, find_step
from t5x_lite.train.evaluate import Evaluation, Generate, metric_names
from t5x_lite.train.session import Session
from t5x_lite.types import MASKED_TARGET_SPANS, MASKED_TARGET_VALUES, Batch, InputError


def check_best(
    policy: CheckpointPolicy, evaluations: Sequence[Evaluation], eval_period: int | None
) -> None:
    """Raises InputError unless `best_metric` is measured whenever a checkpoint is written."""
    if policy.best_metric is None:
        return
    name = policy.best_metric.split("/")[0]
    found = next((one for one in evaluations if one.name == name), None)
    if found is None:
        raise InputError(
            f"CheckpointPolicy.best_metric='{policy.best_metric}' is of no evaluation; there are: "
            f"{', '.join(one.name for one in evaluations) or 'none'}"
        )
    names, metric = metric_names(found), policy.best_metric.partition("/")[2]
    if names is not None and metric not in names:
        raise InputError(
            f"CheckpointPolicy.best_metric='{policy.best_metric}': '{name}' measures "
            f"{', '.join(sorted(names))}, and nothing called '{metric}'"
        )
    if eval_period is None or policy.period % (eval_period * found.period):
        raise InputError(
            f"CheckpointPolicy.best_metric='{policy.best_metric}' must be measured whenever a "
            f"checkpoint is written, but checkpoints come every {policy.period} steps and "
            f"'{name}' every {None if eval_period is None else eval_period * found.period}: make "
            "the first a multiple of the second"
        )


def check_parts(
    session: Session,
    batches: Batches,
    loss: steps.Loss,
    microbatches: int,
    evaluations: Sequence[Evaluation],
) -> None:
    """All that can be known to fail before compiling."""
    partitioner, model = session.partitioner, session.config
    if microbatches < 1:
        raise InputError(f"train.microbatches={microbatches}: expected at least 1")
    partitioner.check_batch_size(batches.batch_size, microbatches)
    for evaluation in evaluations:
        try:
            partitioner.check_batch_size(evaluation.batches.batch_size)
        except InputError as error:
            raise InputError(f"evaluation '{evaluation.name}': {error}") from error
    size = batches.task.vocabulary.size
    if size > model.vocab_size:
        raise InputError(
            f"the vocabulary has {size} tokens, but ModelConfig.vocab_size={model.vocab_size}: "
            f"set it to {size} or more (a multiple of 128 suits the hardware)"
        )
    for evaluation in evaluations:
        _ = len(evaluation.batches)
        if evaluation.batches.task.fingerprint != batches.task.fingerprint:
            raise InputError(
                f"evaluation '{evaluation.name}' has another vocabulary than the training task"
            )
        if evaluation.batches.task.labels != batches.task.labels:
            raise InputError(
                f"evaluation '{evaluation.name}' has the labels {evaluation.batches.task.labels}, "
                f"but the training task {batches.task.labels}: their names and order must agree"
            )
    check_streams(model, batches.task, session.prefix)
    check_evaluations(model, evaluations, session.prefix)
    first = batches.batch(0, slice(0, 1))
    steps.check_trainable_batch(first)
    check_loss(model, loss, first)
    # Dimensions that do not divide, patterns that match nothing.
    if not trees.flatten(session.split_shapes[0]):
        raise InputError(
            f"{type(session.transform).__name__} trains nothing: compose it with what does, "
            "Compose((LoRA(), Quantise()))"
        )


def check_loss(model: ModelConfig, loss: steps.Loss, batch: Batch) -> None:
    """Raises InputError for regularisers that mean nothing for what the batch asks."""
    for key in (MASKED_TARGET_VALUES, MASKED_TARGET_SPANS):
        if key in batch and (loss.z_loss or loss.label_smoothing):
            raise InputError(
                f"Loss(z_loss={loss.z_loss}, label_smoothing={loss.label_smoothing}) is for tokens "
                f"and labels, but the task asks for '{key}': set both to 0"
            )
    if model.pair_head is not None and loss.label_smoothing:
        raise InputError(
            f"Loss.label_smoothing={loss.label_smoothing} is spread over the whole vocabulary, but "
            "ModelConfig.pair_head has two labels: set it to 0"
        )


def _no_prefix(stack: str) -> int:
    return 0


def check_streams(
    model: ModelConfig, task: Task | Mixture, prefix: Callable[[str], int] = _no_prefix
) -> None:
    """Raises InputError unless the task's streams are those that the model reads and answers at.

    `prefix` says how many positions of a stack are taken: see `Session.prefix`.
    """
    for name in ("encoder", "decoder"):
        stack = getattr(model, name)
        if (stack is None) != (name not in task.lengths):
            raise InputError(
                f"the model {'has no' if stack is None else 'has an'} {name}, but "
                f"task '{task.name}' makes streams for: {', '.join(task.lengths)}"
            )
        if stack is None or not isinstance(stack.positions, Learned):
            continue
        taken, learned = prefix(name), stack.positions.max_length
        if task.lengths[name] + taken > learned:
            behind = f" behind a prefix of {taken}" if taken else ""
            raise InputError(
                f"task '{task.name}' makes rows of {task.lengths[name]} {name} tokens{behind}, but "
                f"the model learns {learned} positions: shorten the rows, or raise "
                "Learned.max_length (a pretrained model's is fixed)"
            )
    for one in task.tasks:
        check_head(model, one)
        types = 0 if model.encoder is None else model.encoder.num_token_types
        if "token_types" in one.objective.makes and types == 1:
            raise InputError(
                f"task '{one.name}': {type(one.objective).__name__} gives a pair's second text "
                "token type 1, but the model has one type, as RoBERTa: set the objective's "
                "between=2, for two eos between the texts and no types"
            )
    pairs = any(getattr(one.objective, "one_a_row", False) for one in task.tasks)
    if pairs != (model.pair_head is not None):
        raise InputError(
            f"task '{task.name}' {'asks' if pairs else 'does not ask'} whether two texts follow "
            f"one another, but the model has {'no' if pairs else 'a'} ModelConfig.pair_head: "
            "NextSentencePairs goes with models/pair_head.gin, and nothing else does"
        )


# What an objective asks for -> the head that answers.
_HEADS: Final = {
    "sequence": SequenceHead,
    "value": SequenceHead,
    "token": TokenHead,
    "span": TokenHead,
}


def check_head(model: ModelConfig, task: Task) -> None:
    """Raises InputError unless the model's head answers what the task's objective asks for."""
    name, head = type(task.objective).__name__, model.head
    if not is_labelled(task.objective):
        if not isinstance(head, LMHead):
            raise InputError(
                f"task '{task.name}': {name} asks for tokens, but the model has a "
                f"{type(head).__name__}: set ModelConfig.head to an LMHead"
            )
        return
    asks = task.objective.asks
    expected, labels = _HEADS[asks], 1 if asks == "value" else len(task.labels)
    count = head.num_labels if isinstance(head, SequenceHead | TokenHead) else None
    if not isinstance(head, expected) or count != labels:
        found = type(head).__name__ + ("" if count is None else f"(num_labels={count})")
        raise InputError(
            f"task '{task.name}': {name} asks a {expected.__name__}(num_labels={labels}), but the "
            f"model has a {found}: set ModelConfig.head, or run_model.head of a pretrained model"
        )


def check_evaluations(
    model: ModelConfig,
    evaluations: Sequence[Evaluation],
    prefix: Callable[[str], int] = _no_prefix,
) -> None:
    """Raises InputError unless the model reads the evaluations' streams, and writes what it may."""
    for evaluation in evaluations:
        task = evaluation.batches.task
        try:
            check_streams(model, task, prefix)
        except InputError as error:
            raise InputError(f"evaluation '{evaluation.name}': {error}") from error
        if isinstance(evaluation, Generate) and is_labelled(task.objective):
            raise InputError(
                f"evaluation '{evaluation.name}' generates, but task '{task.name}' asks for "
                "labels: use Label"
            )
        if not isinstance(evaluation, Generate):
            continue
        if evaluation.max_tokens < 1:
            raise InputError(
                f"evaluation '{evaluation.name}': Generate.max_tokens={evaluation.max_tokens}: "
                "expected at least 1"
            )
        if model.decoder is None:
            raise InputError(
                f"evaluation '{evaluation.name}' generates, but the model has no decoder: use "
                "TeacherForced"
            )
        if task.chunk is None and "targets" not in task.objective.features:
            raise InputError(
                f"evaluation '{evaluation.name}' generates, but the records of task '{task.name}' "
                "have no targets to score by: use TeacherForced"
            )
        if not isinstance(model.decoder.positions, Learned):
            continue
        prompt = 1
        if model.encoder is None:  # the inputs, with what they are wrapped in, behind the start
            longest = task.limits[0] + wrapping(task.vocabulary) + 1 + len(task.prompt_ids)
            prompt = min(task.lengths["decoder"], longest)
        needed = prompt + evaluation.max_tokens - 1
        learned = model.decoder.positions.max_length - prefix("decoder")
        if needed > learned:
            raise InputError(
                f"evaluation '{evaluation.name}' generates up to {evaluation.max_tokens} tokens "
                f"behind {prompt}, {needed} positions in all, but the model learns {learned}: "
                "lower Generate.max_tokens, or shorten the task's rows"
            )


def find_resumed(model_dir: str, run: runs.Run) -> runs.Run | None:
    """What `run.json` says if `model_dir` has a checkpoint to resume. InputError: another run's."""
    try:
        find_step(model_dir)
    except InputError:
        return None
    found = runs.Run.read(model_dir)
    check_vocabulary(found, run.vocabulary, model_dir)
    # A run may go on with another compute dtype or rematerialisation: on other hardware, say.
    for name, before, now in (
        ("model", found.model.canonical(), run.model.canonical()),
        ("transform", found.transform, run.transform),
        ("seed", found.seed, run.seed),
        ("labels", found.labels, run.labels),
    ):
        if before != now:
            raise InputError(
                f"'{model_dir}' holds checkpoints of another run: its {name} was\n"
                f"  {before}\nand is now\n  {now}\n"
                "Choose another train.model_dir, or remove that folder"
            )
    return found


def pin(initial: runs.RunCheckpoint, vocabulary: Vocabulary) -> runs.RunCheckpoint:
    """The same weights with a step. Raises InputError for another vocabulary than the task's.

    The base of adapters must not move when its run goes on.
    """
    if not initial.is_hf:
        check_vocabulary(runs.Run.read(initial.model_dir), vocabulary, initial.model_dir)
        return dataclasses.replace(initial, step=find_step(initial.model_dir, initial.step))
    if initial.step is not None:
        raise InputError(
            f"RunCheckpoint.step={initial.step}, but '{initial.model_dir}' is a Hugging Face "
            "directory: it has no steps"
        )
    found = find_vocabulary(initial.model_dir)
    if found.fingerprint != vocabulary.fingerprint:
        raise InputError(
            f"the vocabulary {vocabulary} (fingerprint {vocabulary.fingerprint[:12]}) is not that "
            f"of the weights in '{initial.model_dir}' ({found.fingerprint[:12]}): use "
            "@run_vocabulary() of that folder"
        )
    return initial


def check_vocabulary(found: runs.Run, vocabulary: Vocabulary, where: str) -> None:
    if found.vocabulary_fingerprint != vocabulary.fingerprint:
        raise InputError(
            f"the vocabulary {vocabulary} (fingerprint {vocabulary.fingerprint[:12]}) is not the "
            f"one that the checkpoints in '{where}' were trained with "
            f"({found.vocabulary_fingerprint[:12]}); use '{where}/{runs.VOCABULARY_FILE}'"
        )
