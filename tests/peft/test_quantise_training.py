"""QLoRA in the training step: adapters learn, codes stay, and no weight is ever whole."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.models import transformer
from t5x_lite.peft import quantised
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.quantise import Quantise
from t5x_lite.sharding import Partitioner
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss
from tests import common
from tests.train import harness

TARGETS = (".*/(self_attention|cross_attention|mlp)/[^/]+/kernel", "token_embedding/embedding")
LORA = LoRA(rank=2, targets=(".*/(query|value|out|wi_0)/kernel", "token_embedding/embedding"))
NF4 = Compose((LORA, Quantise(targets=TARGETS, block=8, double_quantisation=True)))
INT8 = Compose(
    (
        LoRA(rank=2, targets=(".*/(query|value|out)/kernel",)),
        Quantise("int8", targets=TARGETS),
    )
)
GPT = common.FAMILIES["gpt2"]


@functools.cache
def trained(config, stored, transform, eight, steps):
    """`(frozen before, frozen after, losses)`, from parameters as `stored` has them."""
    partitioner = Partitioner(data=2, fsdp=2, model=2) if eight else harness.one_device()
    session = Session(config, transform, partitioner)
    optimizer = session.optimizer(AdamW(0.01))
    state, frozen = harness.start(session, optimizer, harness.host_params(stored))
    before = jax.device_get(frozen)
    batch = session.partitioner.put_batch(common.random_batch(config, rows=8), 8)
    step = harness.compile_step(session, optimizer, state, frozen, batch)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"] / metrics["weight"]))
    return before, jax.device_get(frozen), losses


def test_ten_steps_move_no_code_and_are_the_same_on_eight_devices(monkeypatch):
    monkeypatch.setattr(quantised, "TILE", 1024)  # two tiles or so: devices talk in each
    before, after, losses = trained(GPT, GPT, NF4, False, 10)
    assert losses[-1] < 0.9 * losses[0]
    flat = trees.flatten(after)
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(t) for t in ("uint8", "float32")}
    for path, leaf in trees.flatten(before).items():
        assert leaf.tobytes() == flat[path].tobytes(), path
    _, _, eight = trained(GPT, GPT, NF4, True, 3)
    np.testing.assert_allclose(eight, losses[:3], rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"unroll": 2}, pytest.param({"remat": "dots"}, marks=pytest.mark.slow)],
    ids=["unrolled", "dots"],
)
def test_scanned_is_unrolled_is_rematerialised(change, monkeypatch):
    monkeypatch.setattr(quantised, "TILE", 256)
    changed = trained(common.with_stacks(GPT, **change), GPT, INT8, False, 2)[2]
    np.testing.assert_allclose(changed, trained(GPT, GPT, INT8, False, 2)[2], rtol=1e-5)


def test_codes_are_split_as_their_weights_are():
    session = Session(common.T5, NF4, Partitioner(data=2, fsdp=2, model=2))
    frozen = {path: tuple(leaf.sharding.spec) for path, leaf in flat_shapes(session, 1)}
    base = dict(trees.flatten(session.base_shapes))
    for path, spec in frozen.items():
        owner, leaf = path.rsplit("/", 1)
        if leaf == "codes":
            assert spec == tuple(base[owner].sharding.spec), path
    wo = "encoder/layers/mlp/wo/kernel"
    assert frozen[f"{wo}/scales"] == (None, "model", "fsdp")
    assert set(frozen[f"{wo}/groups"]) == {None}
    inside = Compose((LORA, Quantise(block=32)))
    with pytest.raises(ValueError, match="axis 'heads' of size 1 does not divide over 4 devices"):
        _ = Session(common.T5, inside, Partitioner(data=2, fsdp=1, model=4)).split_shapes


def flat_shapes(session, part):
    return trees.flatten(session.split_shapes[part]).items()


# --- what is kept, and what is made --------------------------------------------------------------


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def made_in_a_step(config, transform):
    """Every array that the gradient's program makes, as an abstract value, and its maker."""
    model = transformer.Transformer(config)
    base = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    names = transformer.axes(model)
    split = jax.eval_shape(lambda base: transform.split(base, names, jax.random.key(0)), base)
    batch = common.random_batch(config, rows=3, encoder=11, decoder=9)

    def loss(trainable, frozen):
        logits = model.apply({"params": transform.apply(trainable, frozen)}, batch)
        return Loss()(logits, batch)["loss"]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(*split).jaxpr
    return base, [(out.aval, e.primitive.name) for e in equations(jaxpr) for out in e.outvars]


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_no_weight_is_made_whole_and_no_codes_are_copied(remat, monkeypatch):
    monkeypatch.setattr(quantised, "TILE", 256)
    config = common.with_stacks(common.T5, remat=remat, num_layers=4, mlp_dim=40)
    base, made = made_in_a_step(config, Compose((LORA, Quantise(targets=TARGETS, block=8))))
    flat = trees.flatten(base)
    stacks = {leaf.size for path, leaf in flat.items() if path.endswith("kernel")}
    layers = {size // 4 for size in stacks}
    floats = [aval for aval, _ in made if jnp.issubdtype(aval.dtype, jnp.floating)]
    assert floats
    assert {aval.size for aval in floats} & (stacks | layers) <= {flat["lm_head/kernel"].size}
    # Stacked codes leave no loop: the backward one reads those of the base.
    kept = [aval for aval, maker in made if maker == "scan" and aval.dtype == jnp.uint8]
    assert kept == []
