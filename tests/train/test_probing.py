"""Probes over what embed wrote: labels found by id, by what is right and by what is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from t5x_lite.train import embed
from t5x_lite.train.probing import probe
from t5x_lite.types import InputError

COUNT = 60


def write(folder, vectors, names):
    """As embed does."""
    folder.mkdir()
    np.save(folder / embed.VECTORS, vectors.astype(np.float32))
    lines = [json.dumps({"id": name}) + "\n" for name in names]
    (folder / embed.IDS).write_text("".join(lines))
    return str(folder)


def write_labels(path, labels, names=None):
    records = [{"label": label} for label in labels]
    if names is not None:
        records = [{**r, "id": name} for r, name in zip(records, names, strict=True)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def clouds(tmp_path):
    """Two clouds, and what they are called; labels in another order than the vectors."""
    rng = np.random.default_rng(0)
    labels = ["a" if i % 3 else "b" for i in range(COUNT)]
    vectors = rng.normal(size=(COUNT, 4)) + 9.0 * np.array(
        [[1.0 if label == "a" else -1.0] for label in labels]
    )
    names = [f"text {i}" for i in range(COUNT)]
    order = rng.permutation(COUNT)
    path = tmp_path / "labels.jsonl"
    write_labels(path, [labels[i] for i in order], [names[i] for i in order])
    return write(tmp_path / "vectors", vectors, names), str(path), vectors, labels


def test_clouds_are_told_apart_by_both(clouds, capsys):
    folder, path, *_ = clouds
    found = probe(vectors=folder, labels=path, held_out=0.25, neighbours=3, resamples=50)
    assert found["linear"] == found["neighbours"] == found["linear_low"] == 100.0
    assert (found["trained_on"], found["judged_by"]) == (45, 15)
    assert 40 < found["majority"] < 90
    assert json.loads(capsys.readouterr().out)["linear"] == 100.0
    again = probe(vectors=folder, labels=path, held_out=0.25, neighbours=3, resamples=50)
    assert again == found
    other = probe(vectors=folder, labels=path, held_out=0.25, seed=1, resamples=50)
    assert other["majority"] != found["majority"]


def test_labels_that_mean_nothing_are_not_found(clouds, tmp_path):
    """Told by other vectors: nothing of those that judge was learned from."""
    folder, path, vectors, labels = clouds
    rng = np.random.default_rng(1)
    noise = [str(rng.integers(2)) for _ in range(COUNT)]
    numbers = write(tmp_path / "numbered", vectors, range(COUNT))
    shuffled = write_labels(tmp_path / "noise.jsonl", noise)  # by the lines' numbers
    found = probe(vectors=numbers, labels=shuffled, resamples=50)
    assert found["linear"] < 90
    judged = probe(vectors=folder, labels=path, test_vectors=folder, test_labels=path, resamples=9)
    assert judged["judged_by"] == COUNT
    assert judged["majority"] == pytest.approx(100 * labels.count("a") / COUNT)


def test_what_does_not_belong_together_is_one_message(clouds, tmp_path):
    folder, path, vectors, _ = clouds
    wide = write(tmp_path / "wide", np.ones((2, 5)), range(2))
    two = write_labels(tmp_path / "two.jsonl", ["a", "b"])
    twice = write_labels(tmp_path / "twice.jsonl", ["a", "b"], ["x", "x"])
    other = write_labels(tmp_path / "other.jsonl", [["a"], "b"])
    (tmp_path / "text.jsonl").write_text("alpha\n")
    for arguments, message in (
        ({"labels": two}, "no label for the vector 'text 0'"),
        ({"labels": twice}, "line 2: the id 'x' is there twice"),
        ({"labels": other}, "line 1: expected a JSON object with a text or a number"),
        ({"labels": str(tmp_path / "text.jsonl")}, "is not JSON lines"),
        ({"labels": str(tmp_path / "none.jsonl")}, "can't read probe.labels"),
        ({"vectors": str(tmp_path)}, "holds no vectors"),
        ({"test_vectors": wide}, "go together"),
        ({"test_vectors": wide, "test_labels": two}, "4 dimensions and those in .* 5"),
        ({"held_out": 0.001}, "held_out=0.001 of 60 vectors are 0"),
        ({"label": "mood"}, r"in the field 'mood' \(probe.label\)"),
        ({"neighbours": 0}, "neighbours=0"),
    ):
        with pytest.raises(InputError, match=message):
            probe(**({"vectors": folder, "labels": path} | arguments))
    same = write_labels(tmp_path / "same.jsonl", ["a"] * COUNT)
    numbered = write(tmp_path / "n", vectors, range(COUNT))
    with pytest.raises(InputError, match="two different labels"):
        probe(vectors=numbered, labels=same)
