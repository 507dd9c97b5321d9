"""The search for the largest batch, on chips whose memory is a formula."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from t5x_lite.planning.largest import find_largest
from t5x_lite.planning.request import Arrays, DoesNotFit
from t5x_lite.types import InputError

HBM = 16 * 2**30


@dataclass(frozen=True)
class Made:
    """A plan's memory."""

    used: int
    temporaries: int
    hbm: int = HBM

    @property
    def fits(self) -> bool:
        return self.used <= self.hbm


@dataclass(frozen=True)
class Asked:
    """A request: `fixed` bytes held, `gradients` and `a_row` bytes of temporaries."""

    arrays: Arrays
    fixed: int
    gradients: int
    a_row: int
    bent: int = 0  # saved from half of the memory on, as a compiler that recomputes does
    rows_step: int = 16

    def plan(self) -> Made:
        temporaries = self.gradients + self.a_row * self.arrays.rows
        used = self.fixed + temporaries
        used -= min(self.bent, max(0, used - HBM // 2))
        if used > HBM:
            raise DoesNotFit("too many")
        return Made(used, used - self.fixed)

    @property
    def most(self) -> int:
        rows = (HBM + self.bent - self.fixed - self.gradients) // self.a_row
        return rows // self.rows_step * self.rows_step


def search(asked, **settings):
    return find_largest(asked, Console(file=io.StringIO()), **settings)


@pytest.mark.parametrize("start", [16, 40, 1024, 2**17])
@pytest.mark.parametrize("a_row", [2**15, 3 * 2**20, 2**25 + 7, 2**28])
@pytest.mark.parametrize(
    ("fixed", "gradients", "bent"), [(0, 0, 0), (2**33, 2**31, 0), (2**32, 2**30, 2**31)]
)
def test_one_row_more_each_does_not_fit(start, a_row, fixed, gradients, bent):
    asked = Asked(Arrays(start, {}), fixed, gradients, a_row, bent)
    found = search(asked, tries=40)
    assert found.settled
    assert found.rows == asked.most
    assert found.too_many == asked.most + 16
    assert found.plan.fits


def test_few_programs_are_compiled():
    """Of a straight line: the run's, one on its side, the one that is full, and one too many."""
    counts = []
    for a_row in range(2**22, 2**24, 2**20):
        asked = Asked(Arrays(64, {}), 2**32, 2**31, a_row)
        counts.append(len(search(asked).plans))
    assert max(counts) <= 5, counts


def test_a_search_may_end_before_it_is_settled():
    found = search(Asked(Arrays(16, {}), 0, 2**30, 2**16), tries=2)
    assert not found.settled
    assert found.too_many is None
    assert found.rows == max(found.plans) > 16


def test_no_row_fits():
    found = search(Asked(Arrays(64, {}), 0, HBM, 2**20))
    assert (found.rows, found.too_many) == (0, 16)
    with pytest.raises(InputError, match="not even 16 rows fit"):
        _ = found.plan
