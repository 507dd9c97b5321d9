"""What a masked language model saves by asking its head at masked slots alone: FLOPs by XLA.

    python benchmarks/mlm_head.py --models=small,base

Each training step (loss and gradients of all parameters, no optimizer) is traced and lowered with
its head at every token and at 15% of them; XLA's cost analysis counts both. Layers are unrolled,
since XLA counts a loop's body once. Nothing is compiled or run unless `--steps` is positive: then
the two steps are timed in turn, and the medians printed.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from t5x_lite import types
from t5x_lite.models import transformer
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead
from t5x_lite.models.config_positions import Learned
from t5x_lite.train.step import Loss

MODELS = flags.DEFINE_list("models", ["small", "base"], "Of: test, small (6 x 512), base (BERT's).")
STEPS = flags.DEFINE_integer("steps", 0, "Timed steps of each kind; 0: only count.")
RATE = 0.15  # share of tokens that are masked (Devlin et al. 2019)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A BERT and its batch."""

    layers: int
    embed: int
    vocab: int
    rows: int
    length: int

    @property
    def slots(self) -> int:
        return round(self.length * RATE)

    def config(self) -> ModelConfig:
        stack = StackConfig(
            num_layers=self.layers,
            num_heads=max(self.embed // 64, 1),
            head_dim=min(64, self.embed),
            mlp_dim=4 * self.embed,
            mlp_activations=("gelu_exact",),
            biases=("query", "key", "value", "out", "wi", "wo"),
            positions=Learned(max_length=self.length),
            attention_scale=None,
            norm="layer",
            norm_epsilon=1e-12,
            residual="post",
            embedding_norm=True,
            unroll=self.layers,
        )
        return ModelConfig(
            vocab_size=self.vocab,
            embed_dim=self.embed,
            encoder=stack,
            head=LMHead(tied=True, bias=True, transform="gelu_exact"),
            initializer_stddev=0.02,
        )


SHAPES = {
    "test": Shape(2, 32, 1000, 2, 40),
    "small": Shape(6, 512, 30522, 8, 128),
    "base": Shape(12, 768, 30522, 8, 512),
}


def batches(shape: Shape) -> dict[str, dict[str, np.ndarray]]:
    """The same question asked at slots, and at every token."""
    rng = np.random.default_rng(0)
    size = (shape.rows, shape.length)
    tokens = rng.integers(5, shape.vocab, size).astype(np.int32)
    places = np.sort(
        rng.permuted(np.tile(np.arange(shape.length), (shape.rows, 1)), axis=1)[:, : shape.slots]
    ).astype(np.int32)
    inputs = {types.ENCODER_INPUT_TOKENS: tokens}
    slots = {
        types.MASKED_POSITIONS: places,
        types.MASKED_TARGET_TOKENS: np.take_along_axis(tokens, places, axis=1),
        types.MASKED_LOSS_WEIGHTS: np.ones(places.shape, np.float32),
    }
    weights = np.zeros(size, np.float32)
    np.put_along_axis(weights, places, 1.0, axis=1)
    everywhere = {types.DECODER_TARGET_TOKENS: tokens, types.DECODER_LOSS_WEIGHTS: weights}
    return {"every token": {**inputs, **everywhere}, "masked slots": {**inputs, **slots}}


def lowered(shape: Shape, batch: types.Batch) -> jax.stages.Lowered:
    """Loss and gradients for one batch, not yet compiled."""
    model = transformer.Transformer(shape.config())
    params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    reads = (types.ENCODER_INPUT_TOKENS, types.MASKED_POSITIONS)

    def loss(params: types.Params, batch: types.Batch) -> types.Array:
        read = {key: batch[key] for key in reads if key in batch}
        sums = Loss()(model.apply({"params": params}, read), batch)
        return sums["loss"] / sums["denominator"]

    return jax.jit(jax.value_and_grad(loss)).lower(params, batch)


def flops(program: jax.stages.Lowered) -> float:
    cost = program.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


def timed(shape: Shape, programs: dict[str, jax.stages.Lowered], steps: int) -> dict[str, float]:
    """Median seconds of each program's step, taken in turn."""
    model = transformer.Transformer(shape.config())
    params = jax.jit(lambda key: transformer.init(model, key))(jax.random.key(0))
    compiled = {name: program.compile() for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(steps + 1):
        for name, batch in batches(shape).items():
            began = time.monotonic()
            jax.block_until_ready(compiled[name](params, batch))
            if turn:  # the first touches fresh memory
                seconds[name].append(time.monotonic() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(_: list[str]) -> None:
    for name in MODELS.value:
        shape = SHAPES[name]
        programs = {what: lowered(shape, batch) for what, batch in batches(shape).items()}
        counted = {what: flops(program) for what, program in programs.items()}
        print(
            f"{name}: {shape.layers} layers, {shape.embed} wide, vocabulary {shape.vocab}, batch "
            f"{shape.rows} x {shape.length}, {shape.slots} slots a row"
        )
        for what, count in counted.items():
            print(f"  head at {what:12} {count / 1e9:10.2f} GFLOP a step")
        whole, part = counted.values()
        print(f"  ratio {whole / part:.2f}")
        if STEPS.value:
            times = timed(shape, programs, STEPS.value)
            for what, second in times.items():
                print(f"  head at {what:12} {second:10.3f} s a step")
            whole, part = times.values()
            print(f"  ratio {whole / part:.2f}")


if __name__ == "__main__":
    app.run(main)
