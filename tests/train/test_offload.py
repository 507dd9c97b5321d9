"""Optimizer state in hosts' memory: placed there, brought for the step, saved and restored."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from t5x_lite.devices import HOST, check_host_memory
from t5x_lite.sharding import Partitioner
from t5x_lite.train.checkpoint import Checkpointer
from t5x_lite.train.optim import AdamW
from t5x_lite.train.session import Session
from t5x_lite.types import InputError
from tests import common
from tests.train import harness


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def test_a_step_is_the_same_and_its_state_stays_away(tmp_path):
    optimizer = AdamW(0.01, weight_decay=0.1, clip_norm=1.0)
    batch = harness.uneven_batch(harness.MODEL, rows=8)
    found = []
    for offload in ((), ("optimizer",)):
        partitioner = Partitioner(data=2, fsdp=2, model=2, offload=offload)
        session = Session(harness.MODEL, partitioner=partitioner)
        made = session.optimizer(optimizer)
        state, frozen = harness.start(session, made, common.host_params(harness.MODEL))
        placed = partitioner.put_batch(batch, 8)
        step = harness.compile_step(session, made, state, frozen, placed)
        for _ in range(2):
            state, _ = step(state, frozen, placed)
        assert (kinds(state.opt_state) == {HOST}) == bool(offload)
        assert HOST not in kinds(state.params)
        found.append(jax.device_get((state.params, state.opt_state)))
    jax.tree.map(np.testing.assert_array_equal, *found)
    checkpointer = Checkpointer(str(tmp_path), shapes=state)
    checkpointer.save(2, state.params, state.opt_state, {})
    checkpointer.wait()
    shapes = session.state_shapes(made)
    params, opt_state = checkpointer.restore(2, shapes.params, shapes.opt_state)
    checkpointer.close()
    assert kinds(opt_state) == {HOST}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((params, opt_state)), found[1])


def test_what_cannot_be_offloaded_says_so():
    for wrong in (("params",), "optimizer"):
        with pytest.raises(InputError, match=r"Partitioner\.offload=.*expected a tuple"):
            Partitioner(offload=wrong)
    memories = [SimpleNamespace(kind="device")]
    device = SimpleNamespace(addressable_memories=lambda: memories)
    with pytest.raises(InputError, match="no memory of kind pinned_host, but device"):
        check_host_memory(device)
    memories.append(SimpleNamespace(kind=HOST))
    check_host_memory(device)
