"""The commands of docs/in_context.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import folders, pages

CASES = f"""
    {pages.train_for(2)}
    scripts/study_in_context.py*) "$PYTHON" "$@" --examples=16 --batch_size=8 --shots="(0, 3)" ;;
"""


def run(number: int, folder: Path) -> str:
    """The output of the page's block `number`; training and the study are cut short."""
    return pages.run(pages.blocks("docs/in_context.md")[number], folder, CASES, timeout=900)


@pytest.mark.slow
def test_your_own_questions_are_asked_as_the_page_says(tmp_path):
    """Of a Hugging Face directory with random weights, in the place of the page's run."""
    (tmp_path / "runs").mkdir()
    folders.hugging_face("llama", tmp_path).rename(tmp_path / "runs" / "mine")
    printed = run(0, tmp_path)
    assert "| my_questions, shots | examples | exact_match |" in printed
    written = tmp_path / "runs" / "my_questions"
    lines = (written / "predictions-2.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert first["prompt"].count("\n") == 2
    assert first["prompt"].endswith("The colour of snow is")
    assert first["target"] == "white"
    rows = (written / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row).get("shots") for row in rows] == [0, 1, 2, 4, None]


@pytest.mark.slow
def test_the_study_runs_as_the_page_says(tmp_path):
    assert "| shots, mappings of pairs never seen | structured | control |" in run(1, tmp_path)
    for name in ("in_context.png", "in_context.md", "in_context.jsonl"):
        assert (tmp_path / "runs" / "in_context" / "study" / name).exists()
