"""What the engine is asked, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from t5x_lite.decode.sampling import Greedy, Sampling
from t5x_lite.peft import many

Finished = Literal["eos", "length"]


@dataclass(frozen=True, eq=False)
class Request:
    """What to go on from, and how."""

    tokens: np.ndarray  # int32: of a decoder alone its row so far; otherwise what the encoder reads
    max_tokens: int  # the most new tokens
    strategy: Greedy | Sampling = Greedy()
    seed: int = 0  # of Sampling: `generate`'s with `rng=jax.random.key(seed)[None]`
    adapter: int = many.NONE  # of those in the parameters, `many.together`; NONE: the base alone


@dataclass(frozen=True)
class Event:
    """A request's next token; `finished` says that it is the last, and why."""

    id: int
    token: int
    finished: Finished | None = None
