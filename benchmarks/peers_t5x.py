"""T5X's side of `peers.py`: its network and its loss, from a clone of google-research/t5x.

Run by `peers.py --t5x=FOLDER`. Reads one JSON object a line, as `peers_ours.py` does: "make" and
"run". T5X is not on PyPI, and its package imports TensorFlow, seqio and more; what a step of its
trainer computes (`models.EncoderDecoderModel.loss_fn`, differentiated) is in three files that need
JAX and Flax alone. The optimizer is optax's AdamW, as on every side, in the place of its own.

Its examples are two: `t5`, which the models' gin files take, with its layers
unrolled and nothing recomputed, and `scalable_t5`, which scans over them and here recomputes all
but products, its "minimal" policy. Each layer of the latter has a table of positions of its own.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import peers_ours
import train_step

SETTINGS: dict[str, dict[str, Any]] = {"t5": {}, "scalable_t5": {"remat_policy": "minimal"}}


def load(folder: str, example: str) -> tuple[types.ModuleType, types.ModuleType]:
    """`(network, losses)` of T5X, without what its packages import for themselves."""
    root = Path(folder).expanduser() / "t5x"
    for name, path in (
        ("t5x", root),
        ("t5x.examples", root / "examples"),
        (f"t5x.examples.{example}", root / "examples" / example),
    ):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(path)]
    network = importlib.import_module(f"t5x.examples.{example}.network")
    return network, importlib.import_module("t5x.losses")


def make(asked: dict[str, Any]) -> tuple[Callable[[], Any], int]:
    """A step of training, and how many parameters it trains."""
    network, losses = load(asked["t5x"], asked["example"])
    config = network.T5Config(
        vocab_size=asked["vocab"],
        dtype=jnp.dtype(asked["dtype"]),
        emb_dim=asked["embed"],
        num_heads=asked["heads"],
        num_encoder_layers=asked["layers"],
        num_decoder_layers=asked["layers"],
        head_dim=asked["head_dim"],
        mlp_dim=asked["mlp"],
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        **SETTINGS[asked["example"]],
    )
    model = network.Transformer(config)
    batch = {name: jnp.asarray(value) for name, value in peers_ours.batch(asked).items()}
    # Ours is told of segments. Whole rows need none, and without them T5X makes fewer masks.
    inputs = [batch[f"{name}_tokens"] for name in ("encoder_input", "decoder_input")]
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    params = jax.jit(lambda key: model.init(key, *inputs, targets, enable_dropout=False))(
        jax.random.key(0)
    )["params"]
    optimizer = optax.adamw(1e-4, weight_decay=0.0)

    def loss_of(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, *inputs, targets, enable_dropout=False)
        loss, *_ = losses.compute_weighted_cross_entropy(logits, targets, weights)
        return loss / jnp.sum(weights)

    def update(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))
    held = [params, optimizer.init(params)]

    def step() -> jax.Array:
        *held[:], loss = compiled(*held)
        return loss

    return step, sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> None:
    print(json.dumps({"t5x's jax": jax.__version__}), flush=True)
    for line in sys.stdin:
        ((what, asked),) = json.loads(line).items()
        if what == "make":
            step, trained = make(asked)
            jax.block_until_ready(step())
            answer: dict[str, Any] = {"trained": trained}
        else:
            timed = train_step.Timed(step)
            timed.repeat(asked["steps"])
            answer = {"wall": timed.wall, "cpu": timed.cpu}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
