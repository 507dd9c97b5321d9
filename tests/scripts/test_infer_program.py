"""The commands of docs/infer.md, as they stand, on fixtures in the place of published models."""

from __future__ import annotations

import json
import shutil

import pytest

from tests import folders, pages

MODELS = {"llama": "llama", "bert": "bert_mlm", "classifier": "bert_classifier"}


@pytest.mark.slow
def test_the_pages_commands_run(tmp_path):
    scratch = tmp_path / "scratch"
    (tmp_path / "models").mkdir()
    for name, fixture in {**MODELS, "gpt2": "peft/gpt2/base"}.items():
        shutil.move(folders.hugging_face(fixture, scratch), tmp_path / "models" / name)
    adapter = folders.FIXTURES / "peft" / "gpt2" / "adapter"
    (tmp_path / "models" / "gpt2_adapter").symlink_to(adapter)
    commands = pages.blocks("docs/infer.md")
    assert len(commands) == 5
    printed = pages.run("\n".join(commands), tmp_path)
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["inputs"] for line in answers] == ["alpha beta", "gamma"]
    found = [json.loads(line) for line in printed.splitlines()]
    masks, sampled, searched, pair, single, first, second, tuned = found
    assert len(masks["masks"][0]) == 3
    assert set(sampled) == set(searched) == set(tuned) == {"inputs", "prediction"}
    assert pair["id"] == 7
    assert pair["prediction"] in pair["probabilities"]
    assert set(single) == {"inputs", "prediction", "probabilities"}
    assert first["log_likelihood"] != second["log_likelihood"]
