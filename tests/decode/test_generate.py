"""Every strategy writes what its definition says, and what transformers writes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.decode.generate import generate, search_beams
from t5x_lite.decode.prompts import pad_left
from t5x_lite.decode.sampling import BeamSearch, Greedy
from t5x_lite.interop import load_hf

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
EXPECTED = json.loads((FIXTURES / "generation.json").read_text(encoding="utf-8"))
EOS, PAD, NEW = 1, 0, 7
CASES = [(name, number) for name, made in EXPECTED.items() for number in range(len(made["cases"]))]


@functools.cache
def fixture(name: str):
    folder = FIXTURES / ("generation" if name == "bart" else "hf")
    model, params = load_hf(str(folder / name))
    arrays = {key: np.asarray(x, np.int32) for key, x in EXPECTED[name]["inputs"].items()}
    return model, params, arrays


@functools.cache
def program(model, strategy, **ids):
    """All beams of a beam search, or the tokens of another strategy."""
    call = search_beams if isinstance(strategy, BeamSearch) else generate
    return jax.jit(functools.partial(call, model, strategy=strategy, **ids))


def decoder_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return pad_left([rng.integers(2, 96, size).astype(np.int32) for size in (6, 2, 4, 6)], 6)


def encoder_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    segments = (np.arange(9)[None] < np.array([[9], [5], [7], [2]])).astype(np.int32)
    tokens = rng.integers(2, 96, segments.shape).astype(np.int32) * segments
    return {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}


def batch_of(config) -> dict[str, np.ndarray]:
    return decoder_batch() if config.encoder is None else encoder_batch()


# transformers


@pytest.mark.parametrize(("name", "number"), CASES)
def test_tokens_are_those_of_transformers(name, number):
    model, params, batch = fixture(name)
    case = EXPECTED[name]["cases"][number]
    strategy = {"Greedy": Greedy, "BeamSearch": BeamSearch}[case["kind"]](**case["strategy"])
    tokens = np.asarray(case["tokens"])
    decode = program(
        model,
        strategy,
        max_tokens=tokens.shape[1],
        eos_id=tuple(case["eos"]),
        pad_id=0,
        start_id=EXPECTED[name]["start"],
    )
    found = decode(params, batch)
    if isinstance(strategy, BeamSearch):
        np.testing.assert_allclose(found.scores[:, 0], case["scores"], rtol=1e-4, atol=1e-5)
        found = found.tokens[:, 0]
    np.testing.assert_array_equal(found, tokens)


def test_the_fixtures_have_early_ends_and_unlike_answers():
    for name, made in EXPECTED.items():
        answers = {str(case["tokens"]) for case in made["cases"]}
        early = [np.asarray(case["tokens"])[:, -1] == 0 for case in made["cases"]]
        assert len(answers) > 5, name
        assert sum(ends.any() and not ends.all() for ends in early) > 5, name
        segments = np.asarray(next(v for k, v in made["inputs"].items() if "segment" in k))
        assert len(set(segments.sum(1).tolist())) == 4, name


# Properties


def test_uncached_search_finds_the_same_beams():
    pass
