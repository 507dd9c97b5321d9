"""convert.py as a user runs it: every command of docs/convert.md, and its mistakes."""

from __future__ import annotations

import json

import pytest

from t5x_lite.data.vocabularies import train_sentencepiece
from t5x_lite.interop import load_hf, save_hf
from tests import pages
from tests.common import T5, build, with_stacks
from tests.interop.t5x_writer import adafactor_tree, t5x_tree, write_native

SHORT = pages.train_for(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page's commands start from: t5-small, a T5X checkpoint, and a task's files."""
    path = tmp_path_factory.mktemp("convert")
    config = with_stacks(T5, num_layers=1)
    model, params = build(type(config)(**{**vars(config), "vocab_size": 416}))
    words = [f"the river {i} and the bread of day {i * 7}" for i in range(300)]
    (path / "tokenizer").mkdir()
    train_sentencepiece(words, path / "tokenizer" / "spiece.model", vocab_size=298)
    save_hf(str(path / "t5-small"), model, params, tokenizer=str(path / "tokenizer"))
    tree = t5x_tree(params)
    write_native(path / "t5x" / "checkpoint_1000", tree, adafactor_tree(tree, 1000))
    (path / "my_task").mkdir()
    pairs = [{"inputs": word, "targets": "bread"} for word in words[:16]]
    for name in ("train", "validation"):
        (path / f"my_task/{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return path


@pytest.mark.slow
def test_the_commands_of_the_page_run(folder):
    commands = pages.blocks("docs/convert.md")
    assert len(commands) >= 5
    assert '"prediction"' in pages.run("\n".join(commands), folder, SHORT)
    for name in ("runs/t5", "runs/tuned", "runs/adapted", "runs/from_t5x"):
        assert (folder / name / "run.json").exists(), name
    assert (folder / "runs/from_t5x/checkpoints/1000/optimizer").is_dir()
    for name in ("out/merged", "out/again", "out/from_t5x"):
        assert (folder / name / "spiece.model").exists(), name
        load_hf(str(folder / name))
    settings = json.loads((folder / "out/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "t5-small"


def test_mistakes_are_one_message_and_help_teaches(folder):
    done = pages.shell("python scripts/convert.py --source=t5-small --output=o --to=peft", folder)
    assert done.returncode == 2
    expected = "error: 't5-small' is in the format 'hf': convert.to='peft' can be 'run'\n"
    assert done.stderr == expected
    done = pages.shell("python scripts/convert.py --help", folder)
    assert done.returncode == 0
    for text in ("docs/convert.md", "--source=", "source: str (required)", "base: "):
        assert text in done.stdout, text
