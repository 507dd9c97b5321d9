"""Skip-gram with negative sampling (Mikolov et al. 2013, arXiv:1310.4546), as matrix products.

A pair (centre i, output j of its window) wants to be told from noise:

    L = -sum_pairs [ log sigma(x_i . y_j) + (k / m) sum_n log sigma(-x_i . y_n) ]

with x and y rows of two tables. word2vec draws k noise rows anew for each pair and takes one pair
after another. Here all pairs of a step share m noise rows, each with weight k/m, so that the same
expectation is a few matrix products (sharing: Ji et al. 2016, arXiv:1604.04661): centres of a block
by the block's outputs, of which the band of the windows counts, and all centres by the noise rows.
The gradient is written out and added to the rows of the step alone; both tables are updated in
place, by one gather and one scatter each (with two of both, XLA copies the table in every step).

Shapes: v rows, d dimensions, s blocks, t centres, u = t + 2 window outputs, m negatives.
"""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.studies import skipgram_data as data
from t5x_lite.types import Array, InputError


@dataclass(frozen=True, kw_only=True)
class SkipGram:
    """How vectors are learned; the defaults of the first ten are word2vec's.

    A step adds up the gradients of blocks x centres x (window + 1) pairs on average: a noise row
    moves by rate x blocks x centres x (window + 1) x negatives / shared terms at once.
    Here that is 3; at twice as much, the vectors of 12 MB of text diverged.
    """

    dim: int = 100
    window: int = 5  # the most words on either side
    negatives: int = 5  # noise words a pair, in weight
    min_count: int = 5  # rarer words are left out
    subsample: float = 1e-3  # words more frequent than this are thinned out; 0: none
    epochs: int = 5
    learning_rate: float = 0.025
    final_learning_rate: float = 1e-4
    seed: int = 0
    # How the work is cut up
    centres: int = 32  # of a block
    blocks: int = 8  # a step
    shared: int = 64  # noise rows of a step
    steps: int = 256  # a dispatch

    def __post_init__(self) -> None:
        counts = ("dim", "window", "negatives", "min_count", "epochs")
        for name in (*counts, "centres", "blocks", "shared", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"SkipGram.{name}={getattr(self, name)}: expected at least 1")
        if self.window > 127:
            raise InputError(f"SkipGram.window={self.window}: expected at most 127")
        if self.subsample < 0 or not self.learning_rate >= self.final_learning_rate > 0:
            raise InputError(
                f"SkipGram: expected subsample >= 0 and learning_rate >= final_learning_rate > 0, "
                f"not {self.subsample}, {self.learning_rate} and {self.final_learning_rate}"
            )

    @property
    def sizes(self) -> data.Sizes:
        return data.Sizes(self.steps, self.blocks, self.centres, self.window, self.shared)


class Tables(NamedTuple):
    """What is learned."""

    inputs: Array  # float32 [v, d]: the words' vectors
    outputs: Array  # float32 [v, d]: of the same words as context


class Step(NamedTuple):
    """`skipgram_data.Windows` of one step: without the axis of steps."""

    outputs: Array  # int32 [s, u]
    left: Array  # int8 [s, t]
    right: Array
    negatives: Array  # int32 [m]
    rate: Array  # float32


def init(rows: int, dim: int, seed: int) -> Tables:
    """word2vec's: inputs uniform within 1/2d of zero, outputs zero."""
    drawn = np.random.default_rng([seed, 0]).random((rows, dim), np.float32)
    return Tables(jnp.asarray((drawn - 0.5) / dim), jnp.zeros((rows, dim), jnp.float32))


def band(step: Step) -> Array:
    """bool `[s, t, u]`: which outputs of its block are in a centre's window."""
    t, u = step.left.shape[1], step.outputs.shape[1]
    offset = np.arange(u)[None, :] - np.arange(t)[:, None] - (u - t) // 2
    inside = (offset[None] >= -step.left.astype(jnp.int32)[:, :, None]) & (
        offset[None] <= step.right.astype(jnp.int32)[:, :, None]
    )
    return inside & (offset != 0)[None]


def objective(tables: Tables, step: Step, negatives: int) -> Array:
    """L of a step, as the module's docstring has it; `update` is `rate` times its descent."""
    window = (step.outputs.shape[1] - step.left.shape[1]) // 2
    x = tables.inputs[step.outputs[:, window : window + step.left.shape[1]]]  # [s, t, d]
    wanted = jnp.einsum("std,sud->stu", x, tables.outputs[step.outputs])
    noise = jnp.einsum("std,md->stm", x, tables.outputs[step.negatives])
    weight = negatives / step.negatives.shape[0]
    each = jax.nn.log_sigmoid(wanted) + (
        weight * jnp.sum(jax.nn.log_sigmoid(-noise), axis=-1)[..., None]
    )
    return -jnp.sum(jnp.where(band(step), each, 0.0))


def update(tables: Tables, step: Step, negatives: int) -> Tables:
    """One step of gradient descent on `objective`, which touches the rows of the step alone."""
    (s, u), t, m = step.outputs.shape, step.left.shape[1], step.negatives.shape[0]
    d, window = tables.inputs.shape[1], (u - t) // 2
    centres = step.outputs[:, window : window + t].reshape(s * t)
    others = jnp.concatenate([step.outputs.reshape(s * u), step.negatives])
    x = tables.inputs.at[centres].get(mode="promise_in_bounds")
    gathered = tables.outputs.at[others].get(mode="promise_in_bounds")
    blocks, y, noise = x.reshape(s, t, d), gathered[: s * u].reshape(s, u, d), gathered[s * u :]

    near = jax.nn.sigmoid(-jnp.einsum("std,sud->stu", blocks, y))
    near = jnp.where(band(step), near, 0.0) * step.rate
    pairs = (step.left.astype(jnp.float32) + step.right.astype(jnp.float32)).reshape(s * t, 1)
    far = jax.nn.sigmoid(x @ noise.T) * (pairs * (-negatives / m * step.rate))
    # XLA multiplies by a transposed left side at half speed: these two are written out transposed.
    near_transposed = jax.lax.optimization_barrier(jnp.swapaxes(near, 1, 2))
    far_transposed = jax.lax.optimization_barrier(far.T)
    moved_x = jnp.einsum("stu,sud->std", near, y).reshape(s * t, d) + far @ noise
    moved_y = jnp.einsum("sut,std->sud", near_transposed, blocks).reshape(s * u, d)
    moved = jnp.concatenate([moved_y, far_transposed @ x])
    return Tables(
        tables.inputs.at[centres].add(moved_x, mode="promise_in_bounds"),
        tables.outputs.at[others].add(moved, mode="promise_in_bounds"),
    )


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def run(tables: Tables, windows: data.Windows, negatives: int) -> Tables:
    """All steps of a dispatch, one after another; `tables` are given up."""

    def one(tables: Tables, windows: Any) -> tuple[Tables, None]:
        return update(tables, Step(*windows), negatives), None

    return jax.lax.scan(one, tables, tuple(windows))[0]


class Learned(NamedTuple):
    """What training gives."""

    tables: Tables
    words: int  # read, before thinning out: tokens x epochs
    centres: int  # learned from, after it
    seconds: float  # without the compilation


def train(
    corpus: data.Corpus, config: SkipGram, report: Callable[[int, float], None] | None = None
) -> Learned:
    """Vectors of the corpus's rows.

    The windows of a dispatch are cut by a thread of their own while the one before it is learned
    from. The same corpus and config give the same vectors.

    Args:
      corpus: of at least two rows.
      config: how.
      report: called after each epoch with its number, from 1, and the seconds until then.

    Raises InputError when the vectors diverge.
    """
    tables = init(len(corpus.names), config.dim, config.seed)
    compiled = run.lower(tables, data.empty(config.sizes), config.negatives).compile()
    began, centres = time.monotonic(), 0
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        for epoch in range(config.epochs):
            cut = _epoch(corpus, config, epoch)
            ahead = thread.submit(next, cut, None)
            while (dispatch := ahead.result()) is not None:
                ahead = thread.submit(next, cut, None)
                tables = compiled(tables, dispatch[0])
                centres += dispatch[1]
            _check_finite(tables, config)
            if report is not None:
                report(epoch + 1, time.monotonic() - began)
    seconds = time.monotonic() - began
    return Learned(tables, len(corpus.tokens) * config.epochs, centres, seconds)


def _epoch(corpus: data.Corpus, config: SkipGram, epoch: int) -> Iterator[tuple[data.Windows, int]]:
    return data.windows(
        corpus,
        config.sizes,
        subsample=config.subsample,
        rates=(config.learning_rate, config.final_learning_rate),
        progress=(epoch / config.epochs, (epoch + 1) / config.epochs),
        seed=(config.seed, 1, epoch),
    )


def _check_finite(tables: Tables, config: SkipGram) -> None:
    # A row that diverged reaches all others by way of the shared noise.
    if not bool(jnp.isfinite(jnp.sum(tables.inputs) + jnp.sum(tables.outputs))):
        raise InputError(
            f"the vectors diverged: SkipGram.learning_rate={config.learning_rate} is too much for "
            f"steps of {config.blocks * config.centres} centres that share {config.shared} noise "
            "rows; lower it or SkipGram.blocks, or raise SkipGram.shared"
        )
