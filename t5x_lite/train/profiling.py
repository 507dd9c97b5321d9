"""A trace of a few steps, for xprof and Perfetto: what the device and the host did, and when."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

from t5x_lite.types import InputError

DIRECTORY = "profile"


class Profile:
    """Traces some steps of a run into `model_dir/profile`, once, on process 0.

    Args:
      steps: the first and the last of them, such as (10, 12); None: no trace.
      model_dir: the run's folder.
      say: tells people where the trace is.
    """

    def __init__(
        self, steps: tuple[int, int] | None, model_dir: str, say: Callable[[str], object]
    ) -> None:
        self._steps = steps if jax.process_index() == 0 else None
        self._folder, self._say = os.path.join(model_dir, DIRECTORY), say
        self._running = False

    def run(self, step: int, program: Callable[..., Any], *arguments: Any) -> Any:
        """What `program` returns of its arguments, whose run is that of `step`."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            return program(*arguments)
        if not self._running:
            jax.block_until_ready(arguments)  # the step before is none of those
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            results = program(*arguments)
        if step == self._steps[1]:
            jax.block_until_ready(results)
            self.close()
        return results

    def close(self) -> None:
        """Writes the trace, if one is under way."""
        if self._running and self._steps is not None:
            self._running = False
            jax.profiler.stop_trace()
            first, last = self._steps
            self._say(f"Traced steps {first} to {last}: {self._folder} (xprof --logdir shows it)")


def check_steps(steps: tuple[int, int] | None, total_steps: int) -> None:
    """Raises InputError unless `steps` is None or a first and a last step of the run."""
    if steps is None:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= total_steps:
        raise InputError(
            f"train.profile_steps={steps}: expected the first and the last step to trace, such as "
            f"(10, 12), among the run's {total_steps}"
        )
