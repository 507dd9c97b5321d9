"""Every command in README.md and docs/ is run: here, or by .ci/run if it is a make target."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
# Training is cut short; everything else runs as it stands on the page.
PRELUDE = """
set -euo pipefail
python() {
  case "$1" in
    scripts/train.py) "$PYTHON" "$@" --gin.STEPS=2 ;;
    *) "$PYTHON" "$@" ;;
  esac
}
"""


def blocks(page: Path) -> list[str]:
    """The page's bash blocks."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def make_targets() -> list[str]:
    found = [line for page in PAGES for block in blocks(page) for line in block.splitlines()]
    return [line for line in found if line.startswith("make ")]


@pytest.mark.parametrize("command", make_targets())
def test_ci_runs_the_make_targets(command):
    """As they stand, or a family's demo with fewer steps."""
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert command in [line.removesuffix(" STEPS=200 FALL=1") for line in lines]


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    commands = [block for block in blocks(ROOT / "README.md") if not block.startswith("make ")]
    assert len(commands) >= 4
    commands += blocks(ROOT / "docs" / "tasks.md")  # from the weights that the README's have made
    done = subprocess.run(
        ["bash", "-c", PRELUDE + "\n".join(commands)],
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
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "runs" / "task" / "eval" / "generate-2.jsonl").exists()
    for run in ("my_text", "my_task", "task"):
        for name in ("config.gin", "run.json", "vocabulary.model", "checkpoints/2"):
            assert (tmp_path / "runs" / run / name).exists(), (run, name)
    assert '"prediction"' in done.stdout
    assert "ModelConfig.dtype = 'bfloat16'" in done.stdout  # the dry run of the TPU section


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """On a fixture in the place of the published folder."""
    monkeypatch.chdir(tmp_path)
    source = ROOT / "tests" / "fixtures" / "hf" / "bert_mlm"
    shutil.copytree(source, tmp_path / "bert-base-uncased")
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    with np.load(source / "expected.npz") as expected:
        batch = {key: expected[key] for key in expected if key.startswith("encoder_")}
        outputs = expected["outputs"]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    names = {"batch": batch}
    exec(code, names)
    assert names["logits"].shape == outputs.shape
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        assert (tmp_path / "mine" / name).exists()


def test_links_inside_the_project_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_the_decoding_pages_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests" / "fixtures" / "hf" / "gpt2", tmp_path / "gpt2")
    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["tokens"].shape == (2, 8)
    assert names["beams"].tokens.shape == (2, 4, 8)
    assert names["beams"].scores.shape == (2, 4)
