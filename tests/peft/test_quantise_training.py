"""QLoRA in the training step: adapters learn, codes stay, and no weight is ever whole."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.peft import quantised
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.quantise import Quantise
from t5x_lite.sharding import Partitioner
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from tests import common
from tests.train import harness

TARGETS = (".*/(self_attention|cross_attention|mlp)/[^/]+/kernel", "token_embedding/embedding")
LORA = LoRA(rank=2, targets=(".*/(query|value|out|wi_0)/kernel", "token_embedding/embedding"))
NF4 = Quantise(targets=TARGETS, block=8, double_quantisation=True)
INT8 = Quantise("int8", targets=TARGETS)
QLORA = Compose((LORA, NF4))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(quantised, "TILE", 256)


@pytest.fixture(scope="module")
def base():
    return harness.host_params(common.T5)


def trained(config, transform, base, partitioner, steps):
    """`(frozen before, frozen after, losses)`."""
    session = Session(config, transform, partitioner)
    optimizer = session.optimizer(AdamW(0.01))
    state, frozen = harness.start(session, optimizer, base)
    before = jax.device_get(frozen)
    batch = session.partitioner.put_batch(common.random_batch(config, rows=8), 8)
    step = harness.compile_step(session, optimizer, state, frozen, batch)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"] / metrics["weight"]))
    return before, jax.device_get(frozen), losses


def test_ten_steps_move_no_code_and_are_the_same_on_eight_devices(base):
    before, after, losses = trained(common.T5, QLORA, base, harness.one_device(), 10)
    assert losses[-1] < 0.8 * losses[0]
    flat = trees.flatten(after)
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(t) for t in ("uint8", "float32")}
    for path, leaf in trees.flatten(before).items():
        assert leaf.tobytes() == flat[path].tobytes(), path
    mesh = Partitioner(data=2, fsdp=2, model=2)
    _, _, eight = trained(common.T5, QLORA, base, mesh, 3)
    np.testing.assert_allclose(eight, losses[:3], rtol=1e-5)


@pytest.mark.parametrize("change", ["unrolled", "remat", "dots"])
def test_scanned_is_unrolled_is_rematerialised(base, change):
    changes = {"unrolled": {"unroll": 2}, "remat": {"remat": "full"}, "dots": {"remat": "dots"}}
    config = common.with_stacks(common.T5, **changes[change])
    _, _, losses = trained(config, Compose((LORA, INT8)), base, harness.one_device(), 2)
    plain = trained(common.T5, Compose((LORA, INT8)), base, harness.one_device(), 2)[2]
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
