"""Training runs of a study: each done once, whatever stops the study, and what they measured.

A study is a table of short runs that differ in one thing. Each has a folder with a `trial.json`,
written when it is finished; a study started again does the others. Their checkpoints are removed
unless they are asked for: what a study measures is in the record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax
from rich.console import Console

from t5x_lite import trees
from t5x_lite.data.pipeline import Batches
from t5x_lite.data.selection import Drawn
from t5x_lite.data.tasks import Task
from t5x_lite.models.config import ModelConfig
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.records import to_record
from t5x_lite.sharding import Partitioner
from t5x_lite.train.checkpoint import CheckpointPolicy
from t5x_lite.train.evaluate import Evaluation
from t5x_lite.train.loop import train
from t5x_lite.train.optim import Adafactor, AdamW, Lion, RateRules
from t5x_lite.train.run import RunCheckpoint
from t5x_lite.train.schedules import FactorSchedule
from t5x_lite.train.session import Session
from t5x_lite.train.writers import read_jsonl
from t5x_lite.types import InputError

FILE: Final = "trial.json"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to learn a task: what is trained, from where, and how fast."""

    learning_rate: float
    transform: Transform = Full()
    initial: RunCheckpoint | None = None  # None: random weights
    rate_rules: RateRules = ()  # (regex, factor of the learning rate) in place of the optimizer's

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate_rules", tuple(tuple(rule) for rule in self.rate_rules))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the runs of a study share."""

    model: ModelConfig
    batches: Batches
    optimizer: AdamW | Adafactor | Lion  # each run puts its rate and its steps into the schedule
    evaluations: Sequence[Evaluation]
    partitioner: Partitioner = Partitioner()

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluations", tuple(self.evaluations))
        if not isinstance(self.optimizer.learning_rate, FactorSchedule):
            raise InputError(
                "Recipe.optimizer needs a FactorSchedule as its learning_rate: each run sets its "
                "base_learning_rate and total_steps"
            )

    def optimizer_of(self, method: Method, steps: int) -> AdamW | Adafactor | Lion:
        """The optimizer with the method's rates, over so many steps."""
        schedule = self.optimizer.learning_rate
        assert isinstance(schedule, FactorSchedule)
        schedule = dataclasses.replace(
            schedule, base_learning_rate=method.learning_rate, total_steps=steps
        )
        rules = method.rate_rules or self.optimizer.rate_rules
        return dataclasses.replace(self.optimizer, learning_rate=schedule, rate_rules=rules)

    def batches_of(self, examples: int | None, seed: int) -> Batches:
        """The training batches; with `examples`, of so many, drawn by the seed."""
        batches = dataclasses.replace(self.batches, seed=seed)
        if examples is None:
            return batches
        if not isinstance(batches.task, Task):
            raise InputError(
                f"'{batches.task.name}' is a mixture: a number of examples is drawn from one task"
            )
        source = Drawn(source=batches.task.source, count=examples, seed=seed, only=(batches.split,))
        return dataclasses.replace(batches, task=dataclasses.replace(batches.task, source=source))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run that is to be done, or was."""

    method: str  # its name
    steps: int
    seed: int
    examples: int | None = None  # labelled ones; None: all that there are

    @property
    def folder(self) -> str:
        """A name for its folder, of letters, digits and `_`, that no other trial has."""
        name = re.sub(r"[^a-z0-9]+", "_", self.method.lower()).strip("_")
        count = "" if self.examples is None else f"-{self.examples}"
        return f"{name}{count}-seed{self.seed}"

    def __str__(self) -> str:
        count = "" if self.examples is None else f", {self.examples:,} examples"
        return f"{self.method}{count}, seed {self.seed}, {self.steps} steps"


@dataclass(frozen=True)
class Found:
    """What a trial measured."""

    trial: Trial
    scores: Mapping[int, Mapping[str, float]]  # by step, then by `<evaluation>/<metric>`
    trained: int  # parameters
    minutes: float  # by the clock, measured in the process that finished it
    cpu_minutes: float
    more: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of `then`

    @property
    def last(self) -> Mapping[str, float]:
        return {**self.scores[max(self.scores)], **self.more}


def run_all(
    output: str,
    recipe: Recipe,
    methods: Mapping[str, Method],
    trials: Sequence[Trial],
    *,
    eval_period: int | None = None,
    then: Callable[[str], dict[str, float]] | None = None,
    console: Console | None = None,
) -> list[Found]:
    """Runs those of the trials that have no record yet, in order, and returns all in order.

    Args:
      output: the study's folder; runs are in `<output>/runs/`.
      recipe, methods: what a trial is made of.
      trials: each of a method in `methods`.
      eval_period: steps between evaluations; None: at the start and the end.
      then: measures more on a finished run's folder, before its checkpoints are removed.

    Raises InputError, before anything is trained, for two trials of one folder, and for a record
    of other settings than a trial's.
    """
    say = (console or Console(stderr=True, soft_wrap=True)).print
    folders = [os.path.join(output, "runs", trial.folder) for trial in trials]
    if len(set(folders)) < len(folders):
        raise InputError(
            f"two trials of the study in '{output}' have one folder: name methods so that they "
            "differ in letters and digits, and give each seed once"
        )
    known = [
        _read(folder, settings(recipe, methods[trial.method], trial))
        for folder, trial in zip(folders, trials, strict=True)
    ]
    left = sum(found is None for found in known)
    say(f"{output}: {len(trials)} runs, {len(trials) - left} of them done")
    results, began = [], time.monotonic()
    for number, (trial, folder, found) in enumerate(zip(trials, folders, known, strict=True), 1):
        if found is None:
            say(f"[{number}/{len(trials)}] {trial}", markup=False)
            found = _run(folder, recipe, methods[trial.method], trial, eval_period, then)
            left -= 1
            done = sum(one is None for one in known) - left
            minutes = (time.monotonic() - began) / 60 / done * left
            say(f"{found.minutes:.1f} minutes; {left} runs left, about {minutes:.0f} minutes")
        results.append(found)
    return results


def _run(
    folder: str,
    recipe: Recipe,
    method: Method,
    trial: Trial,
    eval_period: int | None,
    then: Callable[[str], dict[str, float]] | None,
) -> Found:
    clock, cpu = time.monotonic(), time.process_time()
    train(
        model_dir=folder,
        model=recipe.model,
        batches=recipe.batches_of(trial.examples, trial.seed),
        optimizer=recipe.optimizer_of(method, trial.steps),
        total_steps=trial.steps,
        transform=method.transform,
        initial=method.initial,
        partitioner=recipe.partitioner,
        evaluations=recipe.evaluations,
        eval_period=eval_period,
        checkpoints=CheckpointPolicy(period=10**9, keep=1),  # at the end alone
        log_period=max(trial.steps // 8, 1),
        seed=trial.seed,
    )
    more = {} if then is None else then(folder)
    names = {evaluation.name for evaluation in recipe.evaluations}
    scores: dict[int, dict[str, float]] = {}
    for record in read_jsonl(os.path.join(folder, "metrics.jsonl")):
        own = {key: value for key, value in record.items() if key.split("/")[0] in names}
        if own:
            scores.setdefault(record["step"], {}).update(own)
    trained = trees.count(Session(recipe.model, method.transform).split_shapes[0])
    minutes, cpu_minutes = (time.monotonic() - clock) / 60, (time.process_time() - cpu) / 60
    found = Found(trial, scores, trained, minutes, cpu_minutes, more)
    if jax.process_index() == 0:
        record = {**to_record(found), "settings": settings(recipe, method, trial)}
        with open(os.path.join(folder, FILE + ".tmp"), "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
        os.replace(os.path.join(folder, FILE + ".tmp"), os.path.join(folder, FILE))
        shutil.rmtree(os.path.join(folder, "checkpoints"), ignore_errors=True)
    jax.clear_caches()  # the next run compiles programs of its own
    return found


def _read(folder: str, expected: Mapping[str, Any]) -> Found | None:
    path = os.path.join(folder, FILE)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        record = json.load(file)
    if record["settings"] != expected:
        other = [name for name in expected if record["settings"].get(name) != expected[name]]
        raise InputError(
            f"'{path}' is of a run with other settings than it would have now (its "
            f"{' and '.join(other)}): remove that folder, or write the study elsewhere"
        )
    trial = {key: value for key, value in record["trial"].items() if key != "class"}
    return Found(
        Trial(**trial),
        {int(step): values for step, values in record["scores"].items()},
        record["trained"],
        record["minutes"],
        record["cpu_minutes"],
        record["more"],
    )


def settings(recipe: Recipe, method: Method, trial: Trial) -> dict[str, Any]:
    """What a run's figures depend on, as JSON gives it back; of the recipe, a fingerprint."""

    def name(value: Any) -> str:
        return getattr(value, "__name__", type(value).__name__)  # functions, dtypes

    shared = json.dumps(to_record(recipe), default=name, sort_keys=True)
    made = {
        "trial": to_record(trial),
        "method": to_record(method),
        "recipe": hashlib.sha256(shared.encode()).hexdigest()[:16],
    }
    return json.loads(json.dumps(made))
