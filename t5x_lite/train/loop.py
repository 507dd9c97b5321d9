"""The training loop: pretraining and fine-tuning alike."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from t5x_lite import aside, compilation, programs, trees, types
from t5x_lite.data.pipeline import Batches, iterate
from t5x_lite.decode.asking import asking_of
from t5x_lite.models import flops
from t5x_lite.models.config import ModelConfig
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.sharding import Partitioner
from t5x_lite.train import checks, profiling, schedules, writers
from t5x_lite.train import run as runs
from t5x_lite.train import step as steps
from t5x_lite.train.checkpoint import Checkpointer, CheckpointPolicy, versions
from t5x_lite.train.evaluate import (
    PREDICTIONS,
    Evaluation,
    Evaluator,
    TeacherForced,
    behind_prompt,
)
from t5x_lite.train.losses import MEANS
from t5x_lite.train.optim import Optimizer
from t5x_lite.train.session import Session, shardings
from t5x_lite.types import InputError, Params


def train(
    *,
    model_dir: str,
    model: ModelConfig,
    batches: Batches,
    optimizer: Optimizer,
    total_steps: int,
    transform: Transform = Full(),
    initial: runs.RunCheckpoint | None = None,
    loss: steps.Loss = steps.Loss(),
    microbatches: int = 1,
    partitioner: Partitioner = Partitioner(),
    evaluations: Sequence[Evaluation] = (),
    eval_period: int | None = None,
    checkpoints: CheckpointPolicy = CheckpointPolicy(),
    log_period: int = 10,
    seed: int = 0,
    data_threads: int = 2,
    data_workers: int = 0,
    peak_flops_per_device: float | None = None,
    profile_steps: tuple[int, int] | None = None,
    save_config: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Trains until `total_steps`, going on from the newest checkpoint in `model_dir`, if any.

    Started again after a kill, a run ends with the parameters and `metrics.jsonl` of one that was
    never stopped.

    Args:
      model_dir: the run's folder; see `t5x_lite.train.run` for what is in it.
      model: the model's config.
      batches: the training batches; their step count is the data's whole state.
      optimizer: its config.
      total_steps: of this run: fine-tuning counts its own, from 0.
      transform: what is trained: `Full()`, `LoRA(...)`, `Freeze(...)`.
      initial: an earlier run's checkpoint, or a Hugging Face directory, to start from, whole or in
        part; None: fresh weights from `seed`.
      loss: what is minimised.
      microbatches: the gradient is summed over so many parts of the batch, one after the other.
      partitioner: the mesh and its rules.
      evaluations: what is measured every `eval_period` steps and at the end; the teacher-forced
        ones also at step 0.
      eval_period: steps; None: at start and end only.
      checkpoints: when they are written and which stay.
      log_period: steps between records in `metrics.jsonl`; a record is of one step, not a mean.
      seed: of fresh weights and dropout.
      data_threads, data_workers: that make batches ahead; the batches are the same whatever these.
      peak_flops_per_device: for MFU; None: not reported.
      profile_steps: the first and the last of the steps that are traced for xprof, such as
        (10, 12), into the folder's `profile`; None: none.
      save_config: writes the operative config into the run's folder.

    Returns:
      The metrics of the last evaluation, by `<evaluation>/<metric>`; empty if none was left to do.

    Raises:
      InputError: before anything is compiled, for parts that do not fit each other.
    """
    for name, value in (("total_steps", total_steps), ("log_period", log_period)):
        if value < 1:
            raise InputError(f"train.{name}={value}: expected at least 1")
    if eval_period is not None and eval_period < 1:
        raise InputError(f"train.eval_period={eval_period}: expected at least 1, or None")
    profiling.check_steps(profile_steps, total_steps)
    session = Session(model, transform, partitioner, seed)
    vocabulary = batches.task.vocabulary
    if session.prompt_ids:
        batches = dataclasses.replace(batches, task=batches.task.behind(session.prompt_ids))
        evaluations = behind_prompt(session, evaluations)
    checks.check_parts(session, batches, loss, microbatches, evaluations)
    checks.check_best(checkpoints, evaluations, eval_period)
    transformation = session.optimizer(optimizer)
    state_shapes = session.state_shapes(transformation)
    fingerprint, labels = vocabulary.fingerprint, batches.task.labels
    run = runs.Run(model, transform, vocabulary, fingerprint, initial, None, seed, labels)
    run = dataclasses.replace(run, asking=asking_of(batches.task))
    resumed = checks.find_resumed(model_dir, run)
    if initial is not None and resumed is None:
        initial = checks.pin(initial, vocabulary)
        runs.check_base(initial, session)
    say = Console(stderr=True, soft_wrap=True, quiet=jax.process_index() != 0).print
    checkpointer = Checkpointer(model_dir, checkpoints, state_shapes)
    log = _writers(model_dir, total_steps)
    profile = profiling.Profile(profile_steps, model_dir, say)
    try:
        start = 0 if resumed is None else checkpointer.latest_step or 0
        if start < total_steps:
            # Needs shapes alone, so parameters and their evaluation come meanwhile.
            first = _put(session, batches, batches.batch(start, _rows(session, batches)))
            compiling = aside.start(
                compile_step,
                *(session, optimizer, loss, microbatches, seed),
                *(state_shapes, session.split_shapes[1], first),
            )
        if resumed is not None:
            frozen = runs.load_frozen(resumed, session)
            params, opt_state = checkpointer.restore(
                start, state_shapes.params, state_shapes.opt_state
            )
            run = dataclasses.replace(resumed, model=model, asking=run.asking)
            say(f"Resuming {model_dir} from its own checkpoint of step {start}")
            if initial is not None:
                say(f"  (train.initial, {initial.model_dir}, was read when the run began)")
        else:
            base = session.init_base() if initial is None else runs.load_base(initial, session)
            params, frozen = session.split(base)
            base_fingerprint = session.fingerprint(base)
            del base
            opt_state = session.init_opt_state(transformation, params)
            run = dataclasses.replace(run, base=initial, base_fingerprint=base_fingerprint)
            origin = "fresh weights" if initial is None else initial.model_dir
            if initial is not None and initial.step is not None:
                origin += f", step {initial.step}"
            say(f"Starting {model_dir} from {origin}")
        if jax.process_index() == 0:
            run.write(model_dir)
        if save_config is not None:
            save_config(model_dir)
        for writer in log:
            # A fresh start measures step 0 anew: what a killed one measured goes too.
            writer.truncate_after(-1 if resumed is None else start)
        step_array = jax.device_put(np.int32(start), partitioner.replicated)
        state = steps.TrainState(step_array, params, opt_state)
        del params, opt_state

        if start >= total_steps:
            say(f"Nothing to do: {model_dir} has its {total_steps} steps")
            return {}
        slices = len(partitioner.by_slice)
        say(
            f"Training {trees.count(state.params):,} of "
            f"{trees.count(session.base_shapes):,} parameters on "
            f"{partitioner.mesh.size} {jax.devices()[0].platform} device(s)"
            f"{f' in {slices} slices' if slices > 1 else ''}; compiling ..."
        )
        timing = _Timing(model, transform, first, partitioner, peak_flops_per_device)
        evaluator = Evaluator(session, evaluations)
        measured: dict[str, float] = {}

        def evaluate(step: int, state: steps.TrainState) -> dict[str, float]:
            count = 0 if eval_period is None else step // eval_period
            due = [e for e in evaluations if step in (0, total_steps) or count % e.period == 0]
            # An untrained model rarely ends its output: generating from it takes longest. What a
            # fresh head answers says nothing.
            which = [e for e in due if step > 0 or isinstance(e, TeacherForced)]
            path = os.path.join(model_dir, PREDICTIONS, f"{{name}}-{step}.jsonl")
            found = evaluator.run(state.params, frozen, which=which, predictions=path)
            if found:
                log[0].write(step, found)
            timing.restart()
            return found

        def record(done: int, metrics: steps.Sums) -> None:
            values = jax.device_get(metrics)
            timing.add(float(values["tokens"]))
            if done % log_period == 0 or done == total_steps:
                log[0].write(done, _per_token(values))
                log[1].write(done, timing.take())

        if start == 0:
            measured = evaluate(0, state)
        compiled, seconds = compiling.result()
        compilation.give_back()
        say(f"  compiled in {seconds:.1f} s")
        data = iterate(
            batches,
            start,
            stop_step=total_steps,
            rows=_rows(session, batches),
            num_threads=data_threads,
            num_workers=data_workers,
        )
        pending: steps.Sums | None = None
        for done in range(start + 1, total_steps + 1):
            batch = _put(session, batches, next(data))
            state, metrics = profile.run(done, compiled, state, frozen, batch)
            if pending is not None:
                record(done - 1, pending)  # of the step before: this one is under way
            pending = metrics
            last = done == total_steps
            evaluates = last or (eval_period is not None and done % eval_period == 0)
            saves = last or done % checkpoints.period == 0
            if evaluates or saves:
                record(done, pending)
                pending = None
            if evaluates:
                measured = evaluate(done, state)
            if saves:
                metadata = {"run": runs.FILE, "versions": versions()}
                # Metrics of earlier steps are not this checkpoint's.
                scores = measured if evaluates else None
                checkpointer.save(done, state.params, state.opt_state, metadata, scores)
                timing.restart()
        checkpointer.wait()
    finally:
        profile.close()
        for writer in log:
            writer.close()
        checkpointer.close()
    say(f"Done: {model_dir} holds the checkpoints, metrics.jsonl and config.gin")
    return measured


def _rows(session: Session, batches: Batches) -> slice:
    return session.partitioner.local_rows(batches.batch_size)


def _put(session: Session, batches: Batches, batch: types.Batch) -> dict[str, jax.Array]:
    return session.partitioner.put_batch(batch, batches.batch_size)


def compile_step(
    session: Session,
    optimizer: Optimizer,
    loss: steps.Loss,
    microbatches: int,
    seed: int,
    state: steps.TrainState,
    frozen: Params,
    batch: types.Batch,
    options: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], float]:
    """The run's one compiled step, and the seconds it took; it takes batches of one shape.

    State, frozen parameters and batch may be shape structs; `options` are the compiler's. The
    metrics have the step's `learning_rate` with them: a program of its own for it would wait for
    the step that is under way, and the loop with it.
    """
    began = time.monotonic()
    of_batch = functools.partial(
        steps.train_step,
        model=session.model,
        transform=session.transform,
        optimizer=session.optimizer(optimizer),
        loss=loss,
        microbatches=microbatches,
        seed=seed,
    )

    def train_step(
        state: steps.TrainState, frozen: Params, batch: types.Batch
    ) -> tuple[steps.TrainState, steps.Sums]:
        after, metrics = of_batch(state, frozen, batch)
        rate = schedules.learning_rate_at(optimizer.learning_rate, state.step)
        return after, {**metrics, "learning_rate": rate}

    jitted = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings(state), session.partitioner.replicated),
    )
    made_with = (session, optimizer, loss, microbatches, seed)
    kept = programs.Kept(jitted, session.partitioner, *made_with)
    with session.partitioner.activate():
        compiled = kept.compiled(state, frozen, batch, options=options)
    return compiled, time.monotonic() - began


def _per_token(values: dict[str, Any]) -> dict[str, float]:
    """Means from sums: the loss by its denominator, the rest by its weight."""
    weight = max(float(values["weight"]), 1e-9)
    return {
        "loss": float(values["loss"]) / max(float(values["denominator"]), 1e-9),
        **{name: float(values[name]) / weight for name in MEANS if name in values},
        "gradient_norm": float(values["gradient_norm"]),
        "learning_rate": float(values["learning_rate"]),
    }


def _writers(model_dir: str, total_steps: int) -> tuple[writers.Writer, writers.Writer]:
    """Where reproducible metrics go, and where timings go."""

    def path(name: str) -> str:
        return os.path.join(model_dir, name)

    console = writers.on_first_process(lambda: writers.ConsoleWriter(total_steps))
    board = writers.on_first_process(lambda: writers.TensorBoardWriter(path("tensorboard")))
    metrics = writers.on_first_process(lambda: writers.JsonlWriter(path("metrics.jsonl")))
    timing = writers.on_first_process(lambda: writers.JsonlWriter(path("timing.jsonl")))
    return (
        writers.MultiWriter([metrics, board, console]),
        writers.MultiWriter([timing, board, console]),
    )


class _Timing:
    """Throughput between records; evaluations and checkpoints are left out."""

    def __init__(
        self,
        model: ModelConfig,
        transform: Transform,
        batch: types.Batch,
        partitioner: Partitioner,
        peak: float | None,
    ):
        self._flops = flops.train_flops(model, batch, full=isinstance(transform, Full))
        self._peak = None if peak is None else peak * partitioner.mesh.size
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        self._began = time.monotonic()

    def add(self, tokens: float) -> None:
        now = time.monotonic()
        self._seconds += now - self._began
        self._began = now
        self._steps += 1
        self._tokens += tokens

    def take(self) -> dict[str, float]:
        """Tokens without padding and model FLOPs a second, since the last call."""
        seconds = max(self._seconds, 1e-9)
        values = {
            "timing/tokens_per_second": self._tokens / seconds,
            "timing/seconds_per_step": seconds / max(self._steps, 1),
            "timing/model_flops_per_second": self._flops * self._steps / seconds,
        }
        if self._peak is not None:
            values["timing/mfu"] = values["timing/model_flops_per_second"] / self._peak
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0
        return values
