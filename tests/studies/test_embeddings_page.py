"""The commands and the Python of docs/embeddings.md, on stand-ins for the models and the data."""

from __future__ import annotations

import json
import random
import shutil
import zipfile

import numpy as np
import pytest

from t5x_lite.data.builders.word_pairs import VERSION
from tests import folders, pages

WORDS = ("alpha", "beta", "gamma", "delta", "eps", "zeta")
PAIRS = "# first\tsecond\tscore\nalpha\tbeta\t9\ngamma\tdelta\t5\neps\tzeta\t2\n"
# The Bible's text is a small file, and the demo's model a fixture.
CASES = """
    *bible_text) ;;
    scripts/train_word2vec.py*) "$PYTHON" "$@" "${text[@]}" \\
      --gin_bindings='train_word2vec.source = @TextSource()' --gin.SkipGram.steps=8 ;;
    scripts/study_words.py*) "$PYTHON" "$@" "${text[@]}" \\
      --gin_bindings='study_words.source = @TextSource()' --gin.MODELS="{'BERT': 'models/bert'}" \\
      --neighbours=2 --window=6 ;;
"""
TEXT = """text=(--gin.TextSource.files="{'train': 'words.txt'}")\n"""


@pytest.mark.slow
def test_the_pages_commands_and_python_run(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    for name, fixture in {"bert": "bert", "gpt2": "peft/gpt2/base"}.items():
        made = folders.hugging_face(fixture, tmp_path / "scratch")
        shutil.move(made, tmp_path / "models" / name)
    rng = random.Random(0)
    lines = [" ".join(rng.choice(WORDS) for _ in range(9)) for _ in range(40)]
    (tmp_path / "words.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "data" / "wheels").mkdir(parents=True)
    wheel = tmp_path / "data" / "wheels" / f"gensim-{VERSION}-cp311-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("wordsim353.tsv", "simlex999.txt"):
            archive.writestr(f"gensim/test/test_data/{name}", PAIRS)
    commands = pages.blocks("docs/embeddings.md")
    assert len(commands) == 4
    printed = pages.run(TEXT + "\n".join(commands), tmp_path, CASES)
    assert '"linear": 100.0' in printed
    assert (tmp_path / "more_vectors" / "vectors.array_record").exists()
    for found in ("word2vec/summary.json", "study_words.json"):
        (tmp_path / "runs" / found).read_text()
    study = json.loads((tmp_path / "runs" / "study_words.json").read_text())
    assert study["words"] == len(WORDS)
    assert study["BERT, contextual"]["WordSim-353"]["pairs"] == 3

    monkeypatch.chdir(tmp_path)
    (code,) = pages.blocks("docs/embeddings.md", "python")
    names: dict = {}
    exec(code, names)
    assert names["ids"] == [0, 1]
    assert names["indices"].tolist() == [[0, 1]]
    np.testing.assert_allclose(names["cosine"], names["cosines"][0, 1:], rtol=1e-5)
