"""What holds for every way of fine-tuning: a row of `METHODS` is all that a new one needs.

Each method is tried on a BERT, a GPT and a T5, with layers scanned and not: one of the six in
every run, the others with the slow tests. What takes a compiled step is tried on several methods
at once in every run, and on each by itself with the slow tests.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite import trees, types
from t5x_lite.data.layouts import put_ahead
from t5x_lite.models import prompted, transformer
from t5x_lite.peft.bottleneck import Bottleneck
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.ia3 import IA3
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.peft.prefix import PrefixTuning
from t5x_lite.peft.prompt import PromptTuning
from t5x_lite.peft.quantise import Quantise
from t5x_lite.peft.transform import BitFit, Freeze, Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train import run
from t5x_lite.train.checkpoint import Checkpointer
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from tests import common
from tests.train import harness


@dataclass(frozen=True)
class Method:
    transform: Any
    starts_as_base: bool = True
    merges: bool = True
    rounding: float = 2e-6  # how near it starts, relative to the largest logit


EVERYWHERE = (".*/layers/.*/(query|key|value|out|wi_0|wo)/kernel", "token_embedding/embedding")
METHODS = {
    "full": Method(Full()),
    "freeze": Method(Freeze((".*/(query|wo)/kernel", ".*_norm/scale"))),
    "bitfit": Method(BitFit()),
    "lora": Method(LoRA(rank=4, targets=EVERYWHERE)),
    "rules": Method(
        LoRA(
            targets=EVERYWHERE,
            rank_rules=((".*/wo/kernel", 2), (".*/(query|key)/kernel", 3)),
            alpha_rules=((".*/key/kernel", 5.0),),
        )
    ),
    "rslora": Method(LoRA(rank=4, rank_stabilised=True, targets=EVERYWHERE)),
    "pissa": Method(LoRA(rank=4, init="pissa", targets=EVERYWHERE), rounding=2e-5),
    "dora": Method(DoRA(rank=4, targets=EVERYWHERE), rounding=2e-5),
    "ia3": Method(IA3()),
    "bottleneck": Method(Bottleneck(size=4), merges=False),
    "prefix": Method(PrefixTuning(length=3, stddev=1.0), starts_as_base=False, merges=False),
    "prompt": Method(PromptTuning(length=3), starts_as_base=False, merges=False),
    "composed": Method(
        Compose((IA3(), LoRA(rank=2, targets=(".*/(query|value)/kernel",)), BitFit()))
    ),
}
FAMILIES = {"bert": common.FAMILIES["bert"], "gpt2": common.FAMILIES["gpt2"], "t5": common.T5}
# Several at once, for steps: no two adapt a weight in a way that hides another.
TOGETHER = Compose(
    (
        PromptTuning(length=2),
        PrefixTuning(length=3),
        Bottleneck(size=4, targets=(".*/wo/kernel",)),
        IA3(),
        DoRA(rank=2, targets=(".*/(query|value|out)/kernel", "token_embedding/embedding")),
        BitFit(),
    )
)


def cases(names):
    """Every family, scanned and not, for each; all but one in turn are slow."""
    shapes = list(itertools.product(FAMILIES, (1, 2)))
    for index, name in enumerate(names):
        for number, (family, unroll) in enumerate(shapes):
            # 5 and 6 have no common divisor: all six shapes get their turn.
            marks = () if number == 5 * index % 6 else pytest.mark.slow
            shape = "scanned" if unroll == 1 else "unrolled"
            yield pytest.param(name, family, unroll, marks=marks, id=f"{name}-{family}-{shape}")


def config_of(family, unroll):
    return common.with_stacks(FAMILIES[family], unroll=unroll)


@functools.cache
def base_of(family):
    return harness.host_params(FAMILIES[family])


def batch_of(config, rows=4):
    """Rows that every head answers, the last of them padded to the end."""
    batch = common.random_batch(config, rows=rows)
    if config.decoder is None:
        segments, tokens = batch[types.ENCODER_SEGMENT_IDS], batch[types.ENCODER_INPUT_TOKENS]
        places = np.tile(np.arange(3, dtype=np.int32), (rows, 1))
        batch[types.MASKED_POSITIONS] = places
        batch[types.MASKED_TARGET_TOKENS] = np.take_along_axis(tokens, places, axis=1)
        batch[types.MASKED_TARGET_TOKENS][:, 0] %= 2  # the pair's label
        seen = np.take_along_axis(segments, places, axis=1) > 0
        batch[types.MASKED_LOSS_WEIGHTS] = seen.astype(np.float32)
    return batch


@functools.cache
def logits_of(family, unroll):
    """`params -> logits`, compiled once for each structure of parameters."""
    config = config_of(family, unroll)
    batch = batch_of(config)

    def apply(params):
        model = prompted.PromptedTransformer(config, prompt=prompted.prompt_length(params))
        return model.apply({"params": params}, batch)

    jitted, compiled = jax.jit(apply), {}

    def logits(params):
        key = jax.tree.structure(params)
        if key not in compiled:
            compiled[key] = harness.compile_quickly(jitted.lower(params))
        return np.asarray(compiled[key](params))[..., :2]  # a pair's logits are padded

    return logits


def split(transform, config, base):
    names = transformer.axes(transformer.Transformer(config))
    jitted = jax.jit(lambda base: transform.split(base, names, jax.random.key(5)))
    return jax.device_get(harness.compile_quickly(jitted.lower(base))(base))


def moved(trainable):
    """After some training: nowhere zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), trainable)


@pytest.mark.parametrize(("name", "family", "unroll"), cases(METHODS))
def test_starts_as_its_base_and_merges_to_what_it_applies(name, family, unroll):
    method = METHODS[name]
    transform, config, base = method.transform, config_of(family, unroll), base_of(family)
    logits = logits_of(family, unroll)
    trainable, frozen = split(transform, config, base)
    expected = logits(base)
    if method.starts_as_base:
        found = logits(transform.apply(trainable, frozen))
        tolerance = method.rounding * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    tuned = moved(trainable)
    applied = logits(transform.apply(tuned, frozen))
    scale = np.abs(applied).max()
    assert np.abs(applied - expected).max() > 0.01 * scale  # it does something
    if not method.merges:
        with pytest.raises(types.InputError, match="can't be merged"):
            transform.merge(tuned, frozen)
        return
    merged = jax.device_get(jax.jit(transform.merge)(tuned, frozen))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(merged) == shapes(base)
    np.testing.assert_allclose(logits(merged) / scale, applied / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_has_its_names_axes_and_bytes(name, family):
    transform = METHODS[name].transform
    session = Session(FAMILIES[family], transform, Partitioner(data=2, fsdp=2, model=2))
    trainable, frozen = session.split_shapes
    flat, base = trees.flatten(trainable), trees.flatten(session.base_shapes)
    added = {path: shape for path, shape in flat.items() if path not in base}
    leaves = {path.rsplit("/", 1)[-1] for path in added}
    if isinstance(transform, Compose):
        assert leaves == {leaf for part in transform.transforms for leaf in part.leaves}
    else:
        assert leaves == set(transform.leaves)
    assert all(path.rsplit("/", 1)[0] in base for path in added)
    assert {*flat, *trees.flatten(frozen)} == {*base, *added}
    names = trees.flatten(session.split_names[0], is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert names.keys() == flat.keys()
    assert all(len(names[path]) == len(flat[path].shape) for path in flat)
    # AdamW has two moments of each trained number, and its count.
    optimizer = session.optimizer(AdamW(0.01))
    state = session.state_shapes(optimizer).opt_state
    count = trees.nbytes([leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0])
    assert trees.nbytes(state) == 2 * trees.nbytes(trainable) + count
    assert 0 < count <= 8


def behind_prompt(batch, ids):
    """What training's rows have, for a row's first text."""
    if not ids:
        return batch
    rows = [
        put_ahead(dict(zip(batch, values, strict=True)), ids)
        for values in zip(*batch.values(), strict=True)
    ]
    made = {key: np.stack([row[key] for row in rows]) for key in batch}
    first = types.ENCODER_SEGMENT_IDS if types.ENCODER_SEGMENT_IDS in batch else None
    made[first or types.DECODER_SEGMENT_IDS][:, : len(ids)] = 1
    return made


def trained(transform, config, base, partitioner, batch, steps):
    """`(start, frozen, state after the steps, losses)`."""
    session = Session(config, transform, partitioner)
    optimizer = session.optimizer(AdamW(0.01))
    state, frozen = harness.start(session, optimizer, base)
    start = jax.tree.map(np.array, jax.device_get(state.params))
    batch = behind_prompt(batch, session.prompt_ids)
    placed = session.partitioner.put_batch(batch, len(next(iter(batch.values()))))
    step = harness.compile_step(session, optimizer, state, frozen, placed)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, placed)
        losses.append(float(metrics["loss"]) / float(metrics["weight"]))
    return start, frozen, state, losses


def check_steps(transform, family, unroll, tmp_path):
    """Ten steps move what is trained, and nothing else, on one device and on eight alike."""
    config, base = config_of(family, unroll), base_of(family)
    batch = batch_of(config, rows=8)
    start, frozen, state, losses = trained(transform, config, base, harness.one_device(), batch, 10)
    assert losses[-1] < losses[0]
    flat_base = trees.flatten(base)
    if not any(part.init == "pissa" for part in _loras(transform)):  # which takes from the base
        for path, leaf in trees.flatten(jax.device_get(frozen)).items():
            assert leaf.tobytes() == flat_base[path].tobytes(), path
    end = jax.device_get(state.params)
    unmoved = [
        path
        for path, leaf in trees.flatten(end).items()
        if np.abs(leaf - trees.flatten(start)[path]).max() < 1e-4
    ]
    # Keys' biases cancel in the softmax, and what the batch has none of stays.
    assert all("key/bias" in path or "token_type" in path for path in unmoved), unmoved

    _, _, _, eight = trained(
        transform, config, base, Partitioner(data=2, fsdp=2, model=2), batch, 3
    )
    np.testing.assert_allclose(eight, losses[:3], rtol=1e-5)

    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, state.params, state.opt_state, {})
    checkpointer.wait()
    stored = trees.flatten(checkpointer._manager.item_metadata(1)["params"].tree)
    assert stored.keys() == trees.flatten(end).keys()
    restored, moments = checkpointer.restore(1, state.params, state.opt_state)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, restored, end)
    jax.tree.map(np.testing.assert_array_equal, moments, jax.device_get(state.opt_state))


def _loras(transform):
    parts = transform.transforms if isinstance(transform, Compose) else (transform,)
    return [part for part in parts if isinstance(part, LoRA)]


@pytest.mark.parametrize(
    ("family", "unroll"),
    [pytest.param("bert", 1, marks=pytest.mark.slow), ("gpt2", 2), ("t5", 1)],
)
def test_ten_steps_of_several_at_once(family, unroll, tmp_path):
    check_steps(TOGETHER, family, unroll, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family", "unroll"), itertools.product(METHODS, FAMILIES, (1, 2)))
def test_ten_steps_of_each(name, family, unroll, tmp_path):
    check_steps(METHODS[name].transform, family, unroll, tmp_path)


def test_every_public_method_has_a_row():
    from t5x_lite import registry
    from t5x_lite.peft.transform import Transform

    public = {item for item in registry.CONFIGURABLES if _is_transform(item, Transform)}
    tried = {type(method.transform) for method in METHODS.values()}
    tried.add(Quantise)  # trains nothing: test_quantise_training
    assert public == tried
    assert public <= {*run.CLASSES}  # or a run could not be opened again


def _is_transform(item, kind):
    return isinstance(item, type) and issubclass(item, kind)
