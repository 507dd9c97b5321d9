"""Every strategy writes what its definition says, and what transformers writes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.decode import sampling
from t5x_lite.decode.generate import generate, search_beams
from t5x_lite.decode.prompts import pad_left
from t5x_lite.decode.sampling import BeamSearch, Greedy, Sampling
from t5x_lite.interop import load_hf
from t5x_lite.models import transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError
from tests import common

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
EXPECTED = json.loads((FIXTURES / "generation.json").read_text(encoding="utf-8"))
EOS, PAD, NEW = 1, 0, 7
CASES = [(name, number) for name, made in EXPECTED.items() for number in range(len(made["cases"]))]
# Each strategy with some model; the other pairs are for slow tests.
FEW = {("t5_1_0", 5), ("t5_1_1", 10), ("bart", 6), ("gpt2", 3), ("gpt2", 1), ("llama", 11)}


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


def prompts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return pad_left([rng.integers(2, 96, size).astype(np.int32) for size in (6, 2, 4, 6)], 6)


# transformers


@pytest.mark.parametrize(
    ("name", "number"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in CASES],
)
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
        assert sum(ends.any() for ends in early) > 5, name
        assert not all(ends.all() for ends in early), name
        segments = np.asarray(next(v for k, v in made["inputs"].items() if "segment" in k))
        assert len(set(segments.sum(1).tolist())) == 4, name


# Properties


@functools.cache
def writer():
    return common.build(common.with_stacks(common.FAMILIES["llama"], num_layers=1))


def write(strategy, batch=None, rng=None):
    model, params = writer()
    decode = program(model, strategy, max_tokens=NEW, eos_id=EOS, pad_id=PAD)
    batch = prompts() if batch is None else batch
    return np.asarray(decode(params, batch) if rng is None else decode(params, batch, rng=rng))


def test_one_beam_and_one_token_to_choose_from_are_greedy():
    greedy = write(Greedy())
    assert len({tuple(row) for row in greedy.tolist()}) == 4
    model, params = writer()
    decode = program(model, BeamSearch(1), max_tokens=NEW, eos_id=EOS, pad_id=PAD)
    np.testing.assert_array_equal(decode(params, prompts()).tokens[:, 0], greedy)
    np.testing.assert_array_equal(write(Sampling(top_k=1), rng=jax.random.key(0)), greedy)


def test_a_row_depends_on_its_prompt_and_key_alone():
    key = jax.random.key(4)
    first = write(Sampling(), rng=key)
    np.testing.assert_array_equal(write(Sampling(), rng=key), first)
    assert (write(Sampling(), rng=jax.random.key(5)) != first).any(axis=1).all()
    keys = sampling.row_keys(key, 4)
    order = np.array([2, 0, 3, 1])
    moved = {name: value[order] for name, value in prompts().items()}
    moved[types.DECODER_INPUT_TOKENS][0, -3:] = 7  # another row's prompt changes
    again = write(Sampling(), moved, keys[order])
    np.testing.assert_array_equal(again[1:], first[order][1:])
    assert (again[0] != first[2]).any()
    same = write(Sampling(), {k: v[[3, 3, 3, 3]] for k, v in prompts().items()}, key)
    assert len({tuple(row) for row in same.tolist()}) == 4  # a key for each row


def test_tokens_are_drawn_as_often_as_uncached_logits_say():
    """Chi-square of the second new token, over all first ones: 19 likely tokens and the rest."""
    model, params = writer()
    draws, prompt = 6000, np.array([5, 40, 17, 8], np.int32)
    batch = pad_left([prompt] * draws, 5)
    strategy = Sampling(temperature=1.3)
    decode = program(model, strategy, max_tokens=2, eos_id=-1, pad_id=PAD)
    drawn = np.asarray(decode(params, batch, rng=jax.random.key(8)))[:, 1]

    rows = np.array([[*prompt, token] for token in range(96)], np.int32)
    logits = jax.jit(model.apply)({"params": params}, {types.DECODER_INPUT_TOKENS: rows})
    share = jax.nn.softmax(logits[:, -2:] / 1.3)
    share = np.asarray(share[0, 0], np.float64) @ np.asarray(share[:, 1], np.float64)
    best = np.argsort(-share)[:19]
    expected = np.append(share[best], 1.0 - share[best].sum()) * draws
    counts = np.bincount(drawn, minlength=96)[best]
    counts = np.append(counts, draws - counts.sum())
    assert expected.min() > 20
    assert ((counts - expected) ** 2 / expected).sum() < 50.80  # once in 10,000 times by chance
    first = np.append(share[best][::-1], 0) * draws  # exchanged, they would be told apart
    assert ((counts - first)[:19] ** 2 / first[:19]).sum() > 50.80


def test_beams_on_eight_devices_are_those_of_one():
    model, params = common.build(common.with_stacks(common.T5, num_layers=1))
    rng = np.random.default_rng(3)
    segments = (np.arange(9)[None] < np.array([[9], [5], [7], [2]])).astype(np.int32)
    tokens = rng.integers(2, 96, segments.shape).astype(np.int32) * segments
    batch = {types.ENCODER_INPUT_TOKENS: tokens, types.ENCODER_SEGMENT_IDS: segments}
    search = functools.partial(
        search_beams, model, strategy=BeamSearch(3), max_tokens=NEW, eos_id=EOS, pad_id=PAD
    )
    expected = jax.jit(search)(params, batch)
    partitioner = Partitioner(data=2, fsdp=2, model=2)
    places = partitioner.tree_shardings(params, transformer.axes(model))
    with partitioner.activate():
        decode = jax.jit(search, out_shardings=partitioner.replicated)
        found = decode(jax.device_put(params, places), partitioner.put_batch(batch, 4))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_the_cache_is_of_the_type_and_size_asked_for():
    """By shapes alone: what such a cache computes is in tests/models/test_cache.py."""
    model, params = writer()
    heads = model.config.decoder.num_kv_heads, model.config.decoder.head_dim

    def shapes(**settings):
        write = functools.partial(
            generate, model, max_tokens=NEW, eos_id=EOS, pad_id=PAD, **settings
        )
        return str(jax.make_jaxpr(write)(params, prompts()))

    whole, small = (f"[4,{heads[0]},{places},{heads[1]}]" for places in (6 + NEW - 1, 3))
    assert f"f32{whole}" in shapes()
    assert f"i8{whole}" in shapes(cache_dtype="int8")
    assert f"bf16{whole}" in shapes(cache_dtype="bfloat16", strategy=BeamSearch(1))
    assert f"f32{small}" in shapes(window=3)
    assert whole not in shapes(window=3)


def test_what_cannot_be_generated():
    model, params = writer()
    options = {"max_tokens": NEW, "eos_id": EOS, "pad_id": PAD}
    with pytest.raises(InputError, match="Sampling: give it `rng`"):
        generate(model, params, prompts(), strategy=Sampling(), **options)
    with pytest.raises(InputError, match="max_tokens=0: expected at least 1"):
        generate(model, params, prompts(), **{**options, "max_tokens": 0})
    with pytest.raises(InputError, match="window=3 is for Greedy and Sampling"):
        generate(model, params, prompts(), strategy=BeamSearch(2), window=3, **options)
    encoder = transformer.Transformer(common.BERT)
    with pytest.raises(InputError, match="a model with a decoder"):
        generate(encoder, {}, prompts(), **options)
