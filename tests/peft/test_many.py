"""Many adapters in one batch: every row as if its own adapter were alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.decode import sampling
from t5x_lite.decode.generate import generate
from t5x_lite.models import transformer, weights
from t5x_lite.models.transformer import for_decoding
from t5x_lite.peft import many
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.types import InputError
from tests import common
from tests.train import harness

KERNELS = ".*/(value|out)/kernel"
ADAPTERS = (
    LoRA(rank=2, alpha=6.0, targets=(KERNELS, "token_embedding/embedding")),
    LoRA(rank=3, alpha=3.0, targets=("decoder/.*/(key|wo)/kernel",)),
    LoRA(rank=1, rank_stabilised=True, targets=(KERNELS, ".*/wo/kernel")),
)
IDS = np.array([2, -1, 0, 1, 2], np.int32)


def shapes_of(transform, model, base):
    split = functools.partial(transform.split, base, transformer.axes(model))
    return jax.eval_shape(split, jax.random.key(0))[0]


@functools.cache
def adapted(family):
    """`(model, base, its parameters with each adapter, the same merged)`."""
    config = common.FAMILIES[family]
    model, base = transformer.Transformer(config), harness.host_params(config)
    base = jax.tree.map(jnp.asarray, base)
    applied, merged = [], []
    rng = np.random.default_rng(0)
    for lora in ADAPTERS:
        shapes = shapes_of(lora, model, base)
        tree = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype("f4"), shapes)
        applied.append(lora.apply(tree, base))
        merge = jax.jit(lora.merge).lower(tree, base)
        merged.append(harness.compile_quickly(merge)(tree, base))
    return model, base, applied, merged


def compiled(function, params):
    return harness.compile_quickly(jax.jit(function).lower(params))


@pytest.mark.parametrize("family", ["t5_1_0", "gpt2"])
def test_a_batch_of_mixed_ids_is_each_row_through_its_own_adapter(family):
    model, base, applied, merged = adapted(family)
    batch = common.random_batch(model.config, rows=len(IDS))
    params = many.together(base, applied, IDS)
    logits = lambda params: model.apply({"params": params}, batch)
    found = compiled(logits, params)(params)
    of_one = compiled(logits, base)
    alone = [of_one(params) for params in (*merged, base)]  # the last: -1
    scale = np.abs(found).max()
    for row, number in enumerate(IDS):
        np.testing.assert_allclose(found[row] / scale, alone[number][row] / scale, 1e-5, 1e-5)
        for other in {-1, 0, 1, 2} - {number}:  # and no other's
            assert np.abs(found[row] - alone[other][row]).max() > 1e-3 * scale


def test_beams_are_of_their_rows_adapter():
    model, base, applied, merged = adapted("gpt2")
    prompts = np.arange(2, 2 + 3 * len(IDS), dtype=np.int32).reshape(len(IDS), 3)
    params = many.together(base, applied, IDS)

    def write(params):
        batch = {"decoder_input_tokens": prompts}
        how = {"strategy": sampling.BeamSearch(beams=2), "max_tokens": 4}
        return generate(model, params, batch, **how, eos_id=1, pad_id=0)

    found, of_one = compiled(write, params)(params), compiled(write, base)
    alone = [of_one(params) for params in (*merged, base)]
    for row, number in enumerate(IDS):
        np.testing.assert_array_equal(found[row], alone[number][row])
    assert len({np.asarray(texts).tobytes() for texts in alone}) > 1


def test_ids_are_exchanged_in_stacks_and_apart_without_touching_a_weight():
    _, base, others, _ = adapted("gpt2")
    params = many.together(base, others, IDS)
    assert many.count(params) == 3
    assert many.count(base) == 0
    for tree, shape in ((params, (2, 4)), (for_decoding(params), (4,))):
        chosen = many.select(tree, jnp.array([0, 1, 2, 1]))
        layers = chosen["decoder"]["layers"]
        node = layers.get("0", layers)["self_attention"]["value"]["kernel"]
        assert node.ids.shape == shape
        old, new = ({id(leaf) for leaf in jax.tree.leaves(t)} for t in (tree, chosen))
        nodes = jax.tree.leaves(chosen, is_leaf=weights.is_node)
        assert len(new - old) <= sum(isinstance(node, many.ManyLowRank) for node in nodes)
    leaves = {id(leaf) for leaf in jax.tree.leaves(params)}
    assert {id(leaf) for leaf in jax.tree.leaves(base)} <= leaves


def test_adapters_that_cannot_share_a_batch_are_named():
    model, base, others, _ = adapted("gpt2")
    dora = DoRA(rank=2)
    tree = shapes_of(dora, model, base)
    with pytest.raises(InputError, match=r"adapter 1 can't share .* 'decoder/layers/"):
        many.together(base, [others[0], dora.apply(tree, base)], IDS)
    copy = jax.tree.map(np.array, base)
    with pytest.raises(InputError, match="adapter 0 can't share a batch: it makes of"):
        many.together(copy, [others[0]], IDS)
    with pytest.raises(InputError, match="adapter 0 can't share a batch"):
        many.together(base, [{}], IDS)
    places = LoRA(rank=2, targets=(".*/position_embedding/embedding",))
    tree = shapes_of(places, model, base)
    with pytest.raises(InputError, match="which all rows share; train one without it"):
        many.together(base, [places.apply(tree, base)], IDS)
