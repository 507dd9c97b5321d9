"""Batches by random access: `batch(step)` is a pure function of (config, seed, step).

Row r of the whole run is row `r % R` of window `r // R`, a window being the fixed number of
examples that an assembly turns into R rows; example e of the run is example `before` of the task
that `rates.assign` names; and its noise comes from the generator of (seed, e). So batch(step) needs
nothing from the batches before it, any slice of its rows can be had by any process, and the data
state of a run is one integer. What is cached could be made again.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sized
from typing import Any, Protocol

import numpy as np
from absl import flags

from t5x_lite.data.examples import Cache, TrainingExamples, derived_seed, keyed_rng
from t5x_lite.data.objectives.base import as_text
from t5x_lite.data.packing import Assembly, Pad, Window
from t5x_lite.data.rates import assign
from t5x_lite.data.tasks import Mixture, Task
from t5x_lite.types import InputError, check_batch

Arrays = dict[str, np.ndarray]
ALL_ROWS = slice(None)
_ENDLESS = 1 << 40  # steps


class StepBatches(Protocol):
    """Batches by step; with `len`, finitely many."""

    def batch(self, step: int, rows: slice = ALL_ROWS) -> Arrays: ...


@dataclasses.dataclass(frozen=True)
class Batches:
    """The endless training batches of a task or mixture.

    `batch(step)` gives `batch_size` rows under the batch keys, tokens int32 `[rows, length]`, with
    segment ids and positions. `batch(step, slice(a, b))` gives the same rows a to b, whoever asks.
    With `shuffle`, records come in another order each epoch. Raises InputError, when built, for a
    split that is missing or can't be read.
    """

    task: Task | Mixture
    split: str = "train"
    batch_size: int = 8  # rows of the whole batch, over all processes
    seed: int = 0
    assembly: Assembly = dataclasses.field(default_factory=Pad)
    shuffle: bool = True

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        for task in self.task.tasks:
            if self.assembly.window > 1 and getattr(task.objective, "one_a_row", False):
                raise InputError(
                    f"task '{task.name}': {type(task.objective).__name__} has its label in a row's "
                    "first slot, so that a row holds one example: set assembly to Pad()"
                )
        _ = self._members

    def __getstate__(self) -> dict[str, Any]:
        return _fields(self)

    @functools.cached_property
    def _members(self) -> list[TrainingExamples]:
        return [
            TrainingExamples(task, self.split, self.seed, self.shuffle) for task in self.task.tasks
        ]

    @functools.cached_property
    def _weights(self) -> tuple[int, ...]:
        if isinstance(self.task, Task):
            return (1,)
        return self.task.weights([member.epoch_size for member in self._members])

    @property
    def members(self) -> tuple[TrainingExamples, ...]:
        """The training examples of each task."""
        return tuple(self._members)

    @property
    def epoch_examples(self) -> tuple[int, ...]:
        """Examples in an epoch of each task."""
        return tuple(member.epoch_size for member in self._members)

    def example(self, index: int) -> Arrays:
        """Example `index` of the run: unpadded arrays by batch key."""
        which, before = assign(index, self._weights)
        return self._members[which].streams(before, keyed_rng(self.seed, index))

    def window(self, index: int) -> Window:
        """Window `index` of the run, assembled; with `shuffle`, its rows in random order.

        First fit leaves the last rows of a window the emptiest: in order, they would fill whole
        batches with little but padding.
        """
        first = index * self.assembly.window
        examples = [self.example(e) for e in range(first, first + self.assembly.window)]
        window = self.assembly(examples, self.task.lengths)
        if not self.shuffle:
            return window
        rng = keyed_rng(derived_seed("rows", self.seed, self.task.name), index)
        order = rng.permutation(self.assembly.rows)
        return dataclasses.replace(window, rows={k: v[order] for k, v in window.rows.items()})

    @functools.cached_property
    def _cached_window(self) -> Cache[Window]:
        return Cache(self.window, capacity=8)

    def batch(self, step: int, rows: slice = ALL_ROWS) -> Arrays:
        """Rows `rows` of the batch of `step` (all of them by default)."""
        if step < 0:
            raise InputError(f"step is {step}; steps count from 0")
        start, stop = _bounds(rows, self.batch_size)
        first, last = step * self.batch_size + start, step * self.batch_size + stop
        if self.assembly.window == self.assembly.rows == 1:
            examples = [self.example(row) for row in range(first, last)]
            batch = self.assembly(examples, self.task.lengths).rows  # rows don't depend on others
        else:
            batch = self._from_windows(first, last)
        return self._checked(batch)

    def _from_windows(self, first: int, last: int) -> Arrays:
        per_window = self.assembly.rows
        parts = []
        for index in range(first // per_window, (last - 1) // per_window + 1):
            begin = index * per_window
            inside = slice(max(first - begin, 0), min(last - begin, per_window))
            parts.append({k: v[inside] for k, v in self._cached_window(index).rows.items()})
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def __getitem__(self, step: int) -> Arrays:
        return self.batch(step)

    def _checked(self, batch: Arrays) -> Arrays:
        if "_was_checked" not in self.__dict__:  # the first batch stands for all
            check_batch(batch, self.task.num_ids)
            self.__dict__["_was_checked"] = True
        return batch


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """Every example of a split exactly once, in order, padded; the last batch filled with rows
    without tokens or loss weight (segment 0).

    With the task's `Chunks`, the examples are all pieces of all windows, the short last ones
    included: no token is left out. `limit` takes only the first so many examples. The noise of a
    self-supervised objective is that of (seed, example), so that evaluations compare.
    """

    task: Task
    split: str = "validation"
    batch_size: int = 8
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_batch_size(self.batch_size)
        if not isinstance(self.task, Task):
            raise InputError(
                f"'{self.task.name}' is a mixture; evaluate each of its tasks by itself"
            )
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}; expected 1 or more, or None for all")
        _ = self._records

    def __getstate__(self) -> dict[str, Any]:
        return _fields(self)

    @functools.cached_property
    def _records(self) -> Any:
        return self.task.open(self.split)

    @functools.cached_property
    def _pieces(self) -> list[np.ndarray] | None:
        """With Chunks, the tokens of every example: evaluation splits fit into memory."""
        if self.task.chunk is None:
            return None
        length, pieces = self.task.limits[0], []
        for start in range(0, len(self._records), self.task.chunk.window):
            stop = min(start + self.task.chunk.window, len(self._records))
            eos = [np.array([self.task.vocabulary.eos_id], dtype=np.int32)]
            parts = [part for i in range(start, stop) for part in (self._tokens(i)[0], *eos)]
            joined = np.concatenate(parts)
            pieces += [joined[i : i + length] for i in range(0, len(joined), length)]
        return pieces

    def _tokens(self, index: int) -> tuple[np.ndarray, ...]:
        return self.task.read(self._records, index)

    @property
    def num_examples(self) -> int:
        size = len(self._records) if self._pieces is None else len(self._pieces)
        return size if self.limit is None else min(size, self.limit)

    def __len__(self) -> int:
        """Batches, the last one perhaps not full."""
        return -(-self.num_examples // self.batch_size)

    def example(self, index: int) -> Arrays:
        """Example `index`: unpadded arrays by batch key."""
        tokens = self._tokens(index) if self._pieces is None else (self._pieces[index],)
        return self.task.streams(tokens, keyed_rng(self.seed, index))

    def batch(self, step: int, rows: slice = ALL_ROWS) -> Arrays:
        """Rows `rows` of batch `step`. Raises IndexError past the end."""
        if not 0 <= step < len(self):
            raise IndexError(f"evaluation batch {step} of {len(self)}")
        start, stop = _bounds(rows, self.batch_size)
        first, last = step * self.batch_size + start, step * self.batch_size + stop
        real = [self.example(i) for i in range(first, min(last, self.num_examples))]
        missing = last - first - len(real)
        if missing:
            empty = {key: value[:0] for key, value in self.example(0).items()}
            real += [empty] * missing
        batch = Pad()(real, self.task.lengths).rows
        if step == 0:
            check_batch(batch, self.task.num_ids)
        return batch

    def __getitem__(self, step: int) -> Arrays:
        return self.batch(step)

    def records(self, step: int, rows: slice = ALL_ROWS) -> list[dict[str, Any]]:
        """The records behind the real rows of batch `step`, for generate-and-score evaluation.

        Their fields after the preprocessors: `inputs` and `targets` of a text-to-text task. With
        Chunks, the decoded inputs and targets instead (see `objectives.as_text`).
        """
        start, stop = _bounds(rows, self.batch_size)
        first, last = step * self.batch_size + start, step * self.batch_size + stop
        indices = range(first, min(last, self.num_examples))
        if self._pieces is None:
            return [self.task.record(self._records[i]) for i in indices]
        examples = [self.task.objective(self._pieces[i], rng=self._rng(i)) for i in indices]
        return [as_text(example, self.task.vocabulary) for example in examples]

    def _rng(self, index: int) -> np.random.Generator:
        return keyed_rng(self.seed, index)


def iterate(
    batches: StepBatches,
    start_step: int = 0,
    *,
    stop_step: int | None = None,
    rows: slice = ALL_ROWS,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 8,
) -> Iterator[Arrays]:
    """`batches.batch(step, rows)` for the steps from `start_step`, made ahead by Grain.

    `num_threads` read threads in this process, or `num_workers` worker processes (each makes every
    num_workers-th batch; programs need a `__main__` guard for them). `prefetch` batches are kept
    ready, per worker. The batches are the same whatever these say.
    """
    import grain  # not at the top: it imports JAX where that is installed

    if stop_step is None:
        stop_step = len(batches) if isinstance(batches, Sized) else start_step + _ENDLESS
    if num_workers:
        batches = _for_workers(batches)
        if not flags.FLAGS.is_parsed():  # Grain's workers ask for their flags: give the defaults
            flags.FLAGS.mark_as_parsed()
    steps = grain.MapDataset.source(_Steps(batches, rows, start_step, stop_step))
    threads = max(num_threads, 1) if prefetch else 0
    dataset = steps.to_iter_dataset(grain.ReadOptions(threads, prefetch))
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=max(prefetch, 1))
        dataset = dataset.mp_prefetch(options)
    held = [iter(dataset)]

    def following() -> Arrays | None:
        batch = next(held[0], None) if held else None
        # A copy frees the worker's shared memory at once.
        return {k: np.array(v) for k, v in batch.items()} if batch and num_workers else batch

    def close() -> None:
        while held:
            held.pop().close()

    # Grain releases threads, processes and shared memory badly while Python is shutting down:
    # release them with the stream, or just before.
    stream = (batch for batch in iter(following, None))
    weakref.finalize(stream, close)
    return stream


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Batches as a Grain source."""

    batches: StepBatches
    rows: slice
    start: int
    stop: int

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __getitem__(self, index: int) -> Arrays:
        return self.batches.batch(self.start + int(index), self.rows)

    def __repr__(self) -> str:
        return f"Steps({self.start}, {self.stop})"


def _for_workers(batches: StepBatches) -> StepBatches:
    """Without metrics and postprocess, which workers don't need and may not unpickle."""
    if not isinstance(batches, Batches | EvaluationBatches):
        return batches
    bare = [dataclasses.replace(t, metrics=(), postprocess=None) for t in batches.task.tasks]
    if isinstance(batches.task, Task):
        return dataclasses.replace(batches, task=bare[0])
    return dataclasses.replace(batches, task=dataclasses.replace(batches.task, tasks=bare))


def _bounds(rows: slice, size: int) -> tuple[int, int]:
    start, stop, stride = rows.indices(size)
    if stride != 1 or start >= stop:
        raise InputError(f"rows {rows} of a batch of {size}: expected at least one row, stride 1")
    return start, stop


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected 1 or more")


def _fields(instance: Any) -> dict[str, Any]:
    """The configuration without what is cached: open files and windows stay out of pickles."""
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
