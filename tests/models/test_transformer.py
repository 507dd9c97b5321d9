"""Properties of the one Transformer: causality, isolation, scan = unrolled, remat = none."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees, types
from t5x_lite.kernels.plain import Visibility
from t5x_lite.models import flops, transformer
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead
from t5x_lite.models.config_positions import RelativeBias
from t5x_lite.models.positions import relative_bucket
from t5x_lite.models.stack import Layer
from tests import common


def influence(config, batch, stream, row, place):
    """Whether the token at each place of `stream` moves the logits at (row, place): bool [b, l].

    Every place gets a token id of its own, so that the gradient of its row of the embedding is the
    gradient of that place's input. Exact: a gradient of 0.0 is no influence, anything else is.
    """
    size = batch[stream].size
    config = dataclasses.replace(config, vocab_size=size + 1, head=LMHead())
    batch = {k: np.full_like(v, size) if k.endswith("_tokens") else v for k, v in batch.items()}
    batch[stream] = np.arange(size, dtype=np.int32).reshape(batch[stream].shape)
    gradient = _gradient(config)(common.build(config)[1], batch, row, place)
    return np.asarray(jnp.abs(gradient[:size]).sum(-1) > 0).reshape(batch[stream].shape)


@functools.cache
def _gradient(config):
    """Of logits at a row and place, by the embedding: compiled once for every place."""
    model = transformer.Transformer(config)

    def output(table, params, batch, row, place):
        values = params | {"token_embedding": {"embedding": table}}
        logits = model.apply({"params": values}, batch)
        return jnp.sum(jnp.sin(logits[row, place]))

    def gradient(params, batch, row, place):
        return jax.grad(output)(params["token_embedding"]["embedding"], params, batch, row, place)

    return jax.jit(gradient)


@pytest.mark.parametrize("config", [common.T5, common.GPT], ids=["t5", "gpt"])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_decoder_sees_exactly_its_own_segment_up_to_itself(config, place):
    batch = common.random_batch(config)
    segments = batch[types.DECODER_SEGMENT_IDS]
    seen = influence(config, batch, types.DECODER_INPUT_TOKENS, 1, place)
    expected = np.zeros_like(seen)
    expected[1, : place + 1] = (segments[1] == segments[1, place])[: place + 1]
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_decoder_sees_exactly_its_own_segment_of_the_encoder(place):
    batch = common.random_batch(common.T5)
    segment = batch[types.DECODER_SEGMENT_IDS][2, place]
    seen = influence(common.T5, batch, types.ENCODER_INPUT_TOKENS, 2, place)
    expected = np.zeros_like(seen)
    expected[2] = batch[types.ENCODER_SEGMENT_IDS][2] == segment
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("place", [1, 8])
def test_encoder_sees_its_own_segment_in_both_directions(place):
    batch = common.random_batch(common.BERT)
    segments = batch[types.ENCODER_SEGMENT_IDS]
    seen = influence(common.BERT, batch, types.ENCODER_INPUT_TOKENS, 0, place)
    expected = np.zeros_like(seen)
    expected[0] = segments[0] == segments[0, place]
    np.testing.assert_array_equal(seen, expected)


def test_prefix_is_seen_from_everywhere_and_the_rest_causally():
    batch = common.random_batch(common.GPT)
    batch[types.DECODER_SEGMENT_IDS][:] = 1
    batch[types.DECODER_PREFIX] = np.zeros_like(batch[types.DECODER_SEGMENT_IDS])
    batch[types.DECODER_PREFIX][:, :4] = 1
    for place in (1, 6):
        seen = influence(common.GPT, batch, types.DECODER_INPUT_TOKENS, 0, place)
        np.testing.assert_array_equal(np.flatnonzero(seen[0]), np.arange(max(4, place + 1)))


def test_a_packed_row_computes_what_its_segments_compute_alone():
    model, params = common.build(common.T5)
    rng = np.random.default_rng(0)
    parts = [
        {
            types.ENCODER_INPUT_TOKENS: rng.integers(2, 96, (1, e)).astype(np.int32),
            types.DECODER_INPUT_TOKENS: rng.integers(2, 96, (1, d)).astype(np.int32),
        }
        for e, d in ((5, 4), (7, 6))
    ]
    packed = {key: np.concatenate([p[key] for p in parts], axis=1) for key in parts[0]}
    packed[types.ENCODER_SEGMENT_IDS] = np.repeat([[1, 2]], (5, 7), axis=1).astype(np.int32)
    packed[types.DECODER_SEGMENT_IDS] = np.repeat([[1, 2]], (4, 6), axis=1).astype(np.int32)
    together = common.call(model, params, packed)
    alone = [common.call(model, params, part) for part in parts]
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), rtol=1e-4, atol=1e-5)


@functools.cache
def value_and_gradient(config):
    model, params = common.build(config)
    batch = common.random_batch(config)

    def loss(params):
        rngs = {"dropout": jax.random.key(7)}
        logits = model.apply({"params": params}, batch, deterministic=False, rngs=rngs)
        return jnp.mean(jnp.square(logits))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "change",
    [
        {"unroll": 2},
        pytest.param({"unroll": 4}, marks=pytest.mark.slow),
        {"remat": "full"},
        {"remat": "dots"},
    ],
    ids=str,
)
def test_unrolling_and_recomputing_change_nothing(change):
    config = common.with_stacks(common.T5, num_layers=4, dropout=0.2)
    expected = value_and_gradient(config)
    found = value_and_gradient(common.with_stacks(config, **change))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_the_loop_over_layers_is_a_loop_over_layers():
    """The scanned stack against its layers applied one by one in Python."""
    config = common.with_stacks(common.BERT, num_layers=3)
    batch = common.random_batch(config)
    model, params = common.build(config)
    encoder, stack = params["encoder"], config.encoder
    x = params["token_embedding"]["embedding"][batch[types.ENCODER_INPUT_TOKENS]]
    segments = batch[types.ENCODER_SEGMENT_IDS]
    places = jnp.arange(x.shape[1])
    bucket = relative_bucket(
        places[None, :] - places[:, None], bidirectional=True, num_buckets=32, max_distance=128
    )
    bias = jnp.moveaxis(encoder["relative_bias"]["embedding"][bucket], -1, 0)[None]
    layer = Layer(stack, has_memory=False, param_dtype=jnp.float32, stddev=None)

    @jax.jit
    def one(weights, x, bias):
        visibility = Visibility(segments, segments)
        return layer.apply(
            {"params": weights}, x, None, None, visibility, Visibility(), bias, None, None, True
        )[0]

    for index in range(3):
        x = one(jax.tree.map(lambda leaf, index=index: leaf[index], encoder["layers"]), x, bias)
    scale = encoder["final_norm"]["scale"]
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None, None]
    found = common.call(model, params, batch, "encode")
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_dropout_drops_only_when_asked_and_by_its_key():
    config = common.with_stacks(common.T5, dropout=0.5)
    model, params = common.build(config)
    batch = common.random_batch(config)

    @jax.jit
    def run(seed):
        return model.apply(
            {"params": params}, batch, deterministic=False, rngs={"dropout": jax.random.key(seed)}
        )

    still = common.call(model, params, batch)
    np.testing.assert_array_equal(run(1), run(1))
    assert np.abs(run(1) - run(2)).max() > 1e-2
    assert np.abs(run(1) - still).max() > 1e-2


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
    model = transformer.Transformer(common.T5)
    params = jax.jit(lambda key: transformer.init(model, key))(jax.random.key(0))
    half = transformer.Transformer(dataclasses.replace(common.T5, dtype="bfloat16"))
    batch = common.random_batch(common.T5)
    expected = common.call(model, params, batch)
    found = common.call(half, params, batch)
    assert found.dtype == jnp.bfloat16
    error = jnp.abs(found.astype(jnp.float32) - expected)
    assert error.mean() < 0.03 * jnp.abs(expected).mean()


def test_parameter_paths_shapes_and_axes_are_the_contract():
    model = transformer.Transformer(common.T5)
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    names = trees.flatten(transformer.axes(model), is_leaf=lambda leaf: isinstance(leaf, tuple))
    flat = {path: (leaf.shape, names[path]) for path, leaf in trees.flatten(shapes).items()}
    assert flat["encoder/layers/self_attention/query/kernel"] == (
        (2, 32, 4, 8),
        ("layers", "embed", "heads", "kv"),
    )
    assert flat["decoder/layers/cross_attention/out/kernel"] == (
        (2, 4, 8, 32),
        ("layers", "heads", "kv", "embed"),
    )
    assert flat["decoder/layers/mlp/wi_1/kernel"] == ((2, 32, 64), ("layers", "embed", "mlp"))
    assert flat["encoder/relative_bias/embedding"] == ((32, 4), ("buckets", "heads"))
    assert flat["token_embedding/embedding"] == ((96, 32), ("vocab", "embed"))
    assert flat["lm_head/kernel"] == ((32, 96), ("embed", "vocab"))
    for path, (shape, axes) in flat.items():
        assert len(shape) == len(axes), path


def test_t5_1_1_small_has_the_published_number_of_parameters():
    """76,961,152: google/t5-v1_1-small, whose embedding and head are not tied."""
    stack = StackConfig(num_layers=8, num_heads=6, head_dim=64, mlp_dim=1024)
    config = ModelConfig(vocab_size=32128, embed_dim=512, encoder=stack, decoder=stack)
    model = transformer.Transformer(config)
    assert trees.count(jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))) == (
        76_961_152
    )


def test_initial_scales_are_t5s():
    config = ModelConfig(
        vocab_size=1000,
        embed_dim=256,
        encoder=StackConfig(num_layers=2, num_heads=4, head_dim=64, mlp_dim=512),
    )
    model = transformer.Transformer(config)
    params = trees.flatten(jax.jit(lambda key: transformer.init(model, key))(jax.random.key(0)))
    expected = {
        "token_embedding/embedding": 1.0,
        "encoder/layers/self_attention/query/kernel": (256 * 64) ** -0.5,
        "encoder/layers/self_attention/key/kernel": 256**-0.5,
        "encoder/layers/self_attention/out/kernel": 256**-0.5,
        "encoder/layers/mlp/wi_0/kernel": 256**-0.5,
        "encoder/layers/mlp/wo/kernel": 512**-0.5,
        "lm_head/kernel": 256**-0.5,
    }
    for path, std in expected.items():
        np.testing.assert_allclose(np.std(params[path]), std, rtol=0.03, err_msg=path)


def test_tied_logits_are_scaled_rows_of_the_embedding():
    model, params = common.build(common.BERT)
    batch = common.random_batch(common.BERT)
    hidden = common.call(model, params, batch, "encode")
    table = params["token_embedding"]["embedding"]
    expected = jnp.einsum("ble,ve->blv", hidden, table) / np.sqrt(32)
    np.testing.assert_allclose(common.call(model, params, batch), expected, rtol=1e-4, atol=1e-5)


def reference_bucket(distance, bidirectional, num_buckets, max_distance):
    """T5's bucket of one distance, by the description in the paper and plain Python floats."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(0, -distance)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    share = np.log(np.float32(distance / exact)) / np.log(max_distance / exact)
    return offset + min(num_buckets - 1, exact + int(share * (num_buckets - exact)))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (16, 64)])
def test_relative_buckets(bidirectional, buckets, most):
    distances = np.arange(-300, 301)
    found = relative_bucket(
        jnp.asarray(distances),
        bidirectional=bidirectional,
        num_buckets=buckets,
        max_distance=most,
    )
    expected = [reference_bucket(d, bidirectional, buckets, most) for d in distances.tolist()]
    np.testing.assert_array_equal(found, expected)


def test_linen_accepts_a_node_whose_first_leaf_has_the_declared_shape():
    """What PEFT leaves stand on: shapes are checked leaf by leaf, and extra leaves are ignored."""

    class Reads(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("kernel", nn.initializers.ones, (2, 3))

    node = {"w": jnp.ones((2, 3)), "x": jnp.ones(5)}
    assert Reads().apply({"params": {"kernel": node}})["x"].shape == (5,)
    with pytest.raises(Exception, match="shape"):
        Reads().apply({"params": {"kernel": {"w": jnp.ones((4, 3))}}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"mlp_activations": ("swish",)}, "'swish'; known"),
        ({"dropout": 1.0}, "below 1"),
        ({"remat": "some"}, "remat has 'some'; known"),
    ],
)
def test_a_bad_stack_says_what_was_expected(fields, message):
    good = {"num_layers": 1, "num_heads": 2, "head_dim": 4, "mlp_dim": 8}
    with pytest.raises(types.InputError, match=message):
        StackConfig(**(good | fields))


def test_bad_models_and_batches_say_what_was_expected():
    with pytest.raises(types.InputError, match="an encoder, a decoder, or both"):
        ModelConfig(vocab_size=8, embed_dim=8)
    with pytest.raises(types.InputError, match="greater than half"):
        RelativeBias(num_buckets=32, max_distance=16)
    model, params = common.build(common.T5)
    batch = common.random_batch(common.BERT)
    with pytest.raises(types.InputError, match="decoder_input_tokens"):
        model.apply({"params": params}, batch)


@pytest.mark.parametrize("config", [common.T5, common.GPT, common.BERT], ids=["t5", "gpt", "bert"])
def test_counted_flops_agree_with_the_compiler(config):
    """XLA counts elementwise work too, and a loop's body once: unroll, and allow it a little."""
    config = common.with_stacks(
        dataclasses.replace(config, embed_dim=128, vocab_size=512),
        num_heads=4, head_dim=32, mlp_dim=256, unroll=2,
    )  # fmt: skip
    batch = common.random_batch(config, rows=2, encoder=64, decoder=64)
    model, params = common.build(config)
    compiled = jax.jit(lambda p, b: model.apply({"params": p}, b)).lower(params, batch).compile()
    cost = compiled.cost_analysis()
    measured = (cost[0] if isinstance(cost, list) else cost)["flops"]
    counted = flops.train_flops(config, batch) / 3
    assert counted <= measured < 1.1 * counted
