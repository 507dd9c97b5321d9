"""Student's interval holds the true mean as often as it says, however few the seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from t5x_lite.studies.spread import spread
from t5x_lite.types import InputError


def test_three_values_by_the_book():
    found = spread([82.0, 83.0, 84.0])  # t(2) = 4.3027, s = 1
    assert found.mean == 83.0
    assert found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert str(found) == "83.0 (80.5 to 85.5)"


def test_it_holds_the_mean_in_so_many_cases():
    rng = np.random.default_rng(0)
    drawn = [spread(list(row), level=0.8) for row in rng.normal(5.0, 2.0, (2000, 3))]
    inside = np.mean([found.low <= 5.0 <= found.high for found in drawn])
    assert inside == pytest.approx(0.8, abs=0.03)


def test_one_value_has_no_interval_and_none_is_an_error():
    found = spread([4.0])
    assert (found.mean, math.isnan(found.low), str(found)) == (4.0, True, "4.00")
    with pytest.raises(InputError, match="expected one a seed"):
        spread([])
