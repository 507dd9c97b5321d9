"""Placement by axis names: specs, what does not fit, and rows of batches on devices."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from t5x_lite import configure, trees
from t5x_lite.devices import described
from t5x_lite.models import transformer
from t5x_lite.sharding import DEFAULT_RULES, Partitioner, constrain
from t5x_lite.types import InputError
from tests import common

CUBE = Partitioner(data=2, fsdp=2, model=2)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"model": 4}, (2, 1, 4)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": 2, "model": 2}, (2, 2, 2)),
    ],
)
def test_the_mesh_takes_every_device_once(sizes, shape):
    mesh = Partitioner(**sizes).mesh
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp", "model")
    assert {device.id for device in mesh.devices.flat} == set(range(8))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"mesh 3x1x1 .* needs 3 devices, but this run has 8 .* to -1"),
        ({"data": 4, "fsdp": 4}, r"mesh 4x4x1 .* needs 16 devices, but this run has 8"),
        ({"model": 3}, r"the fixed axes take 3 devices, which does not divide the 8"),
        ({"data": -1, "fsdp": -1}, r"data=-1, fsdp=-1.* at most one of them -1"),
        ({"model": 0}, r"model=0: sizes must be positive"),
        ({"model": -2}, r"model=-2: sizes must be positive"),
        ({"num_slices": 0}, r"num_slices=0: expected a positive number, or -1"),
        ({"num_slices": 3}, r"num_slices=3: expected a divisor of the 8 devices \(cpu\)"),
        (
            {"data": 1, "fsdp": -1, "num_slices": 2},
            r"mesh 1x8x1 .* 2 slices of 4, .* 1 does not divide by 2: set Partitioner.data=2",
        ),
        ({"rules": (("batch", "rows"),)}, r"rule \('batch', 'rows'\): .* not 'rows'"),
        ({"rules": (("batch", ("data", "x")),)}, r"not 'x'"),
    ],
)
def test_a_mesh_that_cannot_be_is_named(sizes, message):
    with pytest.raises(InputError, match=message):
        _ = Partitioner(**sizes).mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"num_slices": 2}, (8, 1, 1)),
        ({"num_slices": 2, "fsdp": 4}, (2, 4, 1)),
        ({"num_slices": 2, "fsdp": 2}, (4, 2, 1)),
        ({"num_slices": 4, "model": 2}, (4, 1, 2)),
        ({"num_slices": 2, "data": 2, "fsdp": 2, "model": -1}, (2, 2, 2)),
    ],
)
def test_slices_are_blocks_of_data(sizes, shape):
    with described(jax.devices()[::-1]):  # in whatever order they are named
        partitioner = Partitioner(**sizes)
        mesh = partitioner.mesh
    assert mesh.devices.shape == shape
    slices = sizes["num_slices"]
    blocks = [sorted(d.id for d in block.flat) for block in np.split(mesh.devices, slices)]
    np.testing.assert_array_equal(blocks, np.arange(8).reshape(slices, -1))
    # Along fsdp and model all are of one slice: so each slice has the parameters whole.
    placed = partitioner.sharding(("embed", "mlp"), (16, 16)).devices_indices_map((16, 16))
    for block in partitioner.by_slice:
        held = np.zeros((16, 16))
        for device in block:
            held[placed[device]] = 1
        np.testing.assert_array_equal(held, 1)


def test_multislice_gin_splits_parameters_within_slices():
    files = ["hardware/tpu_v5e_8.gin", "hardware/multislice.gin"]
    for bindings, shape in (([], (2, 4, 1)), (["SLICES = 4"], (4, 2, 1))):
        with configure.isolated():
            configure.parse(files, bindings)
            partitioner = Partitioner(**configure.arguments(Partitioner))
        assert partitioner.mesh.devices.shape == shape
        assert len(partitioner.by_slice) == shape[0]


def device(index, process=0, platform="cpu", **attributes):
    """A stand-in, with what grouping asks for."""
    return types.SimpleNamespace(id=index, process_index=process, platform=platform, **attributes)


def groups(devices, num_slices=-1):
    with described(devices):
        return [[d.id for d in part] for part in Partitioner(num_slices=num_slices).by_slice]


def test_devices_say_which_slice_they_are_in():
    tpus = [device(i, platform="tpu", slice_index=(2, 1)[i % 2]) for i in range(6)]
    assert groups(tpus) == groups(tpus, 2) == [[1, 3, 5], [0, 2, 4]]
    for wrong in (1, 3):
        with pytest.raises(
            InputError, match=f"num_slices={wrong}, .* say that they are in 2 .* at -1"
        ):
            groups(tpus, wrong)
    with pytest.raises(InputError, match=r"num_slices=2, .* in 1 slice\(s\)"):
        groups(tpus[::2], 2)
    with pytest.raises(InputError, match="slices have 3, 2 devices: expected as many in each"):
        groups(tpus[1:])
    gpus = [device(i, platform="gpu", slice_index=i // 2) for i in range(4)]  # that is their host
    assert groups(gpus) == [[0, 1, 2, 3]]


def test_what_says_nothing_is_cut_by_processes():
    four = [device(i, process=(1, 0, 3, 2)[i // 2], platform="gpu") for i in range(8)]
    assert groups(four) == [list(range(8))]
    assert groups(four, 2) == [[2, 3, 0, 1], [6, 7, 4, 5]]
    assert groups(four, 4) == [[2, 3], [0, 1], [6, 7], [4, 5]]
    with pytest.raises(InputError, match=r"num_slices=8: .* divisor of the 4 processes \(gpu\)"):
        groups(four, 8)  # half a process each


def test_specs_follow_the_rules():
    assert CUBE.spec(("layers", "embed", "heads", "kv")) == P(None, "fsdp", "model", None)
    assert CUBE.spec(("vocab", "embed")) == P("model", "fsdp")
    assert CUBE.spec(("batch", "length", "activation_embed")) == P(("data", "fsdp"), None, None)
    assert CUBE.spec((None, "mlp")) == P(None, "model")
    assert CUBE.spec(()) == P()
    # An axis of size one splits nothing.
    assert Partitioner(data=8).spec(("vocab", "embed")) == P(None, None)
    assert Partitioner(data=8).spec(("batch", None)) == P("data", None)


def test_the_first_rule_of_a_name_wins():
    mine = Partitioner(data=2, fsdp=2, model=2, rules=(("embed", "model"), *DEFAULT_RULES))
    assert mine.spec(("embed", "kv")) == P("model", None)
    assert mine.batch_shards == 4


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("heads", "mlp"), None, "axes 'heads' and 'mlp' are both split over mesh axis 'model'"),
        (("batch", "embed"), None, "'batch' and 'embed' are both split over mesh axis 'fsdp'"),
        (
            ("embed", "hats"),
            None,
            "an axis 'hats' without a sharding rule; rules exist for .*, batch",
        ),
        (("embed", "heads"), (6, 3), "axis 'heads' of size 3 does not divide over 2 devices"),
        (("batch", None), (6, 5), "axis 'batch' of size 6 does not divide over 4 devices"),
    ],
)
def test_what_cannot_be_placed_is_named(names, shape, message):
    with pytest.raises(InputError, match=message) as error:
        CUBE.spec(names, shape, "parameter 'x/y'")
    assert "parameter 'x/y'" in str(error.value)


def test_a_tree_of_shardings_names_the_parameter_that_does_not_divide():
    model = transformer.Transformer(common.with_stacks(common.T5, num_heads=3))
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    names = transformer.axes(model)
    with pytest.raises(InputError, match=r"'decoder/.*' of size 3 does not divide over 2 devices"):
        trees.flatten(CUBE.tree_shardings(shapes, names))
    placed = Partitioner(data=4, fsdp=2).tree_shardings(shapes, names)
    assert placed["lm_head"]["kernel"].spec == P("fsdp", None)


def test_rows_must_divide_over_devices_and_microbatches():
    CUBE.check_batch_size(16, microbatches=4)
    with pytest.raises(InputError, match=r"batch_size=12 is not divisible by 16 .* that is: 16"):
        CUBE.check_batch_size(12, microbatches=4)
    with pytest.raises(InputError, match=r"batch_size=2 .* 8 .*8 data devices x 1 micro.* is: 8"):
        Partitioner().check_batch_size(2)


@pytest.mark.parametrize("partitioner", [Partitioner(), CUBE, Partitioner(data=1, model=8)])
def test_a_batch_comes_back_as_it_was_put(partitioner):
    batch = common.random_batch(common.T5, rows=16)
    assert partitioner.local_rows(16) == slice(0, 16)  # one process loads everything
    placed = partitioner.put_batch(batch, 16)
    shards = partitioner.batch_shards
    for key, value in batch.items():
        assert placed[key].sharding == partitioner.batch_sharding
        assert placed[key].addressable_shards[0].data.shape == (16 // shards, value.shape[1])
        np.testing.assert_array_equal(placed[key], value)


class FakeSharding:
    """Index maps as on a machine of several processes."""

    def __init__(self, bounds):
        self.bounds = bounds

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(*b), slice(None)) for i, b in enumerate(self.bounds)}


def test_a_process_loads_the_rows_of_its_devices(monkeypatch):
    def local(*bounds):
        fake = property(lambda self: FakeSharding(bounds))
        monkeypatch.setattr(Partitioner, "batch_sharding", fake)
        return Partitioner().local_rows(16)

    assert local((4, 6), (6, 8)) == slice(4, 8)
    assert local((4, 8), (4, 8)) == slice(4, 8)  # the same rows on two model shards
    assert local((None, None)) == slice(0, 16)
    with pytest.raises(InputError, match="rows that are not next to each other"):
        local((0, 2), (8, 10))


def test_activations_are_placed_while_a_partitioner_is_active():
    x = np.arange(32.0, dtype=np.float32).reshape(8, 4)

    def place(x):
        return constrain(x * 2, "batch", "mlp")

    with CUBE.activate():
        assert jax.jit(place)(x).sharding.spec == P(("data", "fsdp"), "model")
        with pytest.raises(InputError, match=r"activation \('batch', 'mlp'\).* size 3"):
            jax.jit(place)(jnp.ones((8, 3)))
    outside = jax.jit(lambda x: constrain(x * 2, "nonsense"))(x)
    assert outside.sharding.is_fully_replicated
    np.testing.assert_array_equal(outside, x * 2)
