"""How a stack knows where its tokens are: one of four kinds, or None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from t5x_lite.types import InputError


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """T5's relative position bias (Raffel et al. 2020, section 2.1): one bias a bucket and head.

    Half of the buckets hold exact distances, the other half grow logarithmically.
    """

    num_buckets: int = 32
    max_distance: int = 128  # tokens; farther ones share the last bucket

    def __post_init__(self) -> None:
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise InputError(
                f"RelativeBias.num_buckets={self.num_buckets}: expected an even number from 4 on"
            )
        if self.max_distance <= self.num_buckets // 2:
            raise InputError(
                f"RelativeBias.max_distance={self.max_distance} must be greater than half of "
                f"num_buckets={self.num_buckets}"
            )


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A trained vector a position, added to the embeddings (Devlin et al. 2019; GPT-2; BART)."""

    max_length: int  # positions of a row; longer rows are an error
    # Rows of the table before position 0: RoBERTa and BART were published with 2.
    offset: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 1 or self.offset < 0:
            raise InputError(
                f"Learned(max_length={self.max_length}, offset={self.offset}): expected at least "
                "1 position, and an offset from 0 on"
            )


@dataclass(frozen=True, kw_only=True)
class Sinusoidal:
    """Fixed sines, then cosines, added to the embeddings (Vaswani et al. 2017, section 3.5)."""

    max_period: float = 10000.0  # the slowest wave's period is 2 pi times this, in tokens


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _check_scaling(self, self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """A larger base for texts longer than the model was trained for.

    base * (factor * length / original_length - (factor - 1)) ** (d / (d - 2)): "dynamic NTK", as in
    Hugging Face transformers, where the longest text of a batch counts for all; here each counts
    for itself, whatever it is packed or batched with.
    """

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check_scaling(self, self.factor, self.original_length)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow waves divided by `factor`, fast ones kept, those between interpolated (Llama 3.1)."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_scaling(self, self.factor, self.original_length)
        if not 0.0 < self.low_frequency_factor < self.high_frequency_factor:
            raise InputError(
                f"Llama3Scaling.low_frequency_factor={self.low_frequency_factor} and "
                f"high_frequency_factor={self.high_frequency_factor}: expected the first above 0 "
                "and below the second"
            )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over waves, and scaled queries and keys."""

    factor: float
    original_length: int
    beta_fast: float = 32.0  # turns within original_length above which a wave is kept
    beta_slow: float = 1.0  # ... below which it is divided by `factor`
    attention_factor: float | None = None  # of cosines and sines; None: 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        _check_scaling(self, self.factor, self.original_length)
        if not 0.0 < self.beta_slow < self.beta_fast:
            raise InputError(
                f"YarnScaling.beta_slow={self.beta_slow} and beta_fast={self.beta_fast}: expected "
                "the first above 0 and below the second"
            )


def _check_scaling(scaling: object, factor: float, original_length: int = 1) -> None:
    if not factor > 0.0 or original_length < 1:
        raise InputError(
            f"{scaling}: expected a factor above 0 and an original_length of at least 1"
        )


RotaryScaling: TypeAlias = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Queries and keys turned by an angle that grows with the position (Su et al. 2021, RoFormer).

    Dimension i turns together with i + d/2 of the rotated d (the "half" layout of GPT-NeoX and
    Llama).
    """

    base: float = 10000.0  # theta
    fraction: float = 1.0  # of a head's dimensions that turn (GPT-NeoX: 0.25)
    scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        if not self.base > 1.0:  # waves get slower by powers of it
            raise InputError(f"Rotary.base={self.base}: expected above 1")
        if not 0.0 < self.fraction <= 1.0:
            raise InputError(f"Rotary.fraction={self.fraction}: expected above 0, up to 1")


Positions: TypeAlias = RelativeBias | Learned | Sinusoidal | Rotary
CLASSES: Final = (
    RelativeBias,
    Learned,
    Sinusoidal,
    Rotary,
    LinearScaling,
    DynamicScaling,
    Llama3Scaling,
    YarnScaling,
)
