"""A few seeds' values: their mean, and Student's interval of it.

The bootstrap of `evaluation.bootstrap` says how much of a score is owed to the choice of test
examples; the interval here says how much is owed to the seed: what was drawn, and in what order.

    >>> spread([82.0, 83.0, 84.0])
    Spread(mean=83.0, low=80.516, high=85.484)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t5x_lite.types import InputError


@dataclass(frozen=True)
class Spread:
    """A mean over seeds; `low` and `high` are nan of a single one."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        places = 1 if abs(self.mean) >= 10 else 2  # percents, and losses in nats
        if math.isnan(self.low):
            return f"{self.mean:.{places}f}"
        return f"{self.mean:.{places}f} ({self.low:.{places}f} to {self.high:.{places}f})"


def spread(values: Sequence[float], level: float = 0.95) -> Spread:
    """The mean and Student's t interval of it: mean +- t(n - 1) s / sqrt(n).

    For values of a normal distribution it holds the true mean in `level` of all cases, however few
    they are; with three, t is 4.30 for 95%. Raises InputError for no values.
    """
    if not len(values):
        raise InputError("spread of no values: expected one a seed")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Spread(mean, math.nan, math.nan)
    from scipy.special import stdtrit  # jax brings scipy; a tenth of a second to import

    t = float(stdtrit(count - 1, (1 + level) / 2))
    half = t * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Spread(mean, mean - half, mean + half)
