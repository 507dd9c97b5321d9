"""The commands of docs/infer.md, as they stand, on fixtures in the place of published models."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import folders

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"llama": "llama", "bert": "bert_mlm", "classifier": "bert_classifier"}


@pytest.mark.slow
def test_the_pages_commands_run(tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    scratch = tmp_path / "scratch"
    (tmp_path / "models").mkdir()
    for name, fixture in {**MODELS, "gpt2": "peft/gpt2/base"}.items():
        shutil.move(folders.hugging_face(fixture, scratch), tmp_path / "models" / name)
    adapter = folders.FIXTURES / "peft" / "gpt2" / "adapter"
    (tmp_path / "models" / "gpt2_adapter").symlink_to(adapter)
    page = (ROOT / "docs" / "infer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) == 5
    prelude = 'set -euo pipefail\npython() { "$PYTHON" "$@"; }\n'
    done = subprocess.run(
        ["bash", "-c", prelude + "\n".join(blocks)],
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
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["inputs"] for line in answers] == ["alpha beta", "gamma"]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    masks, sampled, searched, pair, single, first, second, tuned = found
    assert len(masks["masks"][0]) == 3
    assert set(sampled) == set(searched) == set(tuned) == {"inputs", "prediction"}
    assert pair["id"] == 7
    assert pair["prediction"] in pair["probabilities"]
    assert set(single) == {"inputs", "prediction", "probabilities"}
    assert first["log_likelihood"] != second["log_likelihood"]
