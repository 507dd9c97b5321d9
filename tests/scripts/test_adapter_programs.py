"""merge_adapter.py and combine_adapters.py as a user runs them."""

from __future__ import annotations

import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.interop import load_hf
from tests import folders, pages

PEFT = folders.FIXTURES / "peft" / "t5"


@pytest.mark.slow
def test_adapters_are_combined_and_merged(tmp_path):
    folders.hugging_face("peft/t5/base", tmp_path).rename(tmp_path / "t5")
    for name in ("adapter", "second"):
        (tmp_path / name).symlink_to(PEFT / name)
    commands = """
    python scripts/combine_adapters.py --base=t5 --adapters=adapter,second --weights='(0.7, -0.4)' \
        --method='@Ties()' --gin.Ties.density=0.4 --output=both
    python scripts/merge_adapter.py --base=t5 --adapter=both --output=merged
    python scripts/merge_adapter.py --base=t5 --adapter=adapter,second --weights='(0.7, -0.4)' \
        --method='@Ties()' --gin.Ties.density=0.4 --output=at_once
    """
    shown = pages.run(commands, tmp_path)
    assert shown.count("Largest change of a logit on 4 rows of random tokens") == 2
    one, other, base = (
        trees.flatten(load_hf(str(tmp_path / name))[1]) for name in ("merged", "at_once", "t5")
    )
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], path)
    assert any((leaf != base[path]).any() for path, leaf in one.items())


def test_mistakes_are_one_message(tmp_path):
    command = "python scripts/merge_adapter.py --base=t5 --adapter=a,b --output=out"
    done = pages.shell(command, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 't5' is not a run's folder: it has no run.json")
