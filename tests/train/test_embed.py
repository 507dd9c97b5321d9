"""Vectors in bulk are those of single texts, in order, and a killed run goes on where it was."""

from __future__ import annotations

import json

import numpy as np
import pytest

from t5x_lite.decode import modes
from t5x_lite.decode.modes.asker import Asker
from t5x_lite.train import embed as module
from t5x_lite.train.embed import embed, read, read_array_record
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError
from tests import folders
from tests.train import harness

TEXTS = [
    "alpha",
    "beta gamma delta eps zeta alpha beta gamma delta eps",
    "gamma alphata",
    "delta eps zeta betama alpha beta gamma delta",
    "zeta",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(folders.hugging_face("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def expected(model):
    """Each text asked alone."""
    loaded = open_model(model, partitioner=harness.one_device())
    mode = modes.make(loaded, "embed", modes.Options(max_input_tokens=14))
    asker = Asker(mode, 1)
    rows = [mode.encode({"inputs": text}) for text in TEXTS]
    return np.stack([asker.batch([row], [0])[0] for row in rows])


def run(model, tmp_path, **changes):
    path = tmp_path / "texts.jsonl"
    if not path.exists():
        ids = [{"id": f"text {i}"} if i != 2 else {} for i in range(len(TEXTS))]
        lines = [{"inputs": text, **name} for text, name in zip(TEXTS, ids, strict=True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = {
        "model_dir": model,
        "input": str(path),
        "output": str(tmp_path / "out"),
        "batch_size": 2,
        "max_input_tokens": 14,
        "partitioner": harness.one_device(),
    }
    return embed(**arguments | changes)


IDS = ["text 0", "text 1", 2, "text 3", "text 4"]


def test_vectors_in_bulk_are_those_of_single_texts(model, expected, tmp_path):
    assert run(model, tmp_path, format="array_record") == 5
    for ids, vectors in (
        read(str(tmp_path / "out")),
        read_array_record(str(tmp_path / "out" / module.ARRAY_RECORD)),
    ):
        assert ids == IDS
        np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-5)
        assert vectors.dtype == np.float32


def test_a_killed_run_goes_on(model, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("t5x_lite.decode.modes.asker._WINDOW", 1)  # two texts are written at a time
    whole, calls = module._write, []

    def dies(output, shape, at, vectors, ids):
        whole(output, shape, at, vectors, ids)
        calls.append(at)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="4 of 5 vectors"):
        read(str(out))
    with open(out / module.IDS, "a") as file:
        file.write('{"id": "te')  # a torn line
    calls.clear()
    assert run(model, tmp_path) == 1
    assert calls == [4]
    ids, vectors = read(str(out))
    assert ids == IDS
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-5)
    assert run(model, tmp_path) == 0  # nothing is left to do


def test_mistakes_are_one_message(model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"embed\.format='npz'"):
        run(model, tmp_path, format="npz")
    with pytest.raises(InputError, match=r"text 2 of .*12 tokens"):
        run(model, tmp_path, max_input_tokens=8, output=str(tmp_path / "short"))
    run(model, tmp_path)
    with pytest.raises(InputError, match="vectors of pooling None"):
        run(model, tmp_path, pooling="first")
    (tmp_path / "texts.jsonl").write_text('{"inputs": "alpha"}\n')
    with pytest.raises(InputError, match="vectors of texts 5"):
        run(model, tmp_path)
    (out / module.ABOUT).unlink()
    with pytest.raises(InputError, match="is not empty"):
        run(model, tmp_path)
    with pytest.raises(InputError, match="holds no vectors"):
        read(str(tmp_path))
