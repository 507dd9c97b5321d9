"""Learning rates as a product of named factors, in T5X's manner.

`FactorSchedule("constant * linear_warmup * rsqrt_decay", base_learning_rate=1.0,
warmup_steps=10_000)` is T5's pretraining schedule: 1 / sqrt(max(step, 10^4)) after a warmup.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp

from t5x_lite.types import Array, InputError

Schedule: TypeAlias = Callable[[Array], Array]  # step, from 0 -> float32 scalar


@dataclass(frozen=True)
class FactorSchedule:
    """The product of the factors named in `factors`, at a step counted from 0.

    With t the step and W `warmup_steps`, the factors are

        constant                base_learning_rate
        linear_warmup           min(1, t / W)
        rsqrt_decay             1 / sqrt(max(t, W, 1))
        rsqrt_normalized_decay  sqrt(W / max(t, W)): rsqrt_decay that starts from 1
        linear_decay            from 1 at step W down to final_fraction at total_steps
        cosine_decay            the same, along half a cosine
        decay_every             decay_factor ** (t // steps_per_decay)

    As in T5X (`create_learning_rate_scheduler`), but linear_decay and cosine_decay are plain
    factors that end at `total_steps` and stay there; T5X's linear_decay brings its own warmup and
    constant, and its cosine_decay starts again every `steps_per_cycle`.

    Raises:
      InputError: a factor that isn't known, or one whose knob wasn't given.
    """

    factors: str = "constant * linear_warmup * rsqrt_decay"
    base_learning_rate: float | None = None
    warmup_steps: int | None = None
    total_steps: int | None = None
    final_fraction: float = 0.0  # of the rate before the decay, at total_steps
    decay_factor: float | None = None
    steps_per_decay: int | None = None

    def __post_init__(self) -> None:
        names = self._names()
        if unknown := [name for name in names if name not in _FACTORS]:
            raise InputError(
                f"learning rate factor '{unknown[0]}' in '{self.factors}' is unknown; "
                f"the factors are: {', '.join(_FACTORS)}"
            )
        for name in names:
            if missing := [knob for knob in _FACTORS[name][0] if getattr(self, knob) is None]:
                raise InputError(
                    f"learning rate factor '{name}' in '{self.factors}' needs "
                    f"{' and '.join(missing)}: set FactorSchedule.{missing[0]}"
                )
        if self.base_learning_rate is not None and "constant" not in names:
            raise InputError(
                f"base_learning_rate={self.base_learning_rate} has no effect on the factors "
                f"'{self.factors}': add 'constant' to them"
            )
        for knob, least in (("warmup_steps", 0), ("total_steps", 1), ("steps_per_decay", 1)):
            value = getattr(self, knob)
            if value is not None and value < least:
                raise InputError(f"FactorSchedule.{knob} is {value}; expected {least} or more")
        if self.total_steps is not None and self.total_steps <= (self.warmup_steps or 0):
            raise InputError(
                f"FactorSchedule.total_steps is {self.total_steps}, but warmup_steps is "
                f"{self.warmup_steps}: nothing is left to decay over"
            )

    def _names(self) -> list[str]:
        return [name.strip() for name in self.factors.split("*")]

    def __call__(self, step: Array) -> Array:
        """The learning rate, a float32 scalar, for a Python or traced integer step."""
        step = jnp.asarray(step, jnp.float32)
        rate = jnp.ones((), jnp.float32)
        for name in self._names():
            rate = rate * _FACTORS[name][1](self, step)
        return rate


def _warmup(config: FactorSchedule, step: Array) -> Array | float:
    return jnp.minimum(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0


def _rsqrt(config: FactorSchedule, step: Array) -> Array:
    return 1.0 / jnp.sqrt(jnp.maximum(step, float(max(config.warmup_steps or 0, 1))))


def _rsqrt_normalized(config: FactorSchedule, step: Array) -> Array:
    return max(config.warmup_steps or 0, 1) ** 0.5 * _rsqrt(config, step)


def _progress(config: FactorSchedule, step: Array) -> Array:
    """0 until the end of the warmup, 1 from total_steps on."""
    start = config.warmup_steps or 0
    assert config.total_steps is not None  # checked when built
    return jnp.clip((step - start) / (config.total_steps - start), 0.0, 1.0)


def _linear(config: FactorSchedule, step: Array) -> Array:
    return 1.0 - (1.0 - config.final_fraction) * _progress(config, step)


def _cosine(config: FactorSchedule, step: Array) -> Array:
    fall = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(config, step)))
    return config.final_fraction + (1.0 - config.final_fraction) * fall


def _steps(config: FactorSchedule, step: Array) -> Array:
    return config.decay_factor ** jnp.floor(step / config.steps_per_decay)


# name -> (the knobs it can't do without, the factor)
_FACTORS: dict[str, tuple[tuple[str, ...], Callable[[FactorSchedule, Array], Any]]] = {
    "constant": (("base_learning_rate",), lambda config, step: config.base_learning_rate),
    "linear_warmup": (("warmup_steps",), _warmup),
    "rsqrt_decay": (("warmup_steps",), _rsqrt),
    "rsqrt_normalized_decay": (("warmup_steps",), _rsqrt_normalized),
    "linear_decay": (("total_steps",), _linear),
    "cosine_decay": (("total_steps",), _cosine),
    "decay_every": (("decay_factor", "steps_per_decay"), _steps),
}


def learning_rate_at(learning_rate: Schedule | float, step: Array) -> Array:
    """The float32 learning rate at `step` of a schedule or of a constant."""
    rate = learning_rate(step) if callable(learning_rate) else learning_rate
    return jnp.asarray(rate, jnp.float32)
