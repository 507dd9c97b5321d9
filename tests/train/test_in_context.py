"""The program around k-shot prompts: what it writes, and the line that any model has to beat."""

from __future__ import annotations

import json

import pytest

from t5x_lite.data.sources import JsonlSource
from t5x_lite.evaluation.fewshot import Choose, InContext, ShotTemplate
from t5x_lite.evaluation.metrics import exact_match
from t5x_lite.train import in_context
from t5x_lite.types import InputError


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Four questions, and a model that answers "b" to the first k of them, else "a"."""

    def answers(loaded, task, count, *, batch_size):
        targets = ["a", "b", "b", "b"]
        found = ["b" if index < count else "a" for index in range(4)]
        return [{"target": t, "prediction": p} for t, p in zip(targets, found, strict=True)]

    monkeypatch.setattr(in_context.fewshot, "answer", answers)
    monkeypatch.setattr(in_context, "open_model", lambda folder, **options: folder)
    source = JsonlSource({"test": str(tmp_path / "none.jsonl")})
    answer = Choose(choices=("a", "b"))
    return InContext(name="letters", source=source, template=ShotTemplate(), answer=answer)


def test_scores_by_shots_stand_beside_the_commonest_answer(task, tmp_path, capsys):
    rows = in_context.evaluate_in_context(
        model_dir="m", task=task, output=str(tmp_path / "out"), shots=[0, 4], samples=200
    )
    assert [row["exact_match"] for row in rows] == [25.0, 75.0, 75.0]
    assert rows[0]["exact_match_low"] < 25.0 < rows[0]["exact_match_high"]
    assert rows[2]["always"] == "b"
    scores = (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in scores] == rows
    predictions = (tmp_path / "out" / "predictions-4.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["prediction"] for line in predictions.splitlines()] == ["b"] * 4
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table.splitlines()[0] == "| letters, shots | examples | exact_match |"
    assert table.splitlines()[3].startswith("| 4 | 4 | 75.0 [")
    assert "always 'b'" in table
    assert table in capsys.readouterr().out


def test_numbers_of_shots_are_different(task, tmp_path):
    with pytest.raises(InputError, match="shots=\\(1, 1\\): expected different numbers"):
        in_context.evaluate_in_context(
            model_dir="m", task=task, output=str(tmp_path), shots=[1, 1], samples=2
        )
    assert task.metrics == (exact_match,)
