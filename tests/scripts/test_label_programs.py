"""docs/labels.md: its commands run as they stand, training cut short."""

from __future__ import annotations

import json

import pytest

from t5x_lite.train.run import Run
from tests import pages

SHORT = pages.train_for(2, "--gin.LIMIT=8")


@pytest.mark.slow
def test_the_pages_commands_run(tmp_path):
    (commands,) = pages.blocks("docs/labels.md")
    done = pages.shell(commands, tmp_path, SHORT, timeout=900)
    if "pip could not download" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for run, labels in (("sentiment", 2), ("ner", 21)):
        folder = tmp_path / "runs" / run
        assert len(Run.read(str(folder)).labels) == labels
        lines = (folder / "predictions" / "test-2.jsonl").read_text().splitlines()
        assert all({"id", "target", "prediction"} <= set(json.loads(line)) for line in lines)
        assert len(lines) == 8
