"""Sessions, states and compiled steps of tiny models, and a whole tiny run, for several tests."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_lite import types
from t5x_lite.data.objectives import SpanCorruption
from t5x_lite.data.pipeline import Batches, EvaluationBatches
from t5x_lite.data.sources import TextSource
from t5x_lite.data.tasks import Chunks, Task
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.sharding import MESH_AXES, Partitioner
from t5x_lite.train.checkpoint import CheckpointPolicy
from t5x_lite.train.evaluate import TeacherForced
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session, shardings
from t5x_lite.train.step import Loss, TrainState, train_step
from tests import common

# Half the time to compile. What they change is how a loop is lowered to machine code, and not what
# is split, communicated or computed.
QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


def one_device() -> Partitioner:
    """A partitioner of one device, among however many there are."""
    partitioner = Partitioner(data=1)
    partitioner.__dict__["mesh"] = jax.make_mesh(
        (1, 1, 1),
        MESH_AXES,
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    return partitioner


def start(session: Session, optimizer: Any, base: Any) -> tuple[TrainState, types.Params]:
    """`(state, frozen)` of step 0 from host arrays `base`, in the session's shardings."""
    # Copies: the step is given these buffers to overwrite.
    base = jax.device_put(jax.tree.map(np.array, base), shardings(session.base_shapes))
    params, frozen = session.split(base)
    opt_shapes = session.state_shapes(optimizer).opt_state
    opt_state = jax.device_put(optimizer.init(jax.device_get(params)), shardings(opt_shapes))
    step = jax.device_put(np.int32(0), session.partitioner.replicated)
    return TrainState(step, params, opt_state), frozen


host_params = common.host_params


def compile_quickly(lowered: Any) -> Any:
    try:
        return lowered.compile(compiler_options=QUICK)
    except jax.errors.JaxRuntimeError:  # an XLA without one of these options
        return lowered.compile()


def compile_step(
    session: Session,
    optimizer: Any,
    state: TrainState,
    frozen: types.Params,
    batch: types.Batch,
    microbatches: int = 1,
    loss: Loss = Loss(),
) -> Any:
    """`(state, frozen, batch) -> (state, metrics)`, the state donated, as the loop compiles it."""
    step = functools.partial(
        train_step,
        model=session.model,
        transform=session.transform,
        optimizer=optimizer,
        loss=loss,
        microbatches=microbatches,
        seed=0,
    )
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings(state), session.partitioner.replicated),
    )
    with session.partitioner.activate():
        return compile_quickly(jitted.lower(state, frozen, batch))


def uneven_batch(config: ModelConfig, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with 1 to 10 tokens that count, the first eighth of them with none.

    So every way of cutting the batch in parts gives parts of unequal weight.
    """
    batch = common.random_batch(config, rows=rows, seed=seed)
    weights = batch[types.DECODER_LOSS_WEIGHTS]
    counts = np.random.default_rng(seed + 100).integers(1, weights.shape[1] + 1, rows)
    counts[: rows // 8] = 0
    weights *= np.arange(weights.shape[1])[None] < counts[:, None]
    return batch


def tiny_task(folder: str | os.PathLike[str]) -> Task:
    """Span corruption on 120 lines of text, which is written to `folder` unless it is there."""
    path = Path(folder) / "text.txt"
    if not path.exists():
        words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], (120, 20))
        path.write_text("\n".join(" ".join(line) for line in words) + "\n")
    vocabulary = ByteVocabulary()
    return Task(
        name="tiny",
        source=TextSource(files={"train": str(path), "validation": str(path)}),
        vocabulary=vocabulary,
        objective=SpanCorruption(vocabulary),
        lengths={"encoder": 32, "decoder": 16},
        chunk=Chunks(window=8, rows=16),
    )


STACK = StackConfig(num_layers=2, num_heads=2, head_dim=8, mlp_dim=32, dropout=0.1)
MODEL = ModelConfig(vocab_size=384, embed_dim=16, encoder=STACK, decoder=STACK)
TOTAL_STEPS = 10


def tiny_run(
    model_dir: str | os.PathLike[str], data_dir: str | os.PathLike[str], **changes: Any
) -> dict[str, Any]:
    """Arguments of `loop.train` for a run with dropout, evaluations and a checkpoint each 3 steps.

    Its last checkpoint, of step 10, is out of step with the period.
    """
    task = tiny_task(data_dir)
    held = TeacherForced(name="held", batches=EvaluationBatches(task, batch_size=8, limit=11))
    return {
        "model_dir": str(model_dir),
        "model": MODEL,
        "batches": Batches(task, batch_size=8, seed=3),
        "optimizer": AdamW(0.01, weight_decay=0.1, clip_norm=1.0),
        "total_steps": TOTAL_STEPS,
        "evaluations": [held],
        "eval_period": 4,
        "checkpoints": CheckpointPolicy(period=3, keep=None),
        "log_period": 2,
        "seed": 5,
        "microbatches": 2,
        "partitioner": one_device(),
    } | changes


def main() -> None:
    """Runs `tiny_run` in this process, which kills itself at a given point.

    The one argument is JSON: `model_dir`, `data_dir`, and `kill`: null, a step (at which the
    data is asked for the next batch), or "writing" (as soon as a checkpoint's folder is there).
    """
    from t5x_lite.train import loop

    arguments = json.loads(sys.argv[1])
    kill = arguments["kill"]
    # Large enough that a checkpoint takes a while to write.
    run = tiny_run(
        arguments["model_dir"],
        arguments["data_dir"],
        model=dataclasses.replace(MODEL, vocab_size=20_000),
        partitioner=Partitioner(),
    )

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if kill == "writing":
        folder = Path(run["model_dir"]) / "checkpoints"
        there = set(os.listdir(folder))  # of the runs before

        def watch() -> None:
            while not any("tmp" in name for name in set(os.listdir(folder)) - there):
                time.sleep(0.0005)
            die()

        threading.Thread(target=watch, daemon=True).start()
    elif kill is not None:
        stop_at(kill, die)
    loop.train(**run)


def stop_at(step: int, stop: Callable[[], None], setattr: Callable[..., None] = setattr) -> None:
    """Makes the loop call `stop` when it asks for the batch after `step`."""
    from t5x_lite.data.pipeline import iterate
    from t5x_lite.train import loop

    def stopping(batches: Any, start: int, **kwargs: Any) -> Iterator[Any]:
        for done, batch in enumerate(iterate(batches, start, **kwargs), start):
            if done == step:
                stop()
            yield batch

    setattr(loop, "iterate", stopping)


if __name__ == "__main__":
    main()
