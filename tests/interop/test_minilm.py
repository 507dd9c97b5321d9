"""A real pretrained encoder, all-MiniLM-L6-v2, gives the vectors that transformers computes.

`python tests/fixtures/make_hf.py --sentences=DIR` made the reference, from the same files.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.data.vocabularies import TokenizersVocabulary
from t5x_lite.interop import load_hf
from t5x_lite.interop.packages import fetch_model
from t5x_lite.models.config_heads import EmbeddingHead
from t5x_lite.types import InputError

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "minilm"


@pytest.fixture(scope="module")
def directory() -> Path:
    """The folder of the model, fetched once."""
    try:
        return Path(fetch_model(model="minilm", output=str(CACHE / "model")))
    except InputError as error:
        pytest.skip(str(error))


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
