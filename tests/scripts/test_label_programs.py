"""docs/labels.md: its commands run as they stand, training cut short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_lite.train.run import Run
from tests.test_docs import blocks

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
set -euo pipefail
python() {
  case "$1" in
    scripts/train.py) "$PYTHON" "$@" --gin.STEPS=2 --gin.LIMIT=8 ;;
    *) "$PYTHON" "$@" ;;
  esac
}
"""


@pytest.mark.slow
def test_the_pages_commands_run(tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (commands,) = blocks(ROOT / "docs" / "labels.md")
    done = subprocess.run(
        ["bash", "-c", PRELUDE + commands],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if "pip could not download" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for run, labels in (("sentiment", 2), ("ner", 21)):
        folder = tmp_path / "runs" / run
        assert len(Run.read(str(folder)).labels) == labels
        lines = (folder / "predictions" / "test-2.jsonl").read_text().splitlines()
        assert all({"id", "target", "prediction"} <= set(json.loads(line)) for line in lines)
        assert len(lines) == 8
