"""Checkpoints: what is stored, what stays, what fits, and on which mesh it comes back."""

from __future__ import annotations

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_lite import trees
from t5x_lite.sharding import Partitioner
from t5x_lite.train.checkpoint import Checkpointer, CheckpointPolicy, find_step, versions
from t5x_lite.types import InputError

SPECS = {"dense": {"kernel": P("fsdp", "model")}, "embedding": P("model", "fsdp")}
CUBE = Partitioner(data=2, fsdp=2, model=2)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))


def params(partitioner, scale=1.0, size=64):
    rng = np.random.default_rng(0)
    tree = {"dense": {"kernel": (size, 8)}, "embedding": (16, size)}
    place = lambda shape, spec: jax.device_put(
        (scale * rng.normal(size=shape)).astype(np.float32), NamedSharding(partitioner.mesh, spec)
    )
    return jax.tree.map(place, tree, SPECS, is_leaf=lambda x: isinstance(x, tuple))


def shapes(tree, mesh=None):
    """Shape structs like `tree`, on its own mesh or another."""

    def struct(x):
        if mesh is None or not isinstance(x.sharding, NamedSharding):
            sharding = x.sharding
        else:
            sharding = NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(struct, tree)


def state(partitioner=CUBE, **kwargs):
    values = params(partitioner, **kwargs)
    # Not as initialised: numbers that differ from leaf to leaf.
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) + x.size, OPTIMIZER.init(values))
    return values, opt_state


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def save(folder, steps, policy=CheckpointPolicy(), metrics=None):
    values, opt_state = state()
    checkpointer = Checkpointer(str(folder), policy)
    for step in steps:
        checkpointer.save(step, values, opt_state, {"step": step}, metrics and metrics[step])
        checkpointer.wait()
    checkpointer.close()
    return sorted(int(name) for name in os.listdir(folder / "checkpoints"))


def test_everything_comes_back_as_it_was(tmp_path):
    values, opt_state = state()
    checkpointer = Checkpointer(str(tmp_path))
    assert checkpointer.latest_step is None
    checkpointer.save(7, values, opt_state, {"run": "x", "versions": {"a": "1"}})
    checkpointer.wait()
    assert checkpointer.latest_step == 7
    found, found_opt = checkpointer.restore(7, shapes(values), shapes(opt_state))
    assert_equal(found, values)
    assert_equal(found_opt, opt_state)
    assert found["embedding"].sharding == values["embedding"].sharding
    assert_equal(checkpointer.restore_params(7, shapes(values)), values)
    assert checkpointer.metadata(7) == {"run": "x", "versions": {"a": "1"}}
    sizes = checkpointer.nbytes(7)
    assert sum(sizes.values()) == sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(tmp_path / "checkpoints" / "7")
        for name in names
    )
    checkpointer.close()
    assert find_step(str(tmp_path)) == find_step(str(tmp_path), 7) == 7


@pytest.mark.parametrize(
    "partitioner", [Partitioner(data=8), Partitioner(data=1, fsdp=8), Partitioner(data=2, model=4)]
)
def test_restores_onto_another_mesh(tmp_path, partitioner):
    values, opt_state = state()
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, values, opt_state, {})
    checkpointer.wait()
    wanted = shapes(values, partitioner.mesh), shapes(opt_state, partitioner.mesh)
    found = checkpointer.restore(1, *wanted)
    checkpointer.close()
    assert_equal(found, (values, opt_state))
    for leaf, struct in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0]), strict=True):
        assert leaf.sharding == struct.sharding


def test_what_is_saved_is_the_state_at_that_step(tmp_path):
    """The next steps overwrite the buffers while the checkpoint is being written."""
    values, opt_state = state(size=1 << 16)  # 6 MiB, and twice that
    pointers = {
        shard.data.unsafe_buffer_pointer() for shard in values["embedding"].addressable_shards
    }
    expected = jax.tree.map(lambda x: np.array(x, copy=True), (values, opt_state))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(values, opt_state):
        return jax.tree.map(lambda x: x * 2 + 1, (values, opt_state))

    step(*jax.tree.map(jnp.copy, (values, opt_state)))  # compiled before the race
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, values, opt_state, {})
    reused = False
    wanted = shapes(values), shapes(opt_state)
    for _ in range(5):
        old = values
        values, opt_state = step(values, opt_state)
        assert old["embedding"].is_deleted()
        reused |= bool(
            pointers
            & {
                shard.data.unsafe_buffer_pointer()
                for shard in values["embedding"].addressable_shards
            }
        )
    checkpointer.wait()
    found = checkpointer.restore(1, *wanted)
    checkpointer.close()
    assert reused  # or else nothing was at risk
    assert_equal(found, expected)


def test_the_newest_stay(tmp_path):
    assert save(tmp_path, range(1, 6), CheckpointPolicy(keep=2)) == [4, 5]


def test_all_stay_if_asked(tmp_path):
    assert save(tmp_path, range(1, 5), CheckpointPolicy(keep=None)) == [1, 2, 3, 4]


def test_every_nth_stays_for_good(tmp_path):
    assert save(tmp_path, range(1, 8), CheckpointPolicy(keep=1, keep_period=3)) == [3, 6, 7]


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 4]), ("max", [1, 3])])
def test_the_best_stay(tmp_path, mode, kept):
    policy = CheckpointPolicy(keep=2, best_metric="held/loss", best_mode=mode)
    metrics = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0}
    metrics = {step: {"held/loss": value, "other": -value} for step, value in metrics.items()}
    assert save(tmp_path, range(1, 5), policy, metrics) == kept


def test_the_best_is_found_by_the_policys_metric(tmp_path):
    values = {1: 5.0, 2: 1.0, 3: 4.0, 4: math.nan}
    for mode, best in (("min", 2), ("max", 1)):
        policy = CheckpointPolicy(keep=None, best_metric="held/loss", best_mode=mode)
        metrics = {step: {"held/loss": value} for step, value in values.items()}
        save(tmp_path / mode, values, policy, metrics)
        assert find_step(str(tmp_path / mode), "best") == best
    save(tmp_path / "none", [1, 2])
    with pytest.raises(InputError, match=r"with CheckpointPolicy\.best_metric, or .* \[1, 2\]"):
        find_step(str(tmp_path / "none"), "best")


def test_the_best_must_have_been_measured(tmp_path):
    policy = CheckpointPolicy(best_metric="held/loss")
    with pytest.raises(InputError, match=r"'held/loss' was not measured at step 1; .*: held/x"):
        save(tmp_path, [1], policy, {1: {"held/x": 1.0}})
    with pytest.raises(InputError, match=r"measured: nothing"):
        save(tmp_path, [1], policy)


def test_a_folder_that_cannot_be_made_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"no checkpoints can be written in '.*file'"):
        Checkpointer(str(tmp_path / "file"))


def test_what_a_killed_run_left_half_written_is_not_a_checkpoint(tmp_path):
    save(tmp_path, [1])
    torn = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "params").mkdir()
    assert find_step(str(tmp_path)) == 1
    checkpointer = Checkpointer(str(tmp_path))
    assert checkpointer.latest_step == 1
    checkpointer.close()


def test_shapes_that_do_not_fit_are_named_by_path(tmp_path):
    save(tmp_path, [1])
    values, opt_state = state()
    wanted = shapes(values)
    flat = trees.flatten(wanted)
    other = flat | {
        "dense/kernel": jax.ShapeDtypeStruct((3, 8), np.float32),
        "new/bias": flat["embedding"],
    }
    del other["embedding"]
    checkpointer = Checkpointer(str(tmp_path))
    with pytest.raises(InputError) as error:
        checkpointer.restore(1, trees.unflatten(other), shapes(opt_state))
    for line in (
        "missing new/bias (16, 64)",
        "unexpected embedding (16, 64)",
        "dense/kernel is (64, 8), the model's is (3, 8)",
        "checkpoints/1 does not fit",
    ):
        assert line in str(error.value)
    with pytest.raises(InputError, match="unexpected embedding"):
        checkpointer.restore_params(1, trees.unflatten(other))
    checkpointer.close()


def test_where_there_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="has no 'checkpoints' folder"):
        find_step(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no finished checkpoint"):
        find_step(str(tmp_path))
    save(tmp_path, [2, 4])
    with pytest.raises(InputError, match=r"no checkpoint of step 3; it has \[2, 4\]"):
        find_step(str(tmp_path), 3)


@pytest.mark.parametrize("field", ["period", "keep", "keep_period"])
def test_a_policy_counts_from_one(field):
    with pytest.raises(InputError, match=f"CheckpointPolicy.{field}=0: expected at least 1"):
        CheckpointPolicy(**{field: 0})


def test_versions_name_what_a_checkpoint_depends_on():
    found = versions()
    assert found["jax"] == jax.__version__
    assert {"flax", "optax", "orbax-checkpoint", "written"} <= set(found)
