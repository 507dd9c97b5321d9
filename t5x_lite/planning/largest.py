"""How many rows a slice has memory for: the run's step, compiled with more and fewer of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from t5x_lite.planning.request import DoesNotFit, Plan, Request
from t5x_lite.types import InputError

TRIES: Final = 10  # programs compiled at most: one to two minutes each for models of a billion


@dataclass(frozen=True)
class Largest:
    """Batches that were compiled: by rows, the plan, or None where it does not fit."""

    plans: dict[int, Plan | None]
    step: int  # what rows are a multiple of

    @property
    def rows(self) -> int:
        """The most that fit; 0: none did."""
        return max((rows for rows, plan in self.plans.items() if _fits(plan)), default=0)

    @property
    def too_many(self) -> int | None:
        """The fewest that did not fit; None: all did."""
        return min((rows for rows, plan in self.plans.items() if not _fits(plan)), default=None)

    @property
    def settled(self) -> bool:
        """Whether nothing between what fits and what doesn't is left to try."""
        return self.too_many is not None and self.too_many - self.rows <= self.step

    @property
    def plan(self) -> Plan:
        """That of the most rows that fit. Raises InputError if none did."""
        found = self.plans.get(self.rows)
        if found is None:
            raise InputError(
                f"not even {min(self.plans):,} rows fit: take a larger slice, more recomputing, or "
                "a mesh of more fsdp or model"
            )
        return found

    def record(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "rows_that_do_not_fit": self.too_many,
            "settled": self.settled,
            "bytes_by_rows": {
                rows: None if plan is None else plan.used
                for rows, plan in sorted(self.plans.items())
            },
        }

    def next_rows(self) -> int:
        """What to try while it isn't settled.

        Memory grows almost in a line with the rows: where the line through the two largest that fit
        reaches the chip's, and half way between what fits and what doesn't if that is not between.
        """
        low, high = self.rows // self.step, (self.too_many or 0) // self.step
        guess = self._on_line() // self.step
        if not high:
            return self.step * min(max(guess, low + 1), 8 * low)
        return self.step * (guess if low < guess < high else (low + high) // 2)

    def _on_line(self) -> int:
        fitting = [(rows, plan) for rows, plan in sorted(self.plans.items()) if plan is not None]
        if not fitting:
            return 0
        rows, plan = fitting[-1]
        if len(fitting) == 1:  # gradients among the temporaries don't grow: so it is a low guess
            grown, added = plan.temporaries, rows
        else:
            grown, added = plan.used - fitting[-2][1].used, rows - fitting[-2][0]
        if grown <= 0:
            return 2 * rows
        return int(rows + (plan.hbm - plan.used) * added / grown)


def find_largest(request: Request, console: Console, tries: int = TRIES) -> Largest:
    """Compiles the step with other numbers of rows until one more on each device does not fit.

    It ends unsettled after so many `tries`.
    """
    step = request.rows_step
    found = Largest({}, step)
    rows = max(request.arrays.rows // step, 1) * step
    while len(found.plans) < tries:
        console.print(f"{rows:,} rows ...")
        tried = dataclasses.replace(request, arrays=dataclasses.replace(request.arrays, rows=rows))
        try:
            plan = tried.plan()
        except DoesNotFit:
            plan = None
        found = Largest({**found.plans, rows: plan}, step)
        if found.settled:
            break
        rows = found.next_rows()
    return found


def _fits(plan: Plan | None) -> bool:
    return plan is not None and plan.fits
