"""Every family through the same properties: who sees whom, packing, padding, caching, recomputing.

What is T5's alone, and the stack's own mechanics, are in test_transformer.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees, types
from t5x_lite.models import heads, transformer
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import EmbeddingHead, LMHead, SequenceHead, TokenHead
from t5x_lite.models.config_positions import (
    DynamicScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Rotary,
    Sinusoidal,
    YarnScaling,
)
from tests import common

every_family = pytest.mark.parametrize("family", list(common.FAMILIES))
with_decoder = pytest.mark.parametrize(
    "family", [name for name, config in common.FAMILIES.items() if config.decoder is not None]
)


def segments_alone(config, lengths=((5, 4), (7, 6))):
    """Unpacked batches of one row, one for each of the (encoder, decoder) lengths."""
    rng = np.random.default_rng(0)
    batches = []
    for encoder, decoder in lengths:
        batch = {}
        if config.encoder is not None:
            batch[types.ENCODER_INPUT_TOKENS] = rng.integers(2, 96, (1, encoder))
            if config.encoder.num_token_types:
                batch[types.ENCODER_TOKEN_TYPES] = rng.integers(0, 2, (1, encoder))
        if config.decoder is not None:
            batch[types.DECODER_INPUT_TOKENS] = rng.integers(2, 96, (1, decoder))
        batches.append({key: value.astype(np.int32) for key, value in batch.items()})
    return batches


def pack(batches):
    """One row of several, with segment ids and positions."""
    packed = {key: np.concatenate([b[key] for b in batches], axis=1) for key in batches[0]}
    for stream in ("encoder", "decoder"):
        if f"{stream}_input_tokens" in packed:
            sizes = [b[f"{stream}_input_tokens"].shape[1] for b in batches]
            segments = np.repeat(np.arange(1, len(sizes) + 1), sizes)
            packed[f"{stream}_segment_ids"] = segments[None].astype(np.int32)
            positions = np.concatenate([np.arange(size) for size in sizes])
            packed[f"{stream}_positions"] = positions[None].astype(np.int32)
    return packed


@every_family
def test_a_packed_row_computes_what_its_segments_compute_alone(family):
    config = common.FAMILIES[family]
    model, params = common.build(config)
    alone = segments_alone(config)
    together = common.call(model, params, pack(alone))
    expected = [common.call(model, params, one) for one in alone]
    np.testing.assert_allclose(together, np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-4)


@every_family
def test_padding_changes_nothing(family):
    config = common.FAMILIES[family]
    model, params = common.build(config)
    batch = pack(segments_alone(config)[:1])
    # Behind the segment, tokens of segment 0: any tokens.
    padded = {}
    for key, value in batch.items():
        filler = 3 if key.endswith("_tokens") else 0
        padded[key] = np.pad(value, ((0, 0), (0, 4)), constant_values=filler)
    expected = common.call(model, params, batch)
    found = common.call(model, params, padded)[:, : expected.shape[1]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@every_family
def test_a_token_sees_exactly_what_it_should(family):
    """By gradients: 0.0 is no influence, whatever the size of the others."""
    config = common.FAMILIES[family]
    batch = pack(segments_alone(config))
    stream = "encoder" if config.decoder is None else "decoder"
    tokens = batch[f"{stream}_input_tokens"]
    size = tokens.size
    config = dataclasses.replace(config, vocab_size=size + 1, head=LMHead(), pair_head=None)
    model, params = common.build(config)
    batch = {k: np.full_like(v, size) if k.endswith("_tokens") else v for k, v in batch.items()}
    batch[f"{stream}_input_tokens"] = np.arange(size, dtype=np.int32)[None]
    place = 6

    def output(table):
        values = params | {"token_embedding": {"embedding": table}}
        return jnp.sum(jnp.sin(model.apply({"params": values}, batch)[0, place]))

    gradient = jax.jit(jax.grad(output))(params["token_embedding"]["embedding"])[:size]
    seen = np.flatnonzero(np.abs(gradient).sum(-1) > 0)
    own = np.flatnonzero(batch[f"{stream}_segment_ids"][0] == 2)
    np.testing.assert_array_equal(seen, own[own <= place] if stream == "decoder" else own)


@with_decoder
def test_cached_logits_are_the_uncached_ones_with_unequal_prompts(family):
    config = common.FAMILIES[family]
    model, params = common.build(config)
    prefill = jax.jit(lambda p, b: model.apply({"params": p}, b, 9, method="prefill"))
    extend = jax.jit(lambda p, t, c: model.apply({"params": p}, t, c, method="extend"))
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 96, (2, 9)).astype(np.int32)
    padding = (0, 3)  # of the prompts, on their left
    batch = {types.DECODER_INPUT_TOKENS: tokens[:, :6].copy()}
    segments = np.ones((2, 6), np.int32)
    for row, count in enumerate(padding):
        segments[row, :count] = 0
        batch[types.DECODER_INPUT_TOKENS][row, :count] = 1
    batch[types.DECODER_SEGMENT_IDS] = segments
    memory = {}
    if config.encoder is not None:
        memory[types.ENCODER_INPUT_TOKENS] = rng.integers(2, 96, (2, 5)).astype(np.int32)
        memory[types.ENCODER_SEGMENT_IDS] = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
    logits, cache = prefill(params, batch | memory)
    steps = [logits]
    for part in (tokens[:, 6:7], tokens[:, 7:9]):  # one token, then two
        logits, cache = extend(params, part, cache)
        steps.append(logits)
    cached = np.concatenate(steps, axis=1)
    for row, count in enumerate(padding):
        alone = {key: value[row : row + 1] for key, value in memory.items()}
        alone[types.DECODER_INPUT_TOKENS] = tokens[row : row + 1, count:]
        if memory:
            alone[types.DECODER_SEGMENT_IDS] = np.ones((1, 9 - count), np.int32)
        expected = common.call(model, params, alone)
        np.testing.assert_allclose(cached[row : row + 1, count:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bart", "neox"])
def test_unrolling_and_recomputing_change_nothing(family):
    config = common.with_stacks(common.FAMILIES[family], dropout=0.2)
    batch = pack(segments_alone(config))
    _, params = common.build(config)

    def gradient(config):
        model = transformer.Transformer(config)

        def loss(params):
            rngs = {"dropout": jax.random.key(7)}
            logits = model.apply({"params": params}, batch, deterministic=False, rngs=rngs)
            return jnp.mean(jnp.square(logits))

        return jax.jit(jax.value_and_grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradient(common.with_stacks(config, unroll=2, remat="dots")),
        gradient(config),
    )


def test_slots_are_asked_where_they_point_and_nowhere_else():
    config = dataclasses.replace(common.FAMILIES["bert"], pair_head=None)
    model, params = common.build(config)
    batch = pack(segments_alone(config))
    everywhere = common.call(model, params, batch)
    slots = np.array([[11, 0, 5]], np.int32)
    found = common.call(model, params, batch | {types.MASKED_POSITIONS: slots})
    np.testing.assert_allclose(found, everywhere[:, slots[0]], rtol=1e-5, atol=1e-5)


def test_the_first_slot_is_the_pairs():
    config = common.FAMILIES["bert"]
    model, params = common.build(config)
    batch = pack(segments_alone(config))
    states = common.call(model, params, batch, "states")
    slots = np.array([[5, 3, 9]], np.int32)  # the second segment begins at 5
    found = common.call(model, params, batch | {types.MASKED_POSITIONS: slots})
    head = params["pair_head"]
    hidden = jnp.tanh(states[0, 5] @ head["dense"]["kernel"] + head["dense"]["bias"])
    expected = hidden @ head["out"]["kernel"] + head["out"]["bias"]
    np.testing.assert_allclose(found[0, 0, :2], expected, rtol=1e-4, atol=1e-5)
    assert found[0, 0, 2:].max() < -1e8
    tokens = common.call(model, params, batch)
    np.testing.assert_allclose(found[0, 1:], tokens[0, slots[0, 1:]], rtol=1e-4, atol=1e-4)


def test_pooling_stays_in_the_slots_segment():
    config = dataclasses.replace(common.FAMILIES["bert"], pair_head=None, head=EmbeddingHead())
    model, params = common.build(config)
    batch = pack(segments_alone(config))
    states = common.call(model, params, batch, "states")
    slots = np.array([[2, 7]], np.int32)
    for pooling, expected in {
        "first": (states[0, 0], states[0, 5]),
        "last": (states[0, 4], states[0, 11]),
        "mean": (states[0, :5].mean(0), states[0, 5:].mean(0)),
    }.items():
        found = heads.pool(states, batch[types.ENCODER_SEGMENT_IDS], slots, pooling)
        np.testing.assert_allclose(found[0], np.stack(expected), rtol=1e-4, atol=1e-5)
    embedded = common.call(model, params, batch | {types.MASKED_POSITIONS: slots})
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=-1), 1.0, rtol=1e-5)
    alone = common.call(model, params, segments_alone(config)[0])
    np.testing.assert_allclose(alone[0, 0], embedded[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        (SequenceHead(num_labels=3), {"dense/kernel", "dense/bias", "out/kernel", "out/bias"}),
        (SequenceHead(num_labels=1, pooling="last", activation=None, bias=False), {"out/kernel"}),
        (TokenHead(num_labels=4), {"out/kernel", "out/bias"}),
    ],
    ids=["projected", "plain", "tokens"],
)
def test_heads_for_labels(head, shapes):
    config = dataclasses.replace(common.FAMILIES["gpt2"], head=head)
    model, params = common.build(config)
    name = "sequence_head" if isinstance(head, SequenceHead) else "token_head"
    assert set(trees.flatten(params[name])) == shapes
    logits = common.call(model, params, segments_alone(config)[0])
    assert logits.shape == (1, 1 if isinstance(head, SequenceHead) else 4, head.num_labels)


def test_sinusoids_move_tokens_and_rows_may_be_of_any_length():
    config = common.with_stacks(common.FAMILIES["bart"], positions=Sinusoidal())
    model, params = common.build(config)
    batch = segments_alone(config, ((40, 36),))[0]
    swapped = batch | {types.ENCODER_INPUT_TOKENS: batch[types.ENCODER_INPUT_TOKENS][:, ::-1]}
    logits = common.call(model, params, batch)
    assert np.abs(logits - common.call(model, params, swapped)).max() > 1e-2
    assert "position_embedding" not in params["encoder"]


def test_dynamic_positions_do_not_depend_on_what_a_text_is_packed_with():
    rotary = Rotary(scaling=DynamicScaling(factor=4.0, original_length=8))
    config = common.with_stacks(common.FAMILIES["llama"], positions=rotary)
    model, params = common.build(config)
    batches = segments_alone(config, ((0, 6), (0, 20), (0, 9)))
    packed = common.call(model, params, pack(batches))
    alone = np.concatenate([common.call(model, params, batch) for batch in batches], axis=1)
    np.testing.assert_allclose(packed, alone, rtol=1e-4, atol=1e-5)


def test_a_row_longer_than_the_learned_positions_is_an_error():
    config = common.FAMILIES["gpt2"]
    model, params = common.build(config)
    batch = segments_alone(config, ((0, 33),))[0]
    with pytest.raises(types.InputError, match="33 tokens is longer than the 32 positions"):
        model.apply({"params": params}, batch)
    short = {types.DECODER_INPUT_TOKENS: batch[types.DECODER_INPUT_TOKENS][:, :4]}
    with pytest.raises(types.InputError, match="33 tokens"):
        model.apply({"params": params}, short, 33, method="prefill")


def test_fresh_gpt2_weights_have_its_scales():
    stack = dataclasses.replace(common.FAMILIES["gpt2"].decoder, num_heads=8, mlp_dim=256)
    config = ModelConfig(
        vocab_size=1000,
        embed_dim=128,
        decoder=stack,
        head=LMHead(tied=True),
        initializer_stddev=0.02,
    )
    model = transformer.Transformer(config)
    params = trees.flatten(jax.jit(lambda key: transformer.init(model, key))(jax.random.key(0)))
    for path, stddev in {
        "token_embedding/embedding": 0.02,
        "decoder/layers/self_attention/query/kernel": 0.02,
        "decoder/layers/self_attention/out/kernel": 0.01,  # 0.02 / sqrt(2 * 2 layers)
        "decoder/layers/mlp/wo/kernel": 0.01,
    }.items():
        np.testing.assert_allclose(np.std(params[path]), stddev, rtol=0.03, err_msg=path)
    assert not params["decoder/layers/mlp/wo/bias"].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"biases": ("wi_0",)}, "biases has 'wi_0'; known"),
        ({"norm": "batch"}, "norm has 'batch'"),
        ({"residual": "mid"}, "residual has 'mid'"),
        ({"positions": Rotary(fraction=0.4)}, "3 dimensions: expected an even number"),
    ],
)
def test_a_bad_stack_says_what_was_expected(fields, message):
    with pytest.raises(types.InputError, match=message):
        dataclasses.replace(common.STACK, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: LMHead(scaled=True), "goes with tied=True"),
        (lambda: LMHead(transform="swish"), "transform='swish'; known"),
        (lambda: SequenceHead(num_labels=0), "num_labels=0"),
        (lambda: EmbeddingHead(pooling="max"), "pooling='max'"),
        (lambda: Learned(max_length=0), "max_length=0"),
        (lambda: Rotary(base=1.0), "Rotary.base=1.0: expected above 1"),
        (lambda: LinearScaling(factor=0.0), "factor=0.0.*expected a factor above 0"),
        (lambda: DynamicScaling(factor=2.0, original_length=0), "an original_length of at least 1"),
        (lambda: Llama3Scaling(low_frequency_factor=4.0), "low_frequency_factor=4.0 and"),
        (
            lambda: YarnScaling(factor=2.0, original_length=8, beta_slow=32.0),
            "beta_slow=32.0 and beta_fast=32.0",
        ),
        (
            lambda: dataclasses.replace(common.T5, pair_head=SequenceHead(num_labels=2)),
            "an encoder alone",
        ),
        (
            lambda: common.with_stacks(common.T5, residual="parallel"),
            "no place for cross-attention",
        ),
        (lambda: common.with_stacks(common.GPT, num_token_types=2), "only an encoder"),
    ],
)
def test_bad_choices_say_what_was_expected(change, message):
    with pytest.raises(types.InputError, match=message):
        change()
