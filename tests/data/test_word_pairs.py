"""Pairs of words out of a wheel of the right shape."""

from __future__ import annotations

import zipfile

import pytest

from t5x_lite.data.builders import word_pairs
from t5x_lite.data.builders.catalog import prepare
from t5x_lite.data.sources import TfdsSource
from t5x_lite.evaluation.word_vectors import Judged, read_judged
from t5x_lite.types import InputError


def wheel(folder, text):
    folder.mkdir()
    with zipfile.ZipFile(folder / f"gensim-{word_pairs.VERSION}-cp311-any.whl", "w") as archive:
        archive.writestr("gensim/test/test_data/wordsim353.tsv", text)
    return str(folder)


def test_pairs_become_a_dataset(tmp_path):
    wheels = wheel(tmp_path / "wheels", "# Word 1\tWord 2\tHuman\nStone\trock\t8.5\ncat\tsea\t1\n")
    found = prepare("wordsim353", str(tmp_path / "data"), wheels=wheels)
    assert found["splits"] == {"test": 2}
    pairs = read_judged(TfdsSource("wordsim353", str(tmp_path / "data")))
    assert sorted(pairs, key=lambda pair: pair.score) == [
        Judged("cat", "sea", 1.0),
        Judged("stone", "rock", 8.5),
    ]


def test_another_wheel_is_named(tmp_path):
    wheels = wheel(tmp_path / "wheels", "stone\trock\tmuch\n")
    with pytest.raises(InputError, match="not the whole wheel"):
        prepare("wordsim353", str(tmp_path / "data"), wheels=wheels)
    with pytest.raises(InputError, match="not the whole wheel"):
        prepare("simlex999", str(tmp_path / "data"), wheels=wheels)
