"""The commands of docs/in_context.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import folders

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_your_own_questions_are_asked_as_the_page_says(tmp_path):
    """Of a Hugging Face directory with random weights, in the place of the page's run."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "runs").mkdir()
    folders.hugging_face("llama", tmp_path).rename(tmp_path / "runs" / "mine")
    page = (ROOT / "docs" / "in_context.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```bash\n(.*?)^```", page, re.S | re.M)
    done = subprocess.run(
        ["bash", "-c", 'set -euo pipefail\npython() { "$PYTHON" "$@"; }\n' + commands],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "| my_questions, shots | examples | exact_match |" in done.stdout
    written = tmp_path / "runs" / "my_questions"
    lines = (written / "predictions-2.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert first["prompt"].count("\n") == 2
    assert first["prompt"].endswith("The colour of snow is")
    assert first["target"] == "white"
    rows = (written / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row).get("shots") for row in rows] == [0, 1, 2, 4, None]
