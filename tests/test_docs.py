"""Every command in README.md and docs/ is run: here, or by .ci/run if it is a make target."""

from __future__ import annotations

import re
import shutil
from typing import Any

import numpy as np
import pytest

from tests import pages
from tests.pages import PAGES, ROOT, blocks


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
    commands = [block for block in blocks("README.md") if not block.startswith("make ")]
    assert len(commands) >= 4
    commands += blocks("docs/tasks.md")  # from the weights that the README's have made
    printed = pages.run("\n".join(commands), tmp_path, pages.train_for(2), timeout=900)
    assert (tmp_path / "runs" / "task" / "eval" / "generate-2.jsonl").exists()
    for run in ("my_text", "my_task", "task"):
        for name in ("config.gin", "run.json", "vocabulary.model", "checkpoints/2"):
            assert (tmp_path / "runs" / run / name).exists(), (run, name)
    assert '"prediction"' in printed
    assert "ModelConfig.dtype = 'bfloat16'" in printed  # the dry run of the TPU section


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """On a fixture in the place of the published folder."""
    monkeypatch.chdir(tmp_path)
    source = ROOT / "tests" / "fixtures" / "hf" / "bert_mlm"
    shutil.copytree(source, tmp_path / "bert-base-uncased")
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    with np.load(source / "expected.npz") as expected:
        batch = {key: expected[key] for key in expected if key.startswith("encoder_")}
        outputs = expected["outputs"]
    (code,) = blocks("README.md", "python")
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
    (code,) = blocks("docs/decoding.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["tokens"].shape == (2, 8)
    assert names["beams"].tokens.shape == (2, 4, 8)
    assert names["beams"].scores.shape == (2, 4)
