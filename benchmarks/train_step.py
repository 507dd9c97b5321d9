"""Times the real training step: tokens/s, GFLOP/s, share of the matmul ceiling, where time goes.

    python benchmarks/train_step.py --config=small          # T5 1.1 small, batch 8, 512 -> 114
    python benchmarks/train_step.py --config=small --remat=none --dtype=bfloat16
    python benchmarks/train_step.py --config=tiny           # the demo's model and shapes

Nothing here is asserted. Rounds of steps alternate with rounds of matrix products of the model's
own shapes, so that both see the same machine; the share of the ceiling compares CPU-seconds, which
other programs disturb least. With `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment,
Linux hands out the step's fresh buffers in huge pages.
"""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import costs
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from t5x_lite import compilation, trees, types
from t5x_lite.models import flops
from t5x_lite.models.config import REMAT_POLICIES, ModelConfig, StackConfig
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.train import optim
from t5x_lite.train import step as steps
from t5x_lite.train.loop import compile_step
from t5x_lite.train.session import Session


@dataclass(frozen=True)
class Shape:
    """A model, and the batch it is timed on."""

    stack: StackConfig
    embed: int
    vocab: int
    rows: int
    encoder: int
    decoder: int


SHAPES = {
    "small": Shape(
        StackConfig(num_layers=8, num_heads=6, head_dim=64, mlp_dim=1024), 512, 32128, 8, 512, 114
    ),
    "small_verses": Shape(  # a task of short texts, such as the demo's
        StackConfig(num_layers=8, num_heads=6, head_dim=64, mlp_dim=1024), 512, 32128, 16, 128, 64
    ),
    "tiny": Shape(
        StackConfig(num_layers=3, num_heads=3, head_dim=64, mlp_dim=384), 192, 4224, 16, 128, 64
    ),
    "test": Shape(StackConfig(num_layers=1, num_heads=2, head_dim=8, mlp_dim=32), 16, 64, 2, 16, 8),
}
OPTIMIZERS: dict[str, optim.Optimizer] = {
    "adamw": optim.AdamW(1e-4),
    "adafactor": optim.Adafactor(1e-3),
}

ROUNDS = 2  # of steps and then products
LOSS = steps.Loss(logits_bytes=104_857_600)  # what gin_configs/hardware/cpu.gin sets

_CONFIG = flags.DEFINE_enum("config", "small", sorted(SHAPES), "Model and batch.")
_OPTIMIZER = flags.DEFINE_enum("optimizer", "adamw", sorted(OPTIMIZERS), "Optimizer.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
_REMAT = flags.DEFINE_enum(
    "remat",
    "dots",
    REMAT_POLICIES,
    "StackConfig.remat; dots is what gin_configs/hardware/cpu.gin sets.",
)
_UNROLL = flags.DEFINE_integer("unroll", 1, "StackConfig.unroll.")
_STEPS = flags.DEFINE_integer("steps", 7, "Timed steps.")
_COSTS = flags.DEFINE_integer("costs", 12, "Rows of the table by place; 0: no trace.")


class Timed:
    """A function that remembers the wall and CPU seconds of its calls."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def repeat(self, times: int) -> None:
        """Calls it once untimed, which pays for memory that others gave back, and then `times`."""
        jax.block_until_ready(self._function())
        for _ in range(times):
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(self._function())
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.process_time() - cpu)


def random_batch(shape: Shape) -> dict[str, np.ndarray]:
    """A batch without padding."""
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(2, shape.vocab, (shape.rows, length)).astype(np.int32)

    ones = {
        name: np.ones((shape.rows, getattr(shape, name)), np.int32)
        for name in ("encoder", "decoder")
    }
    return {
        types.ENCODER_INPUT_TOKENS: tokens(shape.encoder),
        types.ENCODER_SEGMENT_IDS: ones["encoder"],
        types.DECODER_INPUT_TOKENS: tokens(shape.decoder),
        types.DECODER_TARGET_TOKENS: tokens(shape.decoder),
        types.DECODER_LOSS_WEIGHTS: ones["decoder"].astype(np.float32),
        types.DECODER_SEGMENT_IDS: ones["decoder"],
    }


def config_of(shape: Shape, dtype: str, remat: str, unroll: int = 1) -> ModelConfig:
    """T5 1.1 of that shape."""
    stack = dataclasses.replace(shape.stack, remat=remat, unroll=unroll)
    return ModelConfig(
        vocab_size=shape.vocab, embed_dim=shape.embed, encoder=stack, decoder=stack, dtype=dtype
    )


class Training:
    """The library's compiled step of a model with random weights, its state and its batch."""

    def __init__(
        self,
        config: ModelConfig,
        batch: dict[str, np.ndarray],
        optimizer: optim.Optimizer,
        transform: Transform = Full(),
        loss: steps.Loss = LOSS,
    ):
        session = Session(config, transform)
        made = session.optimizer(optimizer)
        base = session.init_base()
        self.base_bytes = trees.nbytes(base)
        params, self.frozen = session.split(base)
        self.trained = trees.count(params)
        self.state = steps.TrainState(
            jax.device_put(np.int32(0), session.partitioner.replicated),
            params,
            session.init_opt_state(made, params),
        )
        self.batch = session.partitioner.put_batch(batch, len(next(iter(batch.values()))))
        self.compiled, self.compile_seconds = compile_step(
            session, optimizer, loss, 1, 0, self.state, self.frozen, self.batch
        )
        compilation.give_back()  # as a run does
        self.timed = Timed(self.step)

    def step(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        return metrics


def ceiling(rows: int, inner: int, outer: int, dtype: str) -> tuple[Callable[[], Any], float]:
    """Products of a feed-forward block's shape over so many tokens, and their GFLOP."""
    w, v = jnp.ones((inner, outer), dtype), jnp.full((outer, inner), 1 / (inner * outer), dtype)
    flop = 4 * rows * inner * outer
    repeats = min(max(1, round(2e10 / flop)), 100)

    @jax.jit
    def product(x: jax.Array) -> jax.Array:  # maps ones to ones
        dot = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)
        return dot(dot(x, w), v)

    def products() -> jax.Array:
        x = jnp.ones((rows, inner), dtype)
        for _ in range(repeats):
            x = product(x)
        return x

    return products, repeats * flop / 1e9


@dataclass(frozen=True)
class Rates:
    """What times and counts amount to. All times are of one step, or of one run of the products."""

    tokens: int
    gigaflop: float  # of the model's mathematics: see t5x_lite.models.flops
    wall: float  # seconds
    cpu: float  # seconds, of all threads
    ceiling_gigaflop: float
    ceiling_wall: float
    ceiling_cpu: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.wall

    @property
    def idle_tokens_per_second(self) -> float:
        """A bound: what the step would reach if all cores were its own and always busy."""
        return self.tokens * (os.cpu_count() or 1) / self.cpu

    @property
    def gigaflops(self) -> float:
        return self.gigaflop / self.wall

    @property
    def ceiling_gigaflops(self) -> float:
        return self.ceiling_gigaflop / self.ceiling_wall

    @property
    def percent_of_ceiling(self) -> float:
        """GFLOP per CPU-second of the step against those of the products."""
        return 100 * (self.gigaflop / self.cpu) / (self.ceiling_gigaflop / self.ceiling_cpu)


def part_of(op_name: str) -> str:
    """The part of the model that an operation belongs to, from its name in the compiled program.

    `jit(train_step)/transpose(jvp(Transformer))/decoder/while/body/mlp/wi_0/dot_general`
    -> `decoder mlp, backward`.
    """
    if not op_name:
        return "copies that XLA adds (loop carries, layouts)"
    direction = "backward" if "transpose(" in op_name else "forward"
    stack = "decoder " if "decoder" in op_name else "encoder " if "encode" in op_name else ""
    parts = (
        *("self_attention_norm", "cross_attention_norm", "mlp_norm", "final_norm"),
        *("self_attention", "cross_attention", "mlp", "relative_bias"),
    )
    found = next((part for part in parts if re.search(rf"{part}[/).]", op_name)), None)
    if found:
        return f"{stack}{found}, {direction}"
    if "lm_head" in op_name or "_reduce_vocab" in op_name:
        return f"logits and loss, {direction}"
    if "token_embedding" in op_name:
        return f"embedding, {direction}"
    if "while" in op_name:
        return f"{stack}loop over layers (slices, stacking, residual sums), {direction}"
    return "optimizer and the rest"


def print_costs(console: Console, training: Training, ceiling: float, name: str) -> None:
    """The tables that --costs asks for. `ceiling`: of matrix products, in GFLOP/s."""
    if _COSTS.value:
        found = costs.measure(training.compiled, training.step, part_of)
        title = f"Where the time of {name} goes"
        for table in costs.tables(found, ceiling, _COSTS.value, title):
            console.print(table)


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: unexpected '{argv[1]}' (--help shows the flags)")
    shape = SHAPES[_CONFIG.value]
    config = config_of(shape, _DTYPE.value, _REMAT.value, _UNROLL.value)
    training = Training(config, random_batch(shape), OPTIMIZERS[_OPTIMIZER.value])
    step = training.timed
    products, gigaflop = ceiling(
        shape.rows * shape.encoder, shape.embed, shape.stack.mlp_dim, _DTYPE.value
    )
    product = Timed(products)
    for _ in range(ROUNDS):
        step.repeat(max(1, _STEPS.value // ROUNDS))
        product.repeat(5)
    rates = Rates(
        tokens=shape.rows * (shape.encoder + shape.decoder),
        gigaflop=flops.train_flops(config, training.batch) / 1e9,
        wall=statistics.median(step.wall),
        cpu=statistics.median(step.cpu),
        ceiling_gigaflop=gigaflop,
        ceiling_wall=statistics.median(product.wall),
        ceiling_cpu=statistics.median(product.cpu),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    console = Console(width=max(Console().width, 100))
    lengths = f"batch {shape.rows}, {shape.encoder} -> {shape.decoder}"
    how = f"{_DTYPE.value}, {_OPTIMIZER.value}, remat {_REMAT.value}"
    table = Table(title=f"T5 1.1 {_CONFIG.value}, {lengths}, {how}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in (
        ("compile, seconds", f"{training.compile_seconds:.1f}"),
        ("step, seconds (median)", f"{rates.wall:.3f}"),
        ("step, seconds (least)", f"{min(step.wall):.3f}"),
        ("step, CPU-seconds (median)", f"{rates.cpu:.3f}"),
        ("tokens/s, encoder + decoder", f"{rates.tokens_per_second:,.0f}"),
        ("tokens/s, bound on idle cores", f"{rates.idle_tokens_per_second:,.0f}"),
        ("model GFLOP/s", f"{rates.gigaflops:.1f}"),
        ("matmul ceiling, GFLOP/s", f"{rates.ceiling_gigaflops:.1f}"),
        ("percent of the ceiling, by CPU-seconds", f"{rates.percent_of_ceiling:.0f}"),
        ("peak resident, GiB", f"{peak:.2f}"),
    ):
        table.add_row(name, value)
    console.print(table)
    print_costs(console, training, rates.ceiling_gigaflops, "a step")


if __name__ == "__main__":
    app.run(main)
