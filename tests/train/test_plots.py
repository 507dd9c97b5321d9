"""Curves are read right from metric files, and drawn into a picture."""

import math
import sys

import pytest

from t5x_lite.train import plots
from t5x_lite.train.writers import JsonlWriter
from t5x_lite.types import InputError


def _metrics(path, offset=0.0):
    writer = JsonlWriter(path)
    for step in range(1, 201):
        writer.write(step, {"loss": offset + 2 + 6 * math.exp(-step / 40), "accuracy": 0.1})
        if step % 50 == 0:
            writer.write(step, {"eval/loss": offset + 2.2 + 6 * math.exp(-step / 40)})
    writer.close()
    return path


def test_curves_are_read_by_name(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"train/loss": 3.0, "accuracy": 0.5})
    writer.write(2, {"loss": math.nan})
    writer.write(3, {"loss": 2.0, "eval/kjv/loss": 2.5})
    assert plots.read_curves(tmp_path / "m.jsonl") == {
        "training": ([1, 3], [3.0, 2.0]),
        "eval/kjv": ([3], [2.5]),
    }
    assert plots.read_curves(tmp_path / "m.jsonl", "accuracy") == {"training": ([1], [0.5])}


def test_a_picture_is_drawn(tmp_path):
    runs = {
        "pretrained": _metrics(tmp_path / "a.jsonl"),
        "from scratch": _metrics(tmp_path / "b.jsonl", 0.7),
    }
    out = plots.plot_curves(runs, tmp_path / "new" / "loss.png", title="Fine-tuning on 2 runs")
    assert out.read_bytes().startswith(b"\x89PNG")
    one = plots.plot_curves({"pretrained": runs["pretrained"]}, tmp_path / "one.png")
    assert one.read_bytes() != out.read_bytes()


def test_bad_input_is_named(tmp_path, monkeypatch):
    path = _metrics(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no runs"):
        plots.plot_curves({}, tmp_path / "x.png")
    with pytest.raises(InputError, match="holds no 'perplexity'"):
        plots.plot_curves({"a": path}, tmp_path / "x.png", metric="perplexity")
    with pytest.raises(InputError, match="can't read"):
        plots.plot_curves({"a": tmp_path / "none.jsonl"}, tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install t5x_lite\[studies\]"):
        plots.plot_curves({"a": path}, tmp_path / "x.png")
