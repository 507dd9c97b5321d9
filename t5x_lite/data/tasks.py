"""Tasks and mixtures: what to read, how to make examples of it, and how predictions are scored.

Both are frozen and checked when they are built: whatever can be known to fail without reading data
fails then. They do nothing by themselves; `pipeline.Batches` makes batches of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from t5x_lite.data.layouts import as_encoder_decoder, put_ahead
from t5x_lite.data.objectives.base import Objective, is_labelled
from t5x_lite.data.rates import Explicit, Proportional, Rates, whole_ratio
from t5x_lite.data.sources import RandomAccess, Record, Source
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.types import InputError

Preprocessor = Callable[[Record], Record]
# (targets, predictions) -> values by name. A target is the record's `references`, if it has them
# (several right answers, or what else the metric compares with), or else its `targets`. Of a
# labelled objective, targets are its `truth` and predictions its `answer`.
Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
Layout = Callable[..., dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Fills rows from documents of any length, as T5's pretraining does, by random access.

    `window` consecutive documents are joined with eos after each, and cut into pieces of as many
    tokens as the objective takes. Exactly `rows` pieces of each window are examples, drawn in
    random order when the data is shuffled: so that example e is piece `e % rows` of window
    `e // rows`. Pieces beyond are left out, and so is the last, short one; a window with too few
    begins again with its first, noised anew. `pipeline.measure` counts both.

    `rows=None` takes the mean number of pieces of a window, measured on documents spread evenly
    over the split; about half of the windows then have a few too many, and half too few. Wider
    windows lose less: of 128 documents with lengths that vary by 60%, about 2%.
    """

    window: int = 128  # documents joined
    rows: int | None = None  # pieces taken of each window

    def __post_init__(self) -> None:
        if self.window < 1 or (self.rows is not None and self.rows < 1):
            raise InputError(
                f"Chunks(window={self.window}, rows={self.rows}): expected 1 or more documents, "
                "and 1 or more rows or None"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of example: source -> preprocessors -> tokens -> objective -> layout.

    Raises InputError, when built, for a layout that needs what the objective doesn't make, lengths
    that are missing, not positive or too short for the objective, a vocabulary with too few
    sentinels, and an objective with another vocabulary.
    """

    name: str
    source: Source
    vocabulary: Vocabulary
    objective: Objective
    lengths: Mapping[str, int]  # tokens by stream: {"encoder": 512, "decoder": 114}
    layout: Layout = as_encoder_decoder
    preprocessors: Sequence[Preprocessor] = ()
    chunk: Chunks | None = None  # for documents of any length; None: one example a record
    metrics: Sequence[Metric] = ()
    postprocess: Callable[[str], str] | None = None  # of predictions and targets, before metrics
    # Ids of a soft prompt in front of every example, in its row: training sets them by its
    # transform.
    prompt_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # gin hands over wrappers of functions; the function itself pickles and compares.
        object.__setattr__(self, "layout", inspect.unwrap(self.layout))
        object.__setattr__(self, "preprocessors", tuple(self.preprocessors))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        self._check_layout()
        if self.objective.vocabulary.fingerprint != self.vocabulary.fingerprint:
            raise InputError(
                f"task '{self.name}': its objective has another vocabulary than the task; give "
                "both the same"
            )
        if self.chunk is not None and is_labelled(self.objective):
            raise InputError(
                f"task '{self.name}': Chunks joins documents, and {type(self.objective).__name__} "
                "asks for the labels of each: set chunk=None"
            )
        if self.chunk is not None and len(self.objective.features) != 1:
            raise InputError(
                f"task '{self.name}': Chunks joins documents of one text, but "
                f"{type(self.objective).__name__} takes {' and '.join(self.objective.features)}: "
                "set chunk=None"
            )
        first = min(self.room.values())
        if first < 1:
            raise InputError(
                f"task '{self.name}': a soft prompt of {len(self.prompt_ids)} tokens leaves no "
                f"room in rows of {dict(self.lengths)}: make the rows longer, or the prompt shorter"
            )
        try:
            _ = self.limits
        except InputError as error:
            behind = f" behind a soft prompt of {len(self.prompt_ids)} tokens"
            raise InputError(
                f"task '{self.name}'{behind if self.prompt_ids else ''}: {error}"
            ) from error

    def _check_layout(self) -> None:
        needs, streams = (getattr(self.layout, name, None) for name in ("needs", "streams"))
        if needs is None or streams is None:
            raise InputError(
                f"task '{self.name}': layout {self.layout!r} is not a layout; expected a function "
                "of t5x_lite.data.layouts, such as as_encoder_decoder"
            )
        missing = [stream for stream in needs if stream not in self.objective.makes]
        if missing:
            raise InputError(
                f"task '{self.name}': layout {getattr(self.layout, '__name__', self.layout)} needs "
                f"{', '.join(missing)}, but {type(self.objective).__name__} makes "
                f"{', '.join(self.objective.makes)}: choose another layout or objective"
            )
        if set(self.lengths) != set(streams):
            raise InputError(
                f"task '{self.name}': lengths has {', '.join(self.lengths) or 'nothing'}; the "
                f"layout needs exactly {', '.join(streams)}"
            )
        for stream, length in self.lengths.items():
            if not isinstance(length, int) or length < 1:
                raise InputError(
                    f"task '{self.name}': lengths['{stream}'] is {length!r}; expected a positive "
                    "number of tokens"
                )

    @functools.cached_property
    def limits(self) -> tuple[int, ...]:
        """The most tokens of each feature that fit the lengths."""
        return self.objective.fit(self.room)

    @property
    def room(self) -> dict[str, int]:
        """The lengths that examples have for themselves, behind a soft prompt."""
        first = "encoder" if "encoder" in self.lengths else "decoder"
        return {
            stream: length - (len(self.prompt_ids) if stream == first else 0)
            for stream, length in self.lengths.items()
        }

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Itself: a task is a mixture of one."""
        return (self,)

    @property
    def num_ids(self) -> int:
        """One more than the largest id that rows may have."""
        return max(self.vocabulary.size, *(token + 1 for token in self.prompt_ids), 0)

    def behind(self, prompt_ids: tuple[int, ...]) -> Task:
        """The task with a soft prompt's ids in front of every example."""
        return dataclasses.replace(self, prompt_ids=tuple(prompt_ids))

    @property
    def fingerprint(self) -> str:
        """The vocabulary's fingerprint, which a checkpoint remembers."""
        return self.vocabulary.fingerprint

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of what a head tells apart for the objective, in order; of tokens, none."""
        return tuple(getattr(self.objective, "labels", ()))

    def open(self, split: str) -> RandomAccess:
        """The split's raw records. Raises InputError for a split that the source doesn't have."""
        try:
            return self.source.open(split)
        except InputError as error:
            raise InputError(f"task '{self.name}': {error}") from error

    def record(self, record: Record) -> Record:
        """The record after all preprocessors."""
        for preprocessor in self.preprocessors:
            try:
                record = preprocessor(record)
            except KeyError as error:
                raise InputError(
                    f"task '{self.name}': {preprocessor} reads the field {error}, but the record "
                    f"has {', '.join(record)}"
                ) from error
            except InputError as error:
                raise InputError(f"task '{self.name}': {error}") from error
            except (TypeError, ValueError, AttributeError, IndexError) as error:
                raise InputError(
                    f"task '{self.name}': {preprocessor} can't take the record, whose fields are "
                    f"{_kinds(record)}: {error}"
                ) from error
            if not isinstance(record, dict):
                raise InputError(
                    f"task '{self.name}': {preprocessor} returned {type(record).__name__}; "
                    "expected a record (a dict); preprocessors can't drop records"
                )
        return record

    def tokens(self, record: Record) -> tuple[np.ndarray, ...]:
        """The preprocessed record's tokens by feature, int32, of whatever length, without eos.

        With labels, behind them, where the objective asks for these.
        """
        if is_labelled(self.objective):
            try:
                return self.objective.read(record)
            except InputError as error:
                raise InputError(f"task '{self.name}': {error}") from error
        if "tokens" in record and len(self.objective.features) == 1:
            return (np.asarray(record["tokens"], dtype=np.int32),)
        for feature in self.objective.features:
            if not isinstance(record.get(feature), str):
                raise InputError(
                    f"task '{self.name}': {type(self.objective).__name__} needs the text field "
                    f"'{feature}', but the record has {', '.join(record)}: rename a field with a "
                    f"preprocessor, such as Rename({{'{feature}': '...'}})"
                )
        return tuple(self.vocabulary.encode(record[f]) for f in self.objective.features)

    def read(self, records: RandomAccess, index: int) -> tuple[np.ndarray, ...]:
        """The tokens of record `index`. InputErrors name it."""
        try:
            return self.tokens(self.record(records[index]))
        except InputError as error:
            raise InputError(f"record {index + 1}: {error}") from error

    def streams(
        self, tokens: Sequence[np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Unpadded arrays by batch key, of the tokens cut to `limits`."""
        if is_labelled(self.objective):
            cut: Sequence[np.ndarray] = self.objective.cut(tokens, self.room)
        else:
            cut = [one[:limit] for one, limit in zip(tokens, self.limits, strict=True)]
        streams = self.layout(self.objective(*cut, rng=rng), self.room)
        return put_ahead(streams, self.prompt_ids) if self.prompt_ids else streams


def _kinds(record: Record) -> str:
    """`text (str), answers (dict of text, answer_start)`."""
    return ", ".join(
        f"{name} ({type(value).__name__}"
        + (f" of {', '.join(map(str, value))})" if isinstance(value, Mapping) else ")")
        for name, value in record.items()
    )


# --- mixtures ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several tasks in one stream of examples, at exact long-run rates.

    `rates` is one number a task, or `Proportional()`, `Capped(limit)`, `Temperature(t)`, which
    count the split's examples. The tasks share vocabulary, lengths and layout, or else
    InputError.
    """

    name: str
    tasks: Sequence[Task]
    rates: Sequence[float] | Rates = Proportional()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise InputError(f"mixture '{self.name}' has no tasks: expected one or more")
        first = self.tasks[0]
        for task in self.tasks[1:]:
            same = {
                "vocabulary": task.fingerprint == first.fingerprint,
                "lengths": dict(task.lengths) == dict(first.lengths),
                "layout": task.layout is first.layout,
                "token types": _has_token_types(task) == _has_token_types(first),
                "labels": task.labels == first.labels,
                "name (they must differ)": task.name != first.name,
            }
            for what, holds in same.items():
                if not holds:
                    raise InputError(
                        f"mixture '{self.name}': task '{task.name}' can't join '{first.name}' "
                        f"because of its {what}; they share vocabulary, lengths, layout and streams"
                    )
        if len({task.name for task in self.tasks}) < len(self.tasks):
            raise InputError(f"mixture '{self.name}' has two tasks of one name: rename one")
        if not callable(self.rates):
            rates = tuple(self.rates)
            if len(rates) != len(self.tasks) or not all(rate > 0 for rate in rates):
                raise InputError(
                    f"mixture '{self.name}' has {len(self.tasks)} tasks and rates {rates}; "
                    "expected one positive rate a task"
                )
            object.__setattr__(self, "rates", Explicit(rates))

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tasks[0].vocabulary

    @property
    def lengths(self) -> Mapping[str, int]:
        return self.tasks[0].lengths

    @property
    def num_ids(self) -> int:
        return self.tasks[0].num_ids

    def behind(self, prompt_ids: tuple[int, ...]) -> Mixture:
        """See `Task.behind`."""
        return dataclasses.replace(self, tasks=[task.behind(prompt_ids) for task in self.tasks])

    @property
    def labels(self) -> tuple[str, ...]:
        return self.tasks[0].labels

    @property
    def fingerprint(self) -> str:
        """The vocabulary's fingerprint, which a checkpoint remembers."""
        return self.vocabulary.fingerprint

    def weights(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Whole numbers in the ratio of the rates, for tasks with so many examples."""
        rates: Any = self.rates
        return whole_ratio([rate or Fraction(1, 10**9) for rate in rates(sizes)])


def _has_token_types(task: Task) -> bool:
    return "token_types" in task.objective.makes
