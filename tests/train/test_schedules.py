"""Schedules against closed formulas, under jit, and their error messages."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.train.schedules import FactorSchedule, learning_rate_at
from t5x_lite.types import InputError

STEPS = (0, 1, 5, 9, 10, 11, 50, 99, 100, 1000)
RAMP = lambda t: min(1.0, t / 10)
PROGRESS = lambda t: min(max((t - 10) / 90, 0.0), 1.0)

CASES = {
    "constant": lambda t: 0.3,
    "constant * linear_warmup": lambda t: 0.3 * RAMP(t),
    "constant * linear_warmup * rsqrt_decay": lambda t: 0.3 * RAMP(t) / math.sqrt(max(t, 10)),
    "constant*rsqrt_normalized_decay": lambda t: 0.3 * math.sqrt(10 / max(t, 10)),
    "constant * linear_decay": lambda t: 0.3 * (1 - 0.9 * PROGRESS(t)),
    "constant * linear_warmup * cosine_decay": lambda t: (
        0.3 * RAMP(t) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * PROGRESS(t))))
    ),
    "constant * decay_every": lambda t: 0.3 * 0.5 ** (t // 20),
}


@pytest.mark.parametrize("factors", CASES)
def test_equals_its_formula(factors):
    schedule = FactorSchedule(
        factors,
        base_learning_rate=0.3,
        warmup_steps=10,
        total_steps=100,
        final_fraction=0.1,
        decay_factor=0.5,
        steps_per_decay=20,
    )
    jitted = jax.jit(schedule)
    for step in STEPS:
        got = jitted(jnp.asarray(step, jnp.int32))
        assert got.dtype == jnp.float32
        assert got.shape == ()
        np.testing.assert_allclose(got, CASES[factors](step), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(schedule(step), got, rtol=1e-5, atol=1e-7)


def test_no_warmup_is_no_warmup():
    schedule = FactorSchedule(base_learning_rate=2.0, warmup_steps=0)
    np.testing.assert_allclose([schedule(0), schedule(1), schedule(4)], [2.0, 2.0, 1.0], rtol=1e-6)


def test_is_a_value():
    build = lambda: FactorSchedule("constant", base_learning_rate=0.1)
    assert build() == build()
    assert hash(build()) == hash(build())


def test_learning_rate_at_takes_both_kinds():
    assert learning_rate_at(0.25, 7) == 0.25
    assert learning_rate_at(lambda step: step * 2, 7) == 14.0
    assert learning_rate_at(0.25, 7).dtype == jnp.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"factors": "constant * rsqrt"}, "'rsqrt'.*rsqrt_decay, rsqrt_normalized_decay"),
        ({"factors": "constant"}, "'constant'.*needs base_learning_rate"),
        ({"base_learning_rate": 1.0}, "'linear_warmup'.*needs warmup_steps"),
        ({"factors": "linear_decay"}, "needs total_steps"),
        ({"factors": "decay_every"}, "needs decay_factor and steps_per_decay"),
        ({"factors": "linear_warmup", "warmup_steps": 3, "base_learning_rate": 1.0}, "no effect"),
        ({"factors": "linear_decay", "warmup_steps": 9, "total_steps": 9}, "nothing is left"),
        ({"factors": "linear_warmup", "warmup_steps": -1}, "expected 0 or more"),
        ({"factors": ""}, "''.*unknown"),
    ],
)
def test_bad_schedules_are_named(kwargs, message):
    with pytest.raises(InputError, match=message):
        FactorSchedule(**kwargs)
