"""Measures the peak memory of a model's start: initialised, saved, restored on 8 virtual devices.

    python benchmarks/init_memory.py                       # 1.0B parameters: 12 GB with AdamW's
    python benchmarks/init_memory.py --size=small          # 0.1B

Each in a process of its own, whose peak resident memory is all of it: Python, libraries, buffers,
and the compiler, for the step is compiled meanwhile, as in a run. What it is compared with is the
bytes of parameters and optimizer state. Linux alone says how much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Of a decoder: layers, width, feed-forward width, heads of 64 or 128.
SIZES = {
    "1b": (13, 2048, 8192, 128),
    "small": (8, 768, 3072, 64),
    "test": (2, 64, 128, 8),
}
DEVICES = 8

_SIZE = flags.DEFINE_enum("size", "1b", sorted(SIZES), "The model.")
_FOLDER = flags.DEFINE_string("folder", None, "Where the checkpoint goes, for a while; None: /tmp.")
_WORK = flags.DEFINE_enum("work", None, ["save", "restore"], "One process's part.")


def work(what: str, size: str, folder: str) -> None:
    """Does one process's part, and prints the peak after each thing that it did."""
    import resource

    import jax
    import numpy as np

    from t5x_lite import aside, trees, types
    from t5x_lite.models.config import ModelConfig, StackConfig
    from t5x_lite.sharding import Partitioner
    from t5x_lite.train import optim
    from t5x_lite.train.checkpoint import Checkpointer
    from t5x_lite.train.loop import compile_step
    from t5x_lite.train.session import Session
    from t5x_lite.train.step import Loss

    logging.set_verbosity(logging.WARNING)  # Orbax tells the world at INFO
    found: dict[str, float] = {}
    began = time.monotonic()

    def note(name: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found[name] = peak
        found[f"{name} seconds"] = time.monotonic() - began

    layers, width, inner, head = SIZES[size]
    stack = StackConfig(num_layers=layers, num_heads=width // head, head_dim=head, mlp_dim=inner)
    config = ModelConfig(vocab_size=32128, embed_dim=width, decoder=stack)
    session = Session(config, partitioner=Partitioner(data=1, fsdp=DEVICES))
    adamw = optim.AdamW(1e-4)
    optimizer = session.optimizer(adamw)
    shapes = session.state_shapes(optimizer)
    tokens = np.ones((DEVICES, 128), np.int32)
    batch = {
        types.DECODER_INPUT_TOKENS: tokens,
        types.DECODER_TARGET_TOKENS: tokens,
        types.DECODER_LOSS_WEIGHTS: tokens.astype(np.float32),
        types.DECODER_SEGMENT_IDS: tokens,
    }
    found["bytes"] = trees.nbytes((shapes.params, shapes.opt_state))
    found["parameters"] = trees.count(shapes.params)
    note("imports")
    first = session.partitioner.put_batch(batch, DEVICES)
    rest = shapes, session.split_shapes[1], first
    compiling = aside.start(compile_step, session, adamw, Loss(), 1, 0, *rest)
    if what == "save":
        params = jax.block_until_ready(session.split(session.init_base())[0])
        state = params, jax.block_until_ready(session.init_opt_state(optimizer, params))
        compiling.result()
        note("initialise")
        checkpointer = Checkpointer(folder, shapes=shapes)
        checkpointer.save(1, *state, {})
        checkpointer.wait()
        checkpointer.close()
        note("save")
    if what == "restore":
        checkpointer = Checkpointer(folder)
        jax.block_until_ready(checkpointer.restore(1, shapes.params, shapes.opt_state))
        checkpointer.close()
        compiling.result()
        note("restore")
    print(json.dumps(found))


def measure(what: str, size: str, folder: str) -> dict[str, float]:
    """`work` in a process of its own."""
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, __file__, f"--work={what}", f"--size={size}", f"--folder={folder}"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: the process that was to {what} ended with {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str]) -> None:
    if argv[1:]:
        sys.exit(f"error: unexpected '{argv[1]}' (--help shows the flags)")
    if _WORK.value is not None:
        work(_WORK.value, _SIZE.value, _FOLDER.value)
        return
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        saved = measure("save", _SIZE.value, folder)
        restored = measure("restore", _SIZE.value, folder)
    whole = saved["bytes"]
    console = Console(width=max(Console().width, 100))
    table = Table(
        title=f"{saved['parameters'] / 1e9:.2f}B parameters, with AdamW's state {whole / 1e9:.2f} "
        f"GB, on {DEVICES} virtual devices"
    )
    for column in ("after", "peak, GB", "of the state", "seconds"):
        table.add_column(column, justify="left" if column == "after" else "right")
    for name, found in (
        *((name, saved) for name in ("imports", "initialise", "save")),
        ("restore", restored),
    ):
        peak = found[name]
        row = f"{peak / 1e9:.2f}", f"{peak / whole:.2f}", f"{found[f'{name} seconds']:.1f}"
        table.add_row(name, *row)
    console.print(table)


if __name__ == "__main__":
    app.run(main)
