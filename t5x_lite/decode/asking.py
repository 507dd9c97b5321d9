"""How a model was trained to be asked: a run remembers it, so that nobody has to say it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from t5x_lite.data.layouts import as_prefix_lm
from t5x_lite.data.objectives import BART, UL2, FillInTheMiddle, IidDenoising, SpanCorruption
from t5x_lite.data.tasks import Mixture, Task
from t5x_lite.types import InputError

# What a decoder alone sees of a text before it writes:
#   continue   start 5 6          it goes on from the text
#   wrapped    start 5 6 eos      it answers the text: TextToText with as_decoder
#   prefix     the same, seen in both directions: as_prefix_lm
Prompt: TypeAlias = Literal["continue", "wrapped", "prefix"]
# What stands for a gap, and what is written for it:
#   mask       5 mask 8           the text anew (BART)
#   sentinels  5 99 8             99 6 7: each gap's contents behind its sentinel (T5, UL2)
#   middle     97 5 98 8 99       6 7 (FillInTheMiddle's prefix, suffix and middle)
Gaps: TypeAlias = Literal["mask", "sentinels", "middle"]
PROMPTS: Final = ("continue", "wrapped", "prefix")
_GAPS: Final[tuple[tuple[Any, Gaps], ...]] = (
    (BART, "mask"),
    (SpanCorruption | IidDenoising | UL2, "sentinels"),
    (FillInTheMiddle, "middle"),
)


@dataclass(frozen=True)
class Asking:
    """How a model was trained to be asked; None: nobody says, so that its kind has to tell."""

    prompt: Prompt | None = None  # of a decoder alone
    gaps: Gaps | None = None
    middle: tuple[int, int, int] | None = None  # ids of prefix, suffix, middle; None: sentinels

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt not in PROMPTS:
            raise InputError(f"prompt='{self.prompt}': expected one of {', '.join(PROMPTS)}")
        if self.middle is not None:
            object.__setattr__(self, "middle", tuple(self.middle))


def asking_of(task: Task | Mixture) -> Asking:
    """How a task trains a model to be asked; what the tasks of a mixture disagree on is None."""
    found = [_of_task(one) for one in task.tasks]
    return Asking(
        prompt=_agreed(one.prompt for one in found),
        gaps=_agreed(one.gaps for one in found),
        middle=_agreed(one.middle for one in found),
    )


def _of_task(task: Task) -> Asking:
    objective = task.objective
    prompt: Prompt | None = None
    if set(task.lengths) == {"decoder"}:
        prompt = "wrapped" if "inputs" in objective.makes else "continue"
        prompt = "prefix" if task.layout is as_prefix_lm else prompt
    gaps = next((gaps for kind, gaps in _GAPS if isinstance(objective, kind)), None)
    middle = objective.markers if isinstance(objective, FillInTheMiddle) else None
    return Asking(prompt, gaps, middle)


def _agreed(values: Iterable[Any]) -> Any:
    """The one value that those who have one have."""
    said = {value for value in values if value is not None}
    return said.pop() if len(said) == 1 else None
