"""Programs compiled for TPUs that are not here, against arithmetic by hand; needs libtpu."""

from __future__ import annotations

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite.devices import described
from t5x_lite.kernels import flash
from t5x_lite.kernels.plain import ByDistance, Visibility, dot_product_attention
from t5x_lite.models import flops
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_positions import Rotary
from t5x_lite.peft import joined
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Full
from t5x_lite.planning import hlo, timing
from t5x_lite.planning.chips import Slice
from t5x_lite.planning.plan import plan
from t5x_lite.planning.request import BatchShape
from t5x_lite.planning.search import Search
from t5x_lite.sharding import Partitioner
from t5x_lite.train.optim import AdamW
from t5x_lite.types import InputError
from tests import pages

pytestmark = pytest.mark.plan
SLICE = Slice.parse("v5e:2x2")
STACK = StackConfig(
    num_layers=3,
    num_heads=4,
    head_dim=128,
    mlp_dim=1024,
    mlp_activations=("silu", "linear"),
    positions=Rotary(),
    attention_scale=None,
)
MODEL = ModelConfig(vocab_size=4096, embed_dim=512, decoder=STACK, dtype="bfloat16")


def estimate(function, *shapes, spec=PartitionSpec()):
    """Of a function on bfloat16 arrays on all four chips."""
    mesh = Mesh(np.array(SLICE.devices()), ("x",))
    sharding = NamedSharding(mesh, spec)
    structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    whole = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(function, out_shardings=whole).lower(*structs).compile()
    return timing.estimate(hlo.Program.parse(compiled.as_text()), SLICE.machine)


def test_a_product_takes_its_operations():
    n = 8192
    times = estimate(lambda a, b: a @ b, (n, n), (n, n))
    least = 2 * n**3 / SLICE.chip.flops
    assert least <= times.total < 1.2 * least
    assert times.exposed == 0


def test_a_sum_takes_its_bytes():
    n = 8192
    times = estimate(lambda a, b: a + b, (n, n), (n, n))
    assert times.total == pytest.approx(3 * 2 * n * n / SLICE.chip.hbm_bandwidth, rel=0.02)


def test_a_loop_of_products_takes_its_turns():
    n, turns = 4096, 7

    def run(a, b):
        return jax.lax.fori_loop(0, turns, lambda _, x: x @ b, a)

    once = estimate(lambda a, b: a @ b, (n, n), (n, n))
    assert estimate(run, (n, n), (n, n)).total == pytest.approx(turns * once.total, rel=0.15)


def test_gathering_takes_the_links():
    n = 4096
    times = estimate(lambda a: a * 2, (n, n), spec=PartitionSpec("x"))
    sent = 2 * n * n * 3 / 4  # what the three others have
    assert sum(t.sent for t in times.traffic.values()) == pytest.approx(sent)
    assert times.exposed == pytest.approx(sent / SLICE.ring_bandwidth(4), rel=0.01)


MESH = Partitioner(data=-1, fsdp=4)
TWO = Slice.parse("v5e:2x2", 2)


def test_a_mesh_over_slices_is_as_jax_lays_it_out():
    with described(TWO.devices()):
        mesh = Partitioner(data=4, fsdp=2).mesh
    wanted = mesh_utils.create_hybrid_device_mesh(
        (2, 2, 1), (2, 1, 1), TWO.devices(), allow_split_physical_axes=True
    )
    assert [d.id for d in mesh.devices.flat] == [d.id for d in wanted.flat]
    assert [{d.slice_index for d in block.flat} for block in np.split(mesh.devices, 2)] == [
        {0},
        {1},
    ]


@pytest.mark.parametrize(
    ("axes", "within", "between"),
    [
        # Of n^2 numbers, 4 bytes each: a chip's fourth of the slice's sum goes to the other slice.
        (("data", "fsdp"), {"reduce-scatter": 3 / 4, "all-gather": 3 / 4}, 1 / 4),
        # What only crosses slices goes whole.
        (("data",), {}, 1),
        (("fsdp",), {"all-reduce": 2 * 3 / 4}, 0),
    ],
)
def test_only_what_crosses_slices_takes_their_network(axes, within, between):
    n = 1024

    def reduce(x):
        return jax.lax.psum(x, axes)

    with described(TWO.devices()):
        partitioner = Partitioner(fsdp=4)
        mapped = jax.shard_map(
            reduce,
            mesh=partitioner.mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        given = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=partitioner.replicated)
        text = jax.jit(mapped).lower(given).compile().as_text()
    times = timing.estimate(hlo.Program.parse(text), TWO.machine)
    size = 4 * n * n
    sent = {kind: traffic.sent / size for kind, traffic in times.traffic.items()}
    crossing = {"all-reduce between slices": between} if between else {}
    assert sent == pytest.approx({**within, **crossing})
    assert times.between == pytest.approx(between * size / 3.125e9, rel=1e-3)
    links = sum(within.values()) * size / TWO.ring_bandwidth(4)
    assert times.exposed - times.between == pytest.approx(links, rel=1e-3)


def made(
    tmp_path,
    transform=Full(),
    attention="plain",
    rows=8,
    mesh=MESH,
    stack=STACK,
    param_dtype="float32",
    **settings,
):
    stack = dataclasses.replace(stack, attention=attention)
    model = dataclasses.replace(MODEL, decoder=stack, param_dtype=param_dtype)
    return plan(
        topology="v5e:2x2",
        model=model,
        optimizer=AdamW(1e-3),
        batch=BatchShape(rows=rows, decoder=512),
        transform=transform,
        partitioner=mesh,
        output=str(tmp_path / "plan.json"),
        **settings,
    )


def test_a_step_is_planned(tmp_path, capsys):
    found = made(tmp_path, total_steps=1000)
    params = found.parameters * 4 // 4  # float32, a fourth on each chip
    norms = 4 * 512 * 8
    assert found.memory["trained parameters"] == pytest.approx(params, abs=norms)
    assert found.memory["optimizer state"] == pytest.approx(2 * params, abs=2 * norms)
    assert found.memory["frozen parameters"] == 0
    assert found.fits
    assert found.flops == 3 * flops.forward_flops(MODEL, (0, 0), (8, 512))
    assert 0 < found.mfu < 1
    assert found.tokens == 8 * 512
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["step_seconds"] == found.step_seconds
    assert record["fits"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("fits", "chip-hours", "Method:"))


def test_two_slices_add_up_gradients_between_them(tmp_path, capsys):
    one, two = made(tmp_path), made(tmp_path, rows=16, num_slices=2)
    assert (one.slices, two.slices, two.chips) == (1, 2, 8)
    assert two.mesh == {"data": 2, "fsdp": 4, "model": 1}
    assert two.flops == 2 * one.flops
    for kind in ("trained parameters", "optimizer state"):
        assert two.memory[kind] == one.memory[kind]  # a copy in each slice
    sent = {found["kind"]: found["sent"] for found in two.collectives}
    crossing = sent["all-reduce between slices"]
    assert not [kind for kind in sent if "slices" in kind and not kind.startswith("all-reduce ")]
    # A chip's fourth of the gradients, in float32 those of the embeddings, else in bfloat16; the
    # norms' go whole, which is what is left over.
    embeddings = 4096 * 512
    rest = two.parameters - embeddings
    assert crossing == pytest.approx((4 * embeddings + 2 * rest) / 4, rel=0.005)
    assert 0 < two.between_seconds <= crossing / TWO.chip.dcn_bandwidth
    assert two.between_seconds < two.exposed_seconds
    shown = capsys.readouterr().out
    assert "2 slices of v5e:2x2, data 2 x fsdp 4" in shown
    assert "of these between slices)" in shown


def test_evaluating_and_decoding_are_planned(tmp_path, capsys):
    found = {step: made(tmp_path, step=step, new_tokens=8) for step in ("train", "eval", "decode")}
    assert found["eval"].flops == found["train"].flops / 3
    assert found["eval"].memory["optimizer state"] == 0
    assert found["eval"].step_seconds < found["train"].step_seconds / 2
    assert found["decode"].tokens == 8 * 8
    assert found["decode"].flops == flops.forward_flops(MODEL, (0, 0), (8, 512 + 8))
    more = made(tmp_path, step="decode", new_tokens=72)
    once = [plan.step_seconds - plan.exposed_seconds for plan in (found["decode"], more)]
    assert once[1] > 1.5 * once[0]  # each token of the 64 more reads every weight
    shown = capsys.readouterr().out
    assert all(f"{what} a batch, estimated:" in shown for what in ("Evaluation of", "Decoding"))
    encoder = ModelConfig(vocab_size=4096, embed_dim=512, encoder=STACK, dtype="bfloat16")
    with pytest.raises(InputError, match="no decoder to write with"):
        plan(
            topology="v5e:2x2", model=encoder, optimizer=AdamW(1e-3), step="decode",
            batch=BatchShape(rows=8, encoder=512, masked=8),
        )  # fmt: skip


def test_a_search_ranks_what_fits(tmp_path, capsys):
    tries = Search(model=(1, 8), remat=("none", "full"), microbatches=(1,))
    found = made(tmp_path, search=True, tries=tries)
    record = json.loads((tmp_path / "plan.json").read_text())
    seconds = [one["cautious_seconds"] for one in record["tried"]]
    assert seconds == sorted(seconds)
    assert record["tried"][0]["step_seconds"] == record["step_seconds"] == found.step_seconds
    # Four chips cut in three ways; the first remat fits, and 8 does not divide them.
    meshes = {tuple(one["mesh"].values()) for one in record["tried"]}
    assert meshes == {(4 // n, n, 1) for n in (1, 2, 4)}
    assert {one["remat"] for one in record["tried"]} == {"none"}
    assert "Tried, by the cautious estimate" in capsys.readouterr().out


def test_a_search_leaves_every_slice_a_part_of_data():
    found = set(Search(model=(1, 2)).meshes(8, slices=2))
    assert found == {(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)}


def test_what_does_not_fit_says_by_how_much(tmp_path):
    wide = dataclasses.replace(STACK, num_layers=48, mlp_dim=16384, num_heads=32)
    large = dataclasses.replace(MODEL, embed_dim=4096, decoder=wide)
    arguments = {"topology": "v5e:2x2", "optimizer": AdamW(1e-3), "seed": 0}
    batch = BatchShape(rows=8, decoder=512)
    with pytest.raises(InputError, match=r"before it computes takes \d+\.\d GiB of 16"):
        plan(model=large, batch=batch, **arguments)
    with pytest.raises(InputError, match="nothing that was tried fits v5e:2x2"):
        plan(
            model=large,
            batch=batch,
            search=True,
            tries=Search(model=(1,), remat=("full",)),
            **arguments,
        )
    many = BatchShape(rows=512, decoder=2048)
    unsaving = dataclasses.replace(MODEL, decoder=dataclasses.replace(STACK, remat="none"))
    with pytest.raises(InputError, match=r"does not fit: it takes [\d.]+ GiB of"):
        plan(model=unsaving, batch=many, **arguments)


def test_loras_collectives_are_of_its_own_size(tmp_path):
    full = made(tmp_path)
    lora = made(tmp_path, LoRA(rank=4))
    assert lora.memory["optimizer state"] < full.memory["optimizer state"] / 50
    assert lora.memory["frozen parameters"] == pytest.approx(full.memory["trained parameters"])
    reduced = [
        sum(one["sent"] for one in found.collectives if one["kind"] in hlo.REDUCTIONS)
        for found in (full, lora)
    ]
    assert reduced[1] < reduced[0] / 20


@pytest.mark.parametrize("mesh", [MESH, Partitioner(data=4)], ids=["fsdp", "data"])
def test_an_adapter_beside_its_weight_is_one_product(tmp_path, mesh, monkeypatch):
    """It takes less time by both estimates, and moves nothing that two products would not."""
    every = LoRA(rank=4, targets=(".*/layers/.*/kernel",))
    together = made(tmp_path, every, "flash", rows=64, mesh=mesh)
    monkeypatch.setattr(joined, "pays", lambda *_: False)
    apart = made(tmp_path, every, "flash", rows=64, mesh=mesh)
    assert together.step_seconds < 0.95 * apart.step_seconds
    assert together.cautious_seconds < 0.95 * apart.cautious_seconds
    sent = [collections.Counter(), collections.Counter()]
    for counts, found in zip(sent, (together, apart), strict=True):
        for one in found.collectives:
            counts[one["kind"]] += one["sent"]
    assert all(count <= 1.02 * sent[1][kind] for kind, count in sent[0].items()), sent


def test_offloaded_state_is_the_hosts(tmp_path, capsys):
    found = [
        made(tmp_path, mesh=dataclasses.replace(MESH, offload=offload))
        for offload in ((), ("optimizer",))
    ]
    held = found[0].memory["optimizer state"]
    assert found[0].host_memory == {}
    assert found[1].host_memory["optimizer state"] == pytest.approx(held, abs=64)
    assert found[1].memory["optimizer state"] < 64  # the count of steps
    copies = {one["kind"]: one["sent"] for one in found[1].collectives}
    for kind in (hlo.FROM_HOST, hlo.TO_HOST):
        assert copies[kind] == pytest.approx(held, rel=0.01)
    assert "host memory: optimizer state" in capsys.readouterr().out


@pytest.mark.parametrize("activations", [True, False], ids=["activations", "update"])
def test_offloading_lowers_the_peak_that_activations_make(activations):
    """And leaves one that the update makes, for which all of the state is on the chip at once."""
    layers, width, rows = (4, 2048, 16) if activations else (3, 512, 8)
    stack = dataclasses.replace(
        STACK, num_layers=layers, mlp_dim=4 * width, num_heads=width // 128, remat="full"
    )
    model = dataclasses.replace(MODEL, embed_dim=width, decoder=stack)
    found = [
        plan(
            topology="v5e:2x2",
            model=model,
            optimizer=AdamW(1e-3),
            batch=BatchShape(rows=rows, decoder=512),
            partitioner=dataclasses.replace(MESH, offload=offload),
        )
        for offload in ((), ("optimizer",))
    ]
    saved = sum(found[0].memory.values()) - sum(found[1].memory.values())
    held = found[0].memory["optimizer state"]
    assert (saved > 0.5 * held) is activations
    assert saved < held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_base_on_the_host_is_read_layer_by_layer(tmp_path, dtype):
    """It is nowhere whole: the step holds a layer or two of it, and reads it forward and back."""
    mesh = dataclasses.replace(MESH, offload=("frozen",))
    stack = dataclasses.replace(STACK, num_layers=12, remat="full")
    near, away = (
        made(tmp_path, LoRA(rank=4), "flash", mesh=mesh, stack=stack, param_dtype=dtype)
        for mesh in (MESH, mesh)
    )
    base = away.host_memory["frozen parameters"]
    held = near.memory["frozen parameters"]
    assert base + away.memory["frozen parameters"] == held
    assert base > 0.99 * held  # all but vectors
    assert sum(away.memory.values()) < sum(near.memory.values()) - 0.5 * base
    (copies,) = (one for one in away.collectives if one["kind"] == hlo.FROM_HOST)
    vocabulary = 2 * np.dtype(dtype).itemsize * 4096 * 512 / 4  # of both ends: read once
    assert copies["sent"] == pytest.approx(2 * base - vocabulary, rel=0.02)
    assert away.step_seconds > near.step_seconds
    assert away.step_seconds > 0.95 * copies["seconds"]  # too little to hide it behind


def test_a_frozen_base_with_a_heads_bias_a_chip_is_planned(tmp_path):
    """Of two rows that share a word the compiler fetches none alone: biases stay on the chips."""
    stack = dataclasses.replace(STACK, biases=("query", "key", "value"))
    mesh = Partitioner(data=1, model=4, offload=("frozen",))
    found = made(tmp_path, LoRA(rank=4), stack=stack, mesh=mesh, param_dtype="bfloat16")
    biases = 3 * 3 * 512 * 2 / 4  # of three layers' three projections, a fourth on each chip
    norms = 7 * 512 * 2
    assert found.memory["frozen parameters"] == biases + norms


def test_flash_attention_keeps_logits_out_of_memory(tmp_path):
    plain, flash = (made(tmp_path, attention=kind) for kind in ("plain", "flash"))
    kind = "activations, gradients and temporaries"
    logits = 2 * 4 * 512 * 512 * 4  # of two rows a chip, float32
    assert flash.memory[kind] < plain.memory[kind] - logits


@pytest.mark.parametrize("biased", [False, True])
def test_kernels_keep_nothing_of_length_squared(biased):
    """Temporaries of attention and its gradients in HBM, of one row and eight heads."""

    def temporaries(length, attend):
        def loss(query, key, value, values, segments):
            places = jnp.arange(length)
            visibility = Visibility(
                segments, segments, query_places=places, key_places=places, in_order=True
            )
            bias = ByDistance(values) if biased else None
            return jnp.sum(attend(query, key, value, visibility, bias).astype(jnp.float32))

        with described(SLICE.devices()[:1]):
            partitioner = Partitioner()

            def struct(shape, dtype):
                return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.replicated)

            row = struct((1, length, 8, 64), jnp.bfloat16)
            values = struct((8, 2 * length), jnp.float32)
            grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
            with partitioner.activate():
                lowered = grad.lower(row, row, row, values, struct((1, length), jnp.int32))
            return lowered.compile().memory_analysis().temp_size_in_bytes

    def plain(query, key, value, visibility, bias):
        dense = None if bias is None else bias.dense()
        return dot_product_attention(query, key, value, visibility, dense)

    squared = 8 * 2048 * 2048 * 2  # a byte pair for each logit
    assert temporaries(2048, plain) > squared
    found = [temporaries(length, flash.attention) for length in (512, 2048, 8192)]
    assert max(found) < squared / 4, found


def test_what_cannot_be_planned_says_so(tmp_path):
    with pytest.raises(InputError, match="does not divide the 4"):
        plan(
            topology="v5e:2x2", model=MODEL, optimizer=AdamW(1e-3),
            batch=BatchShape(rows=8, decoder=512), partitioner=Partitioner(fsdp=3),
        )  # fmt: skip
    with pytest.raises(InputError, match="the slice's torus, 4x4x4, or a product"):
        plan(
            topology="v4:4x4x4", model=MODEL, optimizer=AdamW(1e-3),
            batch=BatchShape(rows=64, decoder=512), partitioner=Partitioner(data=8, fsdp=8),
        )  # fmt: skip
    for both in ({"search": True}, {"largest_batch": True}):
        with pytest.raises(InputError, match="compile many: search first"):
            made(tmp_path, program="step.hlo", **both)
    with pytest.raises(InputError, match="or batch="):
        plan(topology="v5e:2x2", model=MODEL, optimizer=AdamW(1e-3))
    with pytest.raises(InputError, match="not to be had"):
        Slice.parse("v5e:3x5").devices()


def test_the_pages_commands_run(tmp_path):
    for commands in pages.blocks("docs/planning.md"):
        done = pages.shell(commands, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Step, estimated:" in done.stdout
    assert json.loads((tmp_path / "plans/decoder.json").read_text())["fits"]


def test_the_largest_batch_is_found(tmp_path, capsys):
    found = made(tmp_path, largest_batch=True, rows=980)
    record = json.loads((tmp_path / "plan.json").read_text())
    largest = record["largest_batch"]
    rows = largest["rows"]
    assert found.tokens == rows * 512
    assert found.fits
    # On four chips one row more each is too many.
    assert largest["settled"]
    assert largest["rows_that_do_not_fit"] == rows + 4
    used = largest["bytes_by_rows"]
    assert used[str(rows)] == found.used > 0.8 * found.hbm
    assert used[str(rows + 4)] is None or used[str(rows + 4)] > found.hbm
    assert f"Largest batch that fits: {rows:,} rows" in capsys.readouterr().out
