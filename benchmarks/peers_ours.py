"""Our side of `peers.py`: the library's own step, and the matrix products it is compared with.

Run by `peers.py`. Reads one JSON object a line: `{"make": {...}}` builds a model with random
weights and takes its first step, `{"run": {"steps": n}}` takes one step untimed and then n,
`{"products": {...}}` times products of a feed-forward block's shape, `{"product": {...}}` one of
any shape; `{"program": {}}` asks for the compiled step's text, `{"trace": {}}` for where a step's
time goes. Answers each with one line.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import costs
import jax
import jax.numpy as jnp
import numpy as np
import train_step

from t5x_lite import types
from t5x_lite.models import flops
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead
from t5x_lite.models.config_positions import Learned
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Full

TARGETS = (".*/(query|value)/kernel",)  # PEFT's default for T5: q and v
TRANSFORMS = {"full": Full(), "lora": LoRA(rank=8, alpha=16, targets=TARGETS)}


def model(asked: dict[str, Any]) -> ModelConfig:
    """T5 1.1, BERT or GPT-2, computed as gin_configs/hardware/cpu.gin has it."""
    sizes: dict[str, Any] = {
        "num_layers": asked["layers"],
        "num_heads": asked["heads"],
        "head_dim": asked["head_dim"],
        "mlp_dim": asked["mlp"],
        "remat": "dots",
    }
    whole = {"vocab_size": asked["vocab"], "embed_dim": asked["embed"], "dtype": asked["dtype"]}
    if asked["family"] == "t5":
        stack = StackConfig(**sizes)
        return ModelConfig(**whole, encoder=stack, decoder=stack)
    sizes |= {
        "biases": ("query", "key", "value", "out", "wi", "wo"),
        "positions": Learned(max_length=asked["positions"]),
        "attention_scale": None,
        "norm": "layer",
    }
    if asked["family"] == "gpt2":
        stack = StackConfig(**sizes, mlp_activations=("gelu",), norm_epsilon=1e-5)
        head = LMHead(tied=True)
        return ModelConfig(**whole, decoder=stack, head=head, initializer_stddev=0.02)
    stack = StackConfig(
        **sizes,
        mlp_activations=("gelu_exact",),
        norm_epsilon=1e-12,
        residual="post",
        embedding_norm=True,
        num_token_types=2,
    )
    head = LMHead(tied=True, bias=True, transform="gelu_exact")
    return ModelConfig(**whole, encoder=stack, head=head, initializer_stddev=0.02)


def batch(asked: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random tokens, without padding; GPT-2's whole blocks of text have no segments."""
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(2, asked["vocab"], (asked["rows"], length)).astype(np.int32)

    made: dict[str, np.ndarray] = {}
    if asked["encoder"]:
        made[types.ENCODER_INPUT_TOKENS] = encoder = tokens(asked["encoder"])
        made[types.ENCODER_SEGMENT_IDS] = np.ones_like(encoder)
    if asked["decoder"]:
        made[types.DECODER_INPUT_TOKENS] = tokens(asked["decoder"])
        made[types.DECODER_TARGET_TOKENS] = targets = tokens(asked["decoder"])
        made[types.DECODER_LOSS_WEIGHTS] = np.ones(targets.shape, np.float32)
        if asked["encoder"]:
            made[types.DECODER_SEGMENT_IDS] = np.ones_like(targets)
    if asked["slots"]:
        every = np.tile(np.arange(asked["encoder"], dtype=np.int32), (asked["rows"], 1))
        places = np.sort(rng.permuted(every, axis=1)[:, : asked["slots"]], axis=1)
        made[types.MASKED_POSITIONS] = places
        made[types.MASKED_TARGET_TOKENS] = np.take_along_axis(encoder, places, axis=1)
        made[types.MASKED_LOSS_WEIGHTS] = np.ones(places.shape, np.float32)
    return made


def gigaflop(config: ModelConfig, batch: types.Batch, full: bool) -> dict[str, float]:
    """Of a step, and of one whose head answers at every token, as Hugging Face's does."""
    everywhere = {key: value for key, value in batch.items() if key != types.MASKED_POSITIONS}
    return {
        "gigaflop": flops.train_flops(config, batch, full=full) / 1e9,
        "gigaflop_everywhere": flops.train_flops(config, everywhere, full=full) / 1e9,
    }


def product(equation: str, left: list[int], right: list[int]) -> Callable[[], jax.Array]:
    """One product of two float32 arrays, as einsum writes it."""
    compiled = jax.jit(functools.partial(jnp.einsum, equation))
    operands = jnp.ones(left, jnp.float32), jnp.ones(right, jnp.float32)
    return lambda: compiled(*operands)


def main() -> None:
    print(json.dumps({"jax": jax.__version__}), flush=True)
    for line in sys.stdin:
        ((what, asked),) = json.loads(line).items()
        if what == "make":
            config, transform = model(asked), TRANSFORMS[asked["method"]]
            optimizer = train_step.OPTIMIZERS["adamw"]
            training = train_step.Training(config, batch(asked), optimizer, transform)
            jax.block_until_ready(training.step())
            full = asked["method"] == "full"
            answer = {"trained": training.trained, **gigaflop(config, training.batch, full)}
        elif what == "run":
            timed = train_step.Timed(training.step)
            timed.repeat(asked["steps"])
            answer = {"wall": timed.wall, "cpu": timed.cpu}
        elif what == "program":
            answer = {"text": training.compiled.as_text()}
        elif what == "trace":
            found = costs.measure(training.compiled, training.step, train_step.part_of, 1)
            rows = [(cost.kind, cost.place, cost.shape, cost.seconds) for cost in found]
            answer = {"operations": rows}
        elif what == "product":
            timed = train_step.Timed(product(**asked))
            timed.repeat(5)
            answer = {"wall": statistics.median(timed.wall)}
        else:
            products, count = train_step.ceiling(**asked)
            timed = train_step.Timed(products)
            timed.repeat(5)
            answer = {"gigaflops": count / statistics.median(timed.wall)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
