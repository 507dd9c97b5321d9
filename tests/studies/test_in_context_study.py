"""The study asks what it says it asks: an oracle that reads the prompt scores what was shown."""

from __future__ import annotations

import json

import pytest

from t5x_lite.data.mappings import Mappings
from t5x_lite.decode.scoring import Score
from t5x_lite.studies import in_context
from t5x_lite.types import InputError


def oracle(loaded, questions, *, batch_size):
    """Knows the value that the prompt showed for its last letter, and nothing else."""
    if loaded == "control":
        return [[Score(-1.0, 1, False)] * len(values) for _, values in questions]
    rows = []
    for prompt, values in questions:
        shown = dict(zip(prompt[:-1:2], prompt[1:-1:2], strict=True))
        rows.append([Score(float(v == shown.get(prompt[-1])), 1, True) for v in values])
    return rows


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(in_context, "open_model", lambda folder, partitioner: folder)
    monkeypatch.setattr(in_context, "choices", oracle)


def test_an_oracle_scores_what_the_prompt_showed_and_the_control_guesses(opened, tmp_path):
    points = in_context.study_in_context(
        structured="structured",
        control="control",
        output=str(tmp_path),
        shots=(0, 4, 31),
        examples=60,
        samples=50,
    )
    assert len(points) == 12
    for point in points:
        assert point.low <= point.accuracy <= point.high
        if point.model == "structured":  # all scores alike: "A", right in few
            assert point.shown <= point.accuracy <= point.shown + 20
        else:
            assert point.accuracy <= 25
    shown = [p.shown for p in points if (p.model, p.split) == ("structured", "validation")]
    assert shown[0] == 0.0
    assert 25 < shown[1] < 60  # 1 - (7/8) ** 4 is 41%
    assert shown[2] > 90
    table = (tmp_path / "in_context.md").read_text(encoding="utf-8")
    assert "| shots, mappings of pairs never seen | structured | control | value shown |" in table
    lines = (tmp_path / "in_context.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["shots"] == 0
    assert (tmp_path / "in_context.png").stat().st_size > 10_000


def test_more_shots_than_a_text_has_are_an_error():
    with pytest.raises(InputError, match="expected numbers from 0 to 3, for a text has 4 pairs"):
        in_context.study_in_context(
            structured="a", control="b", output="c", texts=Mappings(pairs=4), shots=(4,)
        )
