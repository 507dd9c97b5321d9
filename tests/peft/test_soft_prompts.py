"""Soft prompts and prefixes: each text has its own, wherever it stands and however it is read."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import types
from t5x_lite.data.layouts import as_decoder, as_encoder, as_encoder_decoder, put_ahead
from t5x_lite.data.objectives.base import Example
from t5x_lite.data.packing import place
from t5x_lite.data.vocabularies import ByteVocabulary
from t5x_lite.decode import scoring
from t5x_lite.decode.choices import score_alternatives
from t5x_lite.decode.engine import Engine, Request
from t5x_lite.decode.loaded import Loaded
from t5x_lite.evaluation.generation import write_tokens
from t5x_lite.models import prompted, transformer
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.prefix import PrefixTuning
from t5x_lite.peft.prompt import PromptTuning, ids_of_text
from t5x_lite.types import InputError
from tests import common
from tests.data.toy import ToyVocabulary
from tests.train import harness

LENGTH = 3
PREFIX = PrefixTuning(length=LENGTH)
PROMPT = PromptTuning(length=LENGTH)
BOTH = Compose((PROMPT, PREFIX))
METHODS = {"prefix": PREFIX, "prompt": PROMPT, "both": BOTH}
SLOW = pytest.mark.slow
FAMILIES = {name: common.FAMILIES[name] for name in ("bert", "gpt2", "t5_1_0", "llama")}
LENGTHS = {"encoder": 24, "decoder": 24, "masked": 6}


@functools.cache
def tuned(family, transform):
    """`(model, parameters with nodes)`, one text a row."""
    config = dataclasses.replace(FAMILIES[family], pair_head=None)
    model = transformer.Transformer(config)
    base = harness.host_params(config)
    names, rng = transformer.axes(model), np.random.default_rng(3)
    shapes = jax.eval_shape(lambda base: transform.split(base, names, jax.random.key(0)), base)[0]
    # Wide enough to matter; nothing is compiled for it.
    trainable = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    params = transform.apply(trainable, base)
    return prompted.PromptedTransformer(config, prompt=prompted.prompt_length(params)), params


def bare(model):
    """As training has it: its rows hold the prompts."""
    return transformer.Transformer(model.config)


def run(model, params, batch, **options):
    call = functools.partial(model.apply, **options)
    lowered = jax.jit(lambda params, batch: call({"params": params}, batch)).lower(params, batch)
    return np.asarray(harness.compile_quickly(lowered)(params, batch))


def streams(family, length, seed):
    """A text as its task lays it out."""
    rng = np.random.default_rng(seed)
    inputs, targets = (rng.integers(5, 90, size).astype(np.int32) for size in (length, length - 1))
    if family == "bert":
        slots = np.array([1, length - 1], np.int32)
        one = Example(inputs, None, slots, targets[:2], token_types=np.ones_like(inputs))
        return as_encoder(one, LENGTHS)
    layout = as_encoder_decoder if family.startswith("t5") else as_decoder
    return layout(Example(inputs, targets, start_id=2), LENGTHS)


def ids_of(model):
    return tuple(range(model.config.vocab_size, model.config.vocab_size + model.prompt))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5_1_0"])
@pytest.mark.parametrize(
    "method", [pytest.param("prefix", marks=SLOW), pytest.param("prompt", marks=SLOW), "both"]
)
def test_packed_texts_are_as_each_alone_behind_its_own(method, family):
    model, params = tuned(family, METHODS[method])
    lengths = {k: v for k, v in LENGTHS.items() if getattr(model.config, k, True) is not None}
    texts = [streams(family, length, seed) for seed, length in enumerate((5, 4))]
    if family != "bert":
        lengths.pop("masked")
    behind = [put_ahead(text, ids_of(model)) if model.prompt else text for text in texts]
    packed = place(behind, [0, 0], 1, lengths).rows
    found = run(bare(model), params, packed)[0]
    alone = place(texts, [0, 1], 2, lengths).rows  # which the model itself puts behind a prompt
    expected = run(model, params, alone)
    if family == "bert":
        found, expected = found[:4], expected[:, :2].reshape(4, -1)
    else:
        own = np.flatnonzero(packed[types.DECODER_LOSS_WEIGHTS][0])
        real = alone[types.DECODER_LOSS_WEIGHTS] > 0
        assert packed[types.DECODER_TARGET_TOKENS][0, own].tolist() == (
            alone[types.DECODER_TARGET_TOKENS][real].tolist()
        )
        found, expected = found[own], expected[real]
    assert found.shape[-1] == 96  # nobody writes a prompt
    np.testing.assert_allclose(found, expected, 1e-4, 1e-4)


def test_a_prompt_stands_in_front_of_what_is_read_first():
    ids = (96, 97)
    found = put_ahead(as_decoder(Example(np.int32([5, 6]), np.int32([7, 1])), LENGTHS), ids)
    assert found[types.DECODER_INPUT_TOKENS].tolist() == [96, 97, 0, 5, 6, 7]
    assert found[types.DECODER_TARGET_TOKENS].tolist() == [0, 0, 5, 6, 7, 1]
    assert found[types.DECODER_LOSS_WEIGHTS].tolist() == [0, 0, 0, 0, 1, 1]
    assert found[types.DECODER_LOSS_WEIGHTS].dtype == np.float32
    text = streams("bert", 4, 0)
    found = put_ahead(text, ids)
    assert found[types.MASKED_POSITIONS].tolist() == [3, 5]
    assert found[types.ENCODER_TOKEN_TYPES].tolist() == [0, 0, 1, 1, 1, 1]
    assert found[types.MASKED_TARGET_TOKENS] is text[types.MASKED_TARGET_TOKENS]
    text = streams("t5_1_0", 4, 0)
    found = put_ahead(text, ids)
    assert found[types.ENCODER_INPUT_TOKENS][:2].tolist() == [96, 97]
    assert found[types.DECODER_INPUT_TOKENS] is text[types.DECODER_INPUT_TOKENS]
    nothing = {key: value[:0] for key, value in text.items()}
    assert put_ahead(nothing, ids) == nothing


def test_padding_stays_outside_of_the_prompt():
    batch = {
        types.DECODER_INPUT_TOKENS: np.int32([[0, 5, 6], [7, 0, 0], [0, 0, 0]]),
        types.DECODER_SEGMENT_IDS: np.int32([[0, 1, 1], [1, 0, 0], [0, 0, 0]]),
    }
    found = prompted.behind_prompt(batch, 2, 96)
    tokens = [[0, 96, 97, 5, 6], [96, 97, 7, 0, 0], [96, 97, 0, 0, 0]]
    assert found[types.DECODER_INPUT_TOKENS].tolist() == tokens
    segments = [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert found[types.DECODER_SEGMENT_IDS].tolist() == segments


@pytest.mark.parametrize("family", ["gpt2", "t5_1_0", pytest.param("llama", marks=SLOW)])
def test_tokens_over_a_cache_are_as_without_and_see_no_later_ones(family):
    model, params = tuned(family, BOTH)
    config, rng = model.config, np.random.default_rng(0)
    tokens = rng.integers(5, 90, (2, 7)).astype(np.int32)
    other = {types.ENCODER_INPUT_TOKENS: tokens[:, :5]} if config.encoder is not None else {}

    def read(params, tokens):
        whole = model.apply({"params": params}, {**other, types.DECODER_INPUT_TOKENS: tokens})
        # A prompt on the left of which there is padding, and then two and one more.
        first = jnp.pad(tokens[:, :4], ((0, 0), (2, 0)))
        batch = {
            **other,
            types.DECODER_INPUT_TOKENS: first,
            types.DECODER_SEGMENT_IDS: jnp.pad(jnp.ones_like(tokens[:, :4]), ((0, 0), (2, 0))),
        }
        apart = transformer.for_decoding(params)
        logits, cache = model.apply({"params": apart}, batch, 9, method="prefill")
        parts = [logits[:, 2:]]
        for part in (tokens[:, 4:6], tokens[:, 6:]):
            logits, cache = model.apply({"params": apart}, part, cache, method="extend")
            parts.append(logits)
        return whole, jnp.concatenate(parts, axis=1)

    compiled = harness.compile_quickly(jax.jit(read).lower(params, tokens))
    whole, cached = compiled(params, tokens)
    np.testing.assert_allclose(cached, whole, 1e-5, 1e-5 * float(jnp.abs(whole).max()))
    changed = compiled(params, np.where(np.arange(7) < 5, tokens, 9).astype(np.int32))[0]
    np.testing.assert_allclose(changed[:, :5], whole[:, :5], 1e-5, 1e-5)
    assert np.abs(changed[:, 5:] - whole[:, 5:]).max() > 1e-2


VOCABULARY = ToyVocabulary(size=96, num_sentinels=0, mask_id=None)


def loaded_of(family, transform):
    model, params = tuned(family, transform)
    return Loaded(bare(model), params, VOCABULARY, harness.one_device())


@pytest.mark.parametrize("family", ["gpt2", pytest.param("t5_1_0", marks=SLOW)])
def test_whoever_asks_gets_the_same_texts(family):
    loaded = loaded_of(family, BOTH)
    assert isinstance(loaded.model, prompted.PromptedTransformer)
    rng = np.random.default_rng(1)
    asked = [np.concatenate([[2], rng.integers(5, 90, n)]).astype(np.int32) for n in (4, 2)]
    written = write_tokens(loaded, asked, max_tokens=4, batch_size=2)
    engine = Engine(loaded, slots=2, prompt_buckets=(8,), capacity=12)
    answers = dict(engine.run([Request(tokens, max_tokens=4) for tokens in asked]))
    for number, tokens in enumerate(written):
        end = np.flatnonzero(tokens == VOCABULARY.eos_id)
        assert answers[number] == tokens[: end[0] + 1 if end.size else None].tolist()


@SLOW
@pytest.mark.parametrize("family", ["gpt2", "t5_1_0"])
def test_choices_over_one_cache_are_scored_as_rows_of_their_own(family):
    loaded, rng = loaded_of(family, BOTH), np.random.default_rng(1)
    context = np.concatenate([[2], rng.integers(5, 90, 4)]).astype(np.int32)
    greedy = write_tokens(loaded, [context], max_tokens=2, batch_size=1)[0]
    choices = [greedy, rng.integers(5, 90, 2).astype(np.int32)]
    items = [scoring.Item(context, tokens) for tokens in choices]
    shared = score_alternatives(loaded, [items], batch_size=1)[0]
    alone = scoring.score_items(loaded, items, batch_size=2)
    assert shared[0].greedy
    for one, other in zip(shared, alone, strict=True):
        assert one.logprob == pytest.approx(other.logprob, rel=1e-4)


def test_a_prompt_and_a_prefix_take_learned_positions():
    assert [loaded_of("gpt2", m).room("decoder") for m in (PREFIX, PROMPT, BOTH)] == [29, 29, 26]
    assert loaded_of("bert", PROMPT).room("encoder") == 29
    assert loaded_of("llama", BOTH).room("decoder") is None
    model, params = tuned("gpt2", PREFIX)
    row = {types.DECODER_INPUT_TOKENS: np.ones((1, 30), np.int32)}
    with pytest.raises(InputError, match="30 tokens behind a prefix of 3 is longer than the 32"):
        jax.eval_shape(model.apply, {"params": params}, row)
    too_long = scoring.Item(np.ones(20, np.int32), np.ones(11, np.int32))
    with pytest.raises(InputError, match="row of 30 tokens for the decoder, which has 29"):
        scoring.score_items(loaded_of("gpt2", PREFIX), [too_long])


def test_where_a_prompt_starts():
    model, _ = tuned("gpt2", PROMPT)
    base, names = harness.host_params(model.config), transformer.axes(model)

    def rows(transform, seed=0):
        trainable, _ = transform.split(base, names, jax.random.key(seed))
        return np.asarray(trainable["token_embedding"]["embedding"]["prompt"])

    table = base["token_embedding"]["embedding"]
    drawn = rows(PromptTuning(length=5))
    assert all((table == row).all(axis=1).any() for row in drawn)
    assert not np.array_equal(drawn, rows(PromptTuning(length=5), seed=1))
    assert rows(PromptTuning(length=3, start="random", stddev=2.0)).std() > 1.0
    ids = ids_of_text(ByteVocabulary(), "ab")
    assert len(ids) == 2
    np.testing.assert_array_equal(
        rows(PromptTuning(length=3, ids=(7, 9))), table[np.array([7, 9, 7])]
    )
    np.testing.assert_array_equal(rows(PromptTuning(length=1, ids=(7, 9))), table[[7]])


def test_lora_on_an_embedding_goes_inside_of_a_prompt():
    lora = LoRA(rank=2, targets=("token_embedding/embedding",))
    with pytest.raises(InputError, match="PromptTuning behind LoRA: name PromptTuning first"):
        Compose((lora, PROMPT))
    model, params = tuned("gpt2", Compose((PROMPT, lora)))
    row = {types.DECODER_INPUT_TOKENS: np.int32([[5, 6]])}
    assert np.isfinite(run(model, params, row)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTuning(length=0), "expected a length from 1 on"),
        (lambda: PrefixTuning(stddev=-1.0), "a stddev from 0 on"),
        (lambda: PromptTuning(start="text"), "start='text': expected 'vocabulary' or 'random'"),
        (lambda: tuned("gpt2", PromptTuning(ids=(96,))), "vocabulary ends at 95"),
        (lambda: tuned("gpt2", PrefixTuning(targets=(".*/query/kernel",))), "no kernel of keys"),
        (lambda: tuned("gpt2", PrefixTuning(targets=(".*/key/kernel",))), "one half of 'decoder"),
        (lambda: ids_of_text(ByteVocabulary(), ""), "has no token"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
