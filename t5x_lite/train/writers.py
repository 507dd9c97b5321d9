"""Where a run's metrics go: JSON lines, TensorBoard event files, the console.

A record is a step and a flat dict of numbers. Records of training have bare names (`loss`) or
`train/loss`; those of an evaluation begin with its name, such as `eval/loss`. Values that depend
on the machine (seconds, tokens a second) go to a writer of their own, `timing.jsonl`, so that
`metrics.jsonl` is reproducible to the byte.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from t5x_lite.types import InputError


class Writer(Protocol):
    """Takes records as they are measured."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records scalars (Python, numpy or JAX numbers) measured at `step`."""

    def truncate_after(self, step: int) -> None:
        """Forgets records of later steps: called when a run resumes from a checkpoint."""

    def close(self) -> None:
        """Ends the records; `write` must not be called again."""


class MultiWriter:
    """Passes every call on to several writers; with none, it does nothing."""

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self.writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.write(step, metrics)

    def truncate_after(self, step: int) -> None:
        for writer in self.writers:
            writer.truncate_after(step)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def on_first_process(make: Callable[[], Writer]) -> Writer:
    """The writer of `make` in process 0, and one that does nothing in every other."""
    return make() if jax.process_index() == 0 else MultiWriter()


class JsonlWriter:
    """One JSON object a line: `{"loss": 3.25, "step": 7}`.

    The content is a function of the records alone: keys are sorted, floats printed so that they
    read back exactly, and NaN and infinities, which JSON lacks, become null. Each line reaches the
    operating system before `write` returns, so that a killed process loses at most the line it was
    writing; `truncate_after` mends such a torn last line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: Any = None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        record = {"step": int(step)} | {key: _number(value) for key, value in metrics.items()}
        line = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._file.write(line.encode())

    def truncate_after(self, step: int) -> None:
        """Keeps the records up to `step`, and whole lines only, replacing the file atomically."""
        self.close()
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        kept = b"".join(
            line for line, record in _records(self.path, whole) if record["step"] <= step
        )
        if kept != content:
            temporary = self.path.with_name(self.path.name + ".tmp")
            with open(temporary, "wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a JsonlWriter's file, without a torn last line.

    Raises InputError for a file that isn't there and for a line that isn't a record.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"can't read the metrics file '{path}': {error.strerror}") from error
    return [record for _, record in _records(path, content[: content.rfind(b"\n") + 1])]


def _records(
    path: str | os.PathLike[str], content: bytes
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}, line {number} isn't a metrics record (a JSON object with a 'step'): "
                "remove that line, or move the file away"
            ) from error
        yield line, record


def _number(value: Any) -> int | float | None:
    """A Python int, or a finite float, or None; whatever library the scalar came from."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


class TensorBoardWriter:
    """TensorBoard event files in `folder`, in tensorboardX's format (no TensorFlow).

    Written at once by tensorboardX's EventsWriter: its SummaryWriter hands events to a thread
    through a queue that `flush` doesn't wait for, so that a kill would lose them.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._file: Any = None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        from tensorboardX import summary  # a second to import: not for every program

        scalars = [summary.scalar(key, float(metrics[key])).value[0] for key in sorted(metrics)]
        self._event(step=int(step), summary=summary.Summary(value=scalars))

    def truncate_after(self, step: int) -> None:
        """Events can't be removed: opens a new file that tells TensorBoard to hide later steps."""
        self.close()
        if any(self.folder.glob("events.out.tfevents.*")):
            from tensorboardX.proto.event_pb2 import SessionLog

            self._event(step=int(step) + 1, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _event(self, **fields: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Its name holds the second only: number it, lest a quick restart write over the last.
            suffix = f".{len(list(self.folder.glob('events.out.tfevents.*')))}"
            self._file = EventsWriter(str(self.folder / "events"), suffix)
        self._file.write_event(Event(wall_time=time.time(), **fields))
        self._file.flush()


class ConsoleWriter:
    """Progress for people: a live bar in a terminal, a line now and then elsewhere.

    Shown of a training record are its loss and tokens a second, wherever in the path these names
    stand last (`train/loss`); the two may come in records of their own, the loss prints the line.
    Records of evaluations are shown in full, each on its line.

    Args:
      total_steps: where the bar ends.
      console: a rich Console; None: standard error, so that a program's output can be piped.
      seconds: the least time between two lines of training where there is no terminal. The first
        and the last step always show.
      clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        console: Console | None = None,
        *,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(file=sys.stderr, soft_wrap=True)
        self._total, self._seconds, self._clock = total_steps, seconds, clock
        self._first: tuple[int, float] | None = None  # (step, time) of the first record
        self._shown = -math.inf
        self._latest: dict[str, float] = {}
        self._progress: Progress | None = None
        self._bar: Any = None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        evaluation = {key: value for key, value in metrics.items() if _is_evaluation(key)}
        training = {key: value for key, value in metrics.items() if key not in evaluation}
        for key, value in training.items():
            if (name := key.split("/")[-1]) in _SHOWN:
                self._latest[name] = float(value)
        text = "  ".join(
            _SHOWN[name].format(self._latest[name]) for name in _SHOWN if name in self._latest
        )
        if self._console.is_terminal:
            self._update_bar(step, text)
        elif any(key.split("/")[-1] == "loss" for key in training):
            self._print_line(step, text)
        if evaluation:
            self._print(f"step {step}  {'  '.join(_with_intervals(evaluation))}")

    def truncate_after(self, step: int) -> None:
        del step  # what was printed was printed

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _update_bar(self, step: int, text: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar = self._progress.add_task("", total=self._total, completed=step, text=text)
            self._progress.start()
        self._progress.update(self._bar, completed=step, text=text)

    def _print_line(self, step: int, text: str) -> None:
        now = self._clock()
        self._first = self._first or (step, now)
        if now - self._shown < self._seconds and step < self._total:
            return
        self._shown = now
        done, taken = step - self._first[0], now - self._first[1]
        left = f"  {_duration(taken / done * (self._total - step))} left" if done > 0 else ""
        self._print(f"step {step}/{self._total}  {text}{left if step < self._total else ''}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)


ENDS = ("low", "high")  # suffixes of an interval's limits
_SHOWN = {"loss": "loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}


def _is_evaluation(key: str) -> bool:
    return "/" in key and not key.startswith(("train/", "timing/"))


def _with_intervals(metrics: Mapping[str, Any]) -> Iterator[str]:
    """`x/bleu 21.3 (19.9 to 22.8)` of `x/bleu`, `x/bleu_low` and `x/bleu_high`."""
    for key, value in metrics.items():
        names = [f"{key}_{end}" for end in ENDS]
        if all(name in metrics for name in names):
            limits = " to ".join(f"{float(metrics[name]):.4g}" for name in names)
            yield f"{key} {float(value):.4g} ({limits})"
        elif not any(key.endswith(f"_{end}") and key[: -len(end) - 1] in metrics for end in ENDS):
            yield f"{key} {float(value):.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
