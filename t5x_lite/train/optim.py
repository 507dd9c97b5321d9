"""Optimizer configurations, and where an optimizer's state lives on a mesh.

A configuration is a frozen dataclass that gin can build; `make(axes)` turns it into an optax
transformation for the trainable parameters alone, so that state exists for those alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from t5x_lite import trees
from t5x_lite.train.adafactor import adafactor, is_axes
from t5x_lite.train.rounding import ROUNDINGS, Rounding, rounded
from t5x_lite.train.schedules import Schedule, learning_rate_at
from t5x_lite.types import InputError, Params

DecayRules = tuple[tuple[str, bool], ...]  # (regex on a/b/c paths, does it decay?)
RateRules = tuple[tuple[str, float], ...]  # (regex, what the learning rate is multiplied by)
UNDECAYED = frozenset({"scale", "bias"})  # last names of the paths that don't decay by default


class Optimizer(Protocol):
    """What the training step needs of an optimizer's configuration."""

    @property
    def learning_rate(self) -> Schedule | float: ...

    def make(self, axes: Params) -> optax.GradientTransformation:
        """The transformation for parameters whose axis names are `axes`.

        `axes` is a tree like the trainable parameters with tuples of names for leaves, such as
        ("layers", "embed", "heads", "kv"). Raises InputError for a decay rule that doesn't
        compile or matches no path.
        """


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101), by optax."""

    learning_rate: Schedule | float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # multiplied by the learning rate
    decay_rules: DecayRules = ()  # first match wins; else all but UNDECAYED
    clip_norm: float | None = None  # of the gradients' global norm, before anything else
    momentum_dtype: Any = None  # of the first moment; None: float32
    rate_rules: RateRules = ()  # first match wins; else 1.0
    rounding: Rounding | None = None  # of bfloat16 parameters, which want one: see `rounding`

    def __post_init__(self) -> None:
        _check(self, fractions=("b1", "b2"), positive=("eps",))

    def make(self, axes: Params) -> optax.GradientTransformation:
        step = optax.adamw(
            _float32_schedule(self.learning_rate),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            mu_dtype=self.momentum_dtype,
            weight_decay=self.weight_decay,
            mask=decay_mask(axes, self.decay_rules),
        )
        return _finished(step, axes, self)


@dataclass(frozen=True)
class Lion:
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675), by optax.

    One moment instead of two; wants a learning rate 3 to 10 times lower than AdamW's and a
    weight decay as much higher.
    """

    learning_rate: Schedule | float
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0  # multiplied by the learning rate
    decay_rules: DecayRules = ()
    clip_norm: float | None = None
    momentum_dtype: Any = None
    rate_rules: RateRules = ()
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        _check(self, fractions=("b1", "b2"))

    def make(self, axes: Params) -> optax.GradientTransformation:
        step = optax.lion(
            _float32_schedule(self.learning_rate),
            b1=self.b1,
            b2=self.b2,
            mu_dtype=self.momentum_dtype,
            weight_decay=self.weight_decay,
            mask=decay_mask(axes, self.decay_rules),
        )
        return _finished(step, axes, self)


@dataclass(frozen=True)
class Adafactor:
    """T5's optimizer: factored second moments, steps relative to a parameter's size.

    Its update rule, and what each setting means, is in `t5x_lite.train.adafactor`.
    """

    learning_rate: Schedule | float
    min_parameter_scale: float | None = 1e-3  # None: the learning rate is absolute
    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0
    beta1: float | None = None
    momentum_dtype: Any = jnp.float32
    epsilon: float = 1e-30
    min_dim_size_to_factor: int = 128
    weight_decay_rate: float = 0.0  # taken per step, NOT multiplied by the learning rate (T5X)
    decay_rules: DecayRules = ()
    clip_norm: float | None = None
    rate_rules: RateRules = ()
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        fractions = ("weight_decay_rate",) if self.beta1 is None else ("weight_decay_rate", "beta1")
        _check(self, fractions=fractions, positive=("epsilon", "decay_rate"))

    def make(self, axes: Params) -> optax.GradientTransformation:
        step = adafactor(
            self.learning_rate,
            axes,
            min_parameter_scale=self.min_parameter_scale,
            decay_rate=self.decay_rate,
            clipping_threshold=self.clipping_threshold,
            beta1=self.beta1,
            momentum_dtype=self.momentum_dtype,
            epsilon=self.epsilon,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            weight_decay_rate=self.weight_decay_rate,
            decay_mask=decay_mask(axes, self.decay_rules),
        )
        return _finished(step, axes, self)


def decay_mask(axes: Params, rules: DecayRules = ()) -> Params:
    """A tree like `axes` of booleans: which parameters weight decay applies to.

    The first rule whose regex matches the whole path decides; without one, everything decays but
    `.../scale` and `.../bias`.
    """
    paths = trees.flatten(axes, is_leaf=is_axes)
    chosen = trees.match_first(rules, paths, what="decay rule")
    leaves = [
        path.split("/")[-1] not in UNDECAYED if choice is None else choice
        for path, choice in chosen.items()
    ]
    return jax.tree.structure(axes, is_leaf=is_axes).unflatten(leaves)


def rate_factors(axes: Params, rules: RateRules) -> Params:
    """A tree like `axes` of what each parameter's updates, decay included, are multiplied by.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is `(('.*/b', 16.0),)`: B learns faster than A.
    Raises InputError for a rule that matches no path or a factor below zero.
    """
    for pattern, factor in rules:
        if factor < 0.0:
            raise InputError(f"rate_rules: {factor} for '{pattern}'; expected 0 or more")
    paths = trees.flatten(axes, is_leaf=is_axes)
    chosen = trees.match_first(rules, paths, default=1.0, what="rate rule")
    return jax.tree.structure(axes, is_leaf=is_axes).unflatten(list(chosen.values()))


def state_specs(state: Params, params: Params, specs: Params) -> Params:
    """A PartitionSpec for every leaf of an optimizer's state, from its parameter's.

    A state leaf belongs to the parameter whose path ends its own: `0/mu/encoder/x/kernel` to
    `encoder/x/kernel`. It is placed like the parameter in the dimensions where it has the
    parameter's size, and whole in those of size 1 (Adafactor's means). Every other leaf, such as
    a step count, is replicated. Works on any optax chain, masks and partitions included.

    Args:
      state: shapes, as of `jax.eval_shape(optimizer.init, params)`.
      params: arrays or shapes of the trainable parameters.
      specs: a tree like `params` of PartitionSpec.

    Returns:
      A tree like `state` of PartitionSpec.
    """
    is_spec = lambda x: isinstance(x, PartitionSpec)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(params).items()}
    flat_specs = trees.flatten(specs, is_leaf=is_spec)

    def place(path: str, leaf: Any) -> PartitionSpec:
        parts = path.split("/")
        suffixes = ("/".join(parts[i:]) for i in range(len(parts)))
        owner = next((suffix for suffix in suffixes if suffix in shapes), None)
        if owner is None or len(leaf.shape) != len(shapes[owner]):
            return PartitionSpec()
        shape, spec = shapes[owner], flat_specs[owner]
        if leaf.shape == shape:
            return spec
        if any(have not in (1, size) for have, size in zip(leaf.shape, shape, strict=True)):
            return PartitionSpec()
        names = (*spec, *[None] * (len(shape) - len(spec)))
        return PartitionSpec(
            *(
                name if have == size else None
                for have, size, name in zip(leaf.shape, shape, names, strict=True)
            )
        )

    return trees.map_with_path(place, state)


def _float32_schedule(learning_rate: Schedule | float) -> Schedule | float:
    if not callable(learning_rate):
        return learning_rate
    return lambda step: learning_rate_at(learning_rate, step)


def _finished(
    step: optax.GradientTransformation, axes: Params, config: Any
) -> optax.GradientTransformation:
    """`step` behind clipping and ahead of single parameters' rates and rounding."""
    parts = [step]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.rate_rules:
        rates = rate_factors(axes, config.rate_rules)
        parts.append(
            optax.stateless(
                lambda updates, _: jax.tree.map(
                    lambda update, rate: update * jnp.asarray(rate, update.dtype), updates, rates
                )
            )
        )
    whole = optax.chain(*parts) if len(parts) > 1 else step
    return rounded(whole, config.rounding, f"{type(config).__name__}.rounding")


def _check(config: Any, fractions: tuple[str, ...] = (), positive: tuple[str, ...] = ()) -> None:
    """Raises InputError for a setting out of range, naming it."""
    name = type(config).__name__
    for knob in fractions:
        if not 0.0 <= getattr(config, knob) < 1.0:
            raise InputError(f"{name}.{knob} is {getattr(config, knob)}; expected 0 <= {knob} < 1")
    if not callable(config.learning_rate) and config.learning_rate < 0.0:
        raise InputError(f"{name}.learning_rate is {config.learning_rate}; expected 0 or more")
    for knob in (*positive, "clip_norm"):
        value = getattr(config, knob)
        if value is not None and value <= 0.0:
            raise InputError(f"{name}.{knob} is {value}; expected more than 0")
    if config.rounding not in (None, *ROUNDINGS):
        raise InputError(f"{name}.rounding='{config.rounding}'; known: None, {ROUNDINGS}")
    if getattr(config, "weight_decay", 0.0) < 0.0:
        raise InputError(f"{name}.weight_decay is {config.weight_decay}; expected 0 or more")
