"""LoRA in the training step: what is trained, kept for the backward pass and communicated."""

from __future__ import annotations

import dataclasses
import math
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.models import transformer, weights
from t5x_lite.peft import joined, targets
from t5x_lite.peft.bottleneck import Bottleneck
from t5x_lite.peft.ia3 import IA3
from t5x_lite.peft.leaves import merge_low_rank
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.peft.transform import Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train.checkpoint import Checkpointer
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss
from tests import common
from tests.train import harness

LORA = LoRA(rank=2, targets=(".*/(query|value|out|wi_0)/kernel", "token_embedding/embedding"))


@pytest.fixture(scope="module")
def base():
    return harness.host_params(common.T5)


def prepared(transform, base):
    """`(state, frozen, batch, compiled step)` on 8 data-parallel devices."""
    session = Session(common.T5, transform, Partitioner(data=8))
    optimizer = session.optimizer(AdamW(0.01, weight_decay=0.1))
    state, frozen = harness.start(session, optimizer, base)
    batch = session.partitioner.put_batch(common.random_batch(common.T5, rows=16), 16)
    step = harness.compile_step(session, optimizer, state, frozen, batch)
    return state, frozen, batch, step


@pytest.fixture(scope="module")
def tuning(base):
    return prepared(LORA, base)


def test_state_exists_for_adapters_only(tuning, base):
    state = tuning[0]
    adapters = set(trees.flatten(state.params))
    targets = {path.rsplit("/", 1)[0] for path in adapters}
    assert adapters == {f"{path}/{leaf}" for path in targets for leaf in "ab"}
    assert targets < set(trees.flatten(base))
    assert len(targets) == 3 * 3 + 2 + 1
    moments: dict[str, set[str]] = {}
    for path, leaf in trees.flatten(state.opt_state).items():
        if leaf.ndim:
            ((kind, owner),) = re.findall(r"(?:^|/)(mu|nu)/(.*)", path)
            moments.setdefault(kind, set()).add(owner)
    assert moments == {"mu": adapters, "nu": adapters}


def test_ten_steps_move_every_adapter_and_no_bit_of_the_base(tuning, base):
    state, frozen, batch, step = tuning
    before = jax.tree.map(np.array, jax.device_get(frozen))
    fingerprint = trees.fingerprint(frozen)
    start = jax.tree.map(np.array, jax.device_get(state.params))
    state = jax.tree.map(jnp.copy, state)  # the step overwrites what it is given
    losses = []
    for _ in range(10):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for path, leaf in trees.flatten(jax.device_get(frozen)).items():
        assert leaf.tobytes() == trees.flatten(before)[path].tobytes(), path
        assert leaf.tobytes() == trees.flatten(base)[path].tobytes(), path
    assert trees.fingerprint(frozen) == fingerprint
    for path, leaf in trees.flatten(state.params).items():
        assert np.abs(leaf - trees.flatten(start)[path]).max() > 1e-3, path


# --- communication -------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\("
)


def largest_collective(compiled):
    """Elements of the largest array that devices exchange."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n)
        for result in COLLECTIVE.findall(compiled.as_text())
        for dims in re.findall(r"\w\d+\[([\d,]*)\]", result)
    ]
    assert sizes
    return max(sizes)


def test_devices_exchange_gradients_of_adapters_only(tuning, base):
    adapters = [leaf.size for leaf in jax.tree.leaves(tuning[0].params)]
    flat = trees.flatten(base)
    kernels = [x.size // (2 if "/layers/" in p else 1) for p, x in flat.items() if x.ndim > 1]
    smallest = min(size for size in kernels if size > 32 * 4)  # but the position bias
    assert largest_collective(tuning[3]) <= max(adapters) <= smallest / 4
    # The same count sees the whole weights of full fine-tuning.
    assert largest_collective(prepared(Full(), base)[3]) >= smallest


# --- what the backward pass keeps ----------------------------------------------------------------


def scans(jaxpr):
    """Every scan in a jaxpr, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from scans(inner)


def stacked_outputs(equation):
    """What a scan stacks turn by turn: an output with one axis more than the body's."""
    body = equation.params["jaxpr"]
    inner = getattr(body, "jaxpr", body).outvars
    assert len(inner) == len(equation.outvars)
    return [
        out.aval
        for out, part in zip(equation.outvars, inner, strict=True)
        if out.aval.ndim == part.aval.ndim + 1
    ]


def weight_residuals(config, transform, base):
    """Stacked outputs of the shapes of stacked weights, in the forward and the backward loops."""
    model = transformer.Transformer(config)
    names = transformer.axes(model)
    trainable, frozen = jax.eval_shape(
        lambda base: transform.split(base, names, jax.random.key(0)), base
    )
    # No activation of this batch has the size of a weight.
    batch = common.random_batch(config, rows=3, encoder=11, decoder=9)
    loss = Loss()

    def summed(trainable, frozen):
        logits = model.apply(
            {"params": transform.apply(trainable, frozen, jax.random.key(0))},
            batch,
            deterministic=False,
            rngs={"dropout": jax.random.key(0)},
        )
        return loss(logits, batch)["loss"]

    flat = trees.flatten(base)
    stacked = {x.size for path, x in flat.items() if "/layers/" in path and path.endswith("kernel")}
    jaxpr = jax.make_jaxpr(jax.grad(summed))(trainable, frozen).jaxpr
    found = list(scans(jaxpr))
    assert len(found) >= 4  # two stacks, forward and backward
    return [
        aval for equation in found for aval in stacked_outputs(equation) if aval.size in stacked
    ]


DROPPING = common.with_stacks(common.T5, num_layers=4, dropout=0.1)
CONFIGS = {
    "scanned": DROPPING,
    "unrolled": common.with_stacks(DROPPING, unroll=2),
    "remat": common.with_stacks(DROPPING, remat="full"),
    "dots": common.with_stacks(DROPPING, remat="dots"),
    "bfloat16": dataclasses.replace(DROPPING, param_dtype="bfloat16", dtype="bfloat16"),
    # A cast of float32 weights in the loop is kept too, unless it is recomputed.
    "cast": dataclasses.replace(common.with_stacks(DROPPING, remat="dots"), dtype="bfloat16"),
}


def base_shapes(config):
    return jax.eval_shape(
        lambda: transformer.init(transformer.Transformer(config), jax.random.key(0))
    )


@pytest.mark.parametrize("together", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_copy_of_the_base_is_kept_for_the_backward_pass(config, together, monkeypatch):
    monkeypatch.setattr(joined, "pays", lambda *_: together)
    assert weight_residuals(config, LORA, base_shapes(config)) == []


OTHERS = {
    "dropout": LoRA(rank=2, dropout=0.1, targets=LORA.targets),
    "dora": DoRA(rank=2, targets=LORA.targets),
    "ia3": IA3(),
    "bottleneck": Bottleneck(size=4),
}


@pytest.mark.parametrize("transform", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("config", ["scanned", "cast"])
def test_other_methods_keep_no_copy_either(transform, config):
    assert weight_residuals(CONFIGS[config], transform, base_shapes(CONFIGS[config])) == []


@flax.struct.dataclass
class Stopped(weights.StructuredWeight):
    """The trap: `stop_gradient` on a base weight inside the loop over layers."""

    w: jax.Array
    a: jax.Array
    b: jax.Array

    @property
    def shape(self):
        return self.w.shape

    def dense(self):
        raise NotImplementedError

    def project(self, x, in_axes):
        update = weights.project(weights.project(x, self.a, in_axes), self.b)
        return weights.project(x, jax.lax.stop_gradient(self.w) * 1.0, in_axes) + update

    def lookup(self, ids, dtype):
        return weights.lookup(ids, self.w, dtype)

    def attend(self, x):
        return weights.attend(x, self.w)


@flax.struct.dataclass
class Merging(Stopped):
    """The other one: forming the sum in the forward pass."""

    def project(self, x, in_axes):
        return weights.project(x, merge_low_rank(self.w, self.a, self.b, 1.0), in_axes)


@pytest.mark.parametrize("leaf", [Stopped, Merging])
def test_that_check_finds_the_known_traps(leaf):
    @dataclasses.dataclass(frozen=True)
    class Bad(LoRA):
        def apply(self, trainable, frozen, rng=None):
            flat, own = trees.flatten(frozen), trees.flatten(trainable)
            b = targets.by_owner(own, "b")
            for path, a in targets.by_owner(own, "a").items():
                flat[path] = leaf(flat[path], a, b[path])
            return trees.unflatten(flat)

    bad = Bad(rank=2, targets=(".*/(query|value)/kernel",))
    assert weight_residuals(DROPPING, bad, base_shapes(DROPPING))
    assert weight_residuals(DROPPING, Full(), base_shapes(DROPPING))


# --- what is stored ------------------------------------------------------------------------------

OVERHEAD = 64 * 1024  # bytes: Orbax's index, and two small files a tensor


def test_a_checkpoint_holds_the_adapters_alone(tmp_path):
    config = common.with_stacks(
        dataclasses.replace(common.T5, embed_dim=128), num_heads=4, head_dim=32, mlp_dim=256
    )
    session = Session(config, LoRA(rank=64), Partitioner())
    optimizer = session.optimizer(AdamW(0.01))
    shapes = session.state_shapes(optimizer)
    rng = np.random.default_rng(0)  # numbers that don't compress
    filled = lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)
    adapters, opt_state = jax.tree.map(filled, (shapes.params, shapes.opt_state))
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, adapters, opt_state, {})
    checkpointer.wait()
    stored = checkpointer.nbytes(1)
    tensors = trees.flatten(checkpointer._manager.item_metadata(1)["params"].tree)
    assert set(tensors) == set(trees.flatten(adapters))
    restored, _ = checkpointer.restore(1, shapes.params, shapes.opt_state)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, restored, adapters)
    size = trees.nbytes(adapters)
    assert size > 10 * OVERHEAD
    assert 0.8 * size < stored["params"] < size + OVERHEAD
    assert 0.8 * 2 * size < stored["optimizer"] < 2 * size + OVERHEAD
    assert trees.nbytes(session.base_shapes) > 4 * size  # which would show
