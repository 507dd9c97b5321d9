"""docs/peft.md's commands, from the runs that the README's make."""

from __future__ import annotations

import pytest

from tests import pages


@pytest.mark.slow
def test_the_pages_commands_run(tmp_path):
    needed = ("my_text/train.txt", "scripts/train_vocab.py", "my_task/train.jsonl")
    before = [b for b in pages.blocks("README.md") if any(name in b for name in needed)]
    assert len(before) == len(needed)
    own = pages.blocks("docs/peft.md")
    assert len(own) >= 6
    printed = pages.run("\n".join(before + own), tmp_path, pages.train_for(2), timeout=1500)
    for run in ("math", "first", "second", "prompt", "qlora", "on_nf4"):
        assert (tmp_path / "runs" / run / "checkpoints" / "2").exists(), run
    for folder in ("math", "math_peft", "merged", "both", "difference"):
        assert (tmp_path / "out" / folder).is_dir(), folder
    assert printed.count('"prediction"') >= 4
