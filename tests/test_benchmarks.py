"""The benchmark runs and prints what it says; its attribution of operations is right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "train_step.py"


def test_it_prints_its_table():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--config=test", "--steps=2", "--costs=3"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for column in ("tokens/s", "model GFLOP/s", "percent of the ceiling", "Where one step's time"):
        assert column in done.stdout


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(s)/jvp(Transformer)/decoder/while/body/mlp/wi_0/dot_general", "decoder mlp, forward"),
        (
            "jit(s)/transpose(jvp(Transformer))/encode/encoder/while/body/self_attention/out/dot",
            "encoder self_attention, backward",
        ),
        ("jit(s)/jvp(Transformer)/lm_head/dot_general", "logits and loss, forward"),
        ("jit(s)/add", "optimizer and the rest"),
    ],
)
def test_operations_belong_to_parts(name, part):
    spec = importlib.util.spec_from_file_location("train_step", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_step"] = module
    spec.loader.exec_module(module)
    assert module.part_of(name) == part
