"""What hosts' memory holds: placed there, brought for computing, saved and restored."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from t5x_lite import trees
from t5x_lite.data.pipeline import EvaluationBatches
from t5x_lite.decode import prompts
from t5x_lite.decode.generate import generate
from t5x_lite.decode.sampling import Greedy
from t5x_lite.devices import HOST, check_host_memory
from t5x_lite.interop.hf import read_hf_config
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.peft.prefix import PrefixTuning
from t5x_lite.peft.quantise import Quantise
from t5x_lite.peft.transform import Freeze, Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train import adapters, loop
from t5x_lite.train.checkpoint import Checkpointer
from t5x_lite.train.convert import convert
from t5x_lite.train.evaluate import Generate
from t5x_lite.train.offline import evaluate_run
from t5x_lite.train.optim import AdamW
from t5x_lite.train.quantize import quantize
from t5x_lite.train.run import RunCheckpoint, load, load_base
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss, eval_step
from t5x_lite.train.writers import read_jsonl
from t5x_lite.types import InputError
from tests import common
from tests.train import harness

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "hf"


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def agreement(targets, predictions):
    """How many texts are as they should be."""
    return {"same": float(sum(t == p for t, p in zip(targets, predictions, strict=True)))}


def away(tree):
    """Paths of what hosts hold."""
    flat = trees.flatten(tree)
    return {path for path, leaf in flat.items() if leaf.sharding.memory_kind == HOST}


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


TRANSFORMS = {
    "lora": LoRA(rank=2),
    "dora": DoRA(rank=2),
    "pissa": LoRA(rank=2, init="pissa"),
    "prefix": PrefixTuning(length=2),
    "top": Freeze(trainable=(".*final_norm.*",)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_frozen_base_stays_away_and_all_is_the_same(transform):
    """Steps, an evaluation and what is generated; the chunked loss reads the head by itself."""
    batch = harness.uneven_batch(harness.MODEL, rows=8)
    found = []
    for offload in ((), ("frozen",)):
        partitioner = Partitioner(data=2, fsdp=2, model=2, offload=offload)
        session = Session(harness.MODEL, transform, partitioner)
        made = session.optimizer(AdamW(0.01))
        state, frozen = harness.start(session, made, common.host_params(harness.MODEL))
        assert (HOST in kinds(frozen)) == bool(offload)
        assert HOST not in kinds(state.params)
        placed = partitioner.put_batch(batch, 8)
        loss = Loss(logits_bytes=8192)
        step = harness.compile_step(session, made, state, frozen, placed, loss=loss)
        for _ in range(2):
            state, metrics = step(state, frozen, placed)
        apply = functools.partial(eval_step, model=session.model, transform=transform)

        def generated(params, frozen, batch, session=session):
            return generate(
                session.model,
                session.transform.apply(params, frozen),
                prompts.of_batch(batch),
                strategy=Greedy(),
                max_tokens=3,
                eos_id=1,
                pad_id=0,
                start_id=0,
                rng=jax.random.key(0),
            )

        with partitioner.activate():
            held = jax.jit(apply)(state.params, frozen, placed)
            tokens = jax.jit(generated)(state.params, frozen, placed)
        found.append(jax.device_get((state.params, metrics, held, tokens)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)


def test_a_run_beside_an_offloaded_base_goes_on(tmp_path):
    """From another run's checkpoint, stopped and resumed: as one that held it on the device."""
    loop.train(**harness.tiny_run(tmp_path / "base", tmp_path, total_steps=1, evaluations=[]))
    records, texts = [], []
    for offload in ((), ("frozen",)):
        folder = tmp_path / f"run{len(offload)}"
        for steps in (3, 5):
            partitioner = Partitioner(data=2, fsdp=4, offload=offload)
            run = harness.tiny_run(
                folder,
                tmp_path,
                transform=LoRA(rank=2),
                initial=RunCheckpoint(str(tmp_path / "base")),
                partitioner=partitioner,
                microbatches=1,
                total_steps=steps,
            )
            task = dataclasses.replace(run["batches"].task, metrics=[agreement])
            asked = EvaluationBatches(task, batch_size=8, limit=11)
            run["evaluations"].append(Generate(name="texts", batches=asked, max_tokens=5))
            loop.train(**run)
        records.append(list(read_jsonl(folder / "metrics.jsonl")))
        texts.append((folder / "predictions" / "texts-5.jsonl").read_text())
        session, trainable, frozen = load(RunCheckpoint(str(folder)), partitioner)
        assert HOST not in kinds(session.transform.merge(trainable, frozen))
        assert adapters.Base(str(tmp_path / "base"), partitioner=partitioner).partitioner == (
            dataclasses.replace(partitioner, offload=())
        )
    assert len(records[0]) == len(records[1]) > 4
    assert texts[0] == texts[1] != ""
    for one, other in zip(*records, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("source", ["run", "hf"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_an_offloaded_base_is_read_to_the_hosts_alone(source, transform, tmp_path):
    """It need not fit into the devices' memory, whatever the transform makes of it."""
    found = []
    for offload in ((), ("frozen",)):
        partitioner = Partitioner(data=2, fsdp=4, offload=offload)
        if source == "hf":
            held = RunCheckpoint(str(FIXTURES / "t5_1_1"))
            session = Session(read_hf_config(held.model_dir), transform, partitioner)
        else:
            held = RunCheckpoint(str(tmp_path / "base"))
            if not offload:
                run = harness.tiny_run(held.model_dir, tmp_path, total_steps=1, evaluations=[])
                loop.train(**run)
            session = Session(harness.MODEL, transform, partitioner)
        base = load_base(held, session)
        on_hosts = away(base)
        assert on_hosts == set(session.away)
        assert bool(on_hosts) == bool(offload)
        flat = trees.flatten(base)
        trainable, frozen = session.split(base)
        assert all(trees.flatten(frozen)[path] is flat[path] for path in on_hosts)
        assert kinds(frozen) == kinds(session.split_shapes[1])
        found.append((session.fingerprint(base), jax.device_get((trainable, frozen))))
    (one, parts), (other, same) = found
    assert one == other
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), parts, same)


def test_programs_that_hold_whole_models_offload_nothing(tmp_path):
    """A gin file may say so, for the run that it also describes."""
    run = harness.tiny_run(tmp_path / "run", tmp_path, total_steps=1)
    loop.train(**run)
    away = Partitioner(data=2, fsdp=4, offload=("frozen",))
    folder, quantised = str(tmp_path / "run"), str(tmp_path / "int8")
    for partitioner in (Partitioner(data=2, fsdp=4), away):
        scores = evaluate_run(
            model_dir=folder, evaluations=run["evaluations"], partitioner=partitioner
        )
        assert scores[1]["held/loss"] > 0
    quantize(source=folder, output=quantised, kind="int8", partitioner=away)
    convert(source=folder, output=str(tmp_path / "hf"), to="hf", partitioner=away)
    found = evaluate_run(model_dir=quantised, evaluations=run["evaluations"], partitioner=away)
    assert found[0]["held/loss"] == pytest.approx(scores[1]["held/loss"], rel=1e-2)


def test_a_mesh_with_nothing_offloaded_is_the_same_mesh():
    partitioner = Partitioner(data=2, fsdp=4, offload=("frozen",))
    assert partitioner.at_hand().offload == ()
    assert partitioner.at_hand().mesh is partitioner.mesh
    assert Partitioner(data=8).at_hand() == Partitioner(data=8)


def test_a_base_that_cannot_be_fetched_by_layers_says_so():
    partitioner = Partitioner(data=2, fsdp=4, offload=("frozen",))
    quantised = Compose((LoRA(rank=2), Quantise(kind="int8")))
    with pytest.raises(InputError, match=r"offload has 'frozen', and '.*' is quantised"):
        _ = Session(harness.MODEL, quantised, partitioner).split_shapes
    stack = dataclasses.replace(harness.STACK, unroll=2)
    model = dataclasses.replace(harness.MODEL, encoder=stack)
    with pytest.raises(InputError, match=r"StackConfig\.unroll=2"):
        _ = Session(model, LoRA(rank=2), partitioner).split_shapes


def test_a_transform_that_freezes_nothing_has_no_base_to_offload():
    partitioner = Partitioner(data=2, fsdp=4, offload=("frozen",))
    with pytest.raises(InputError, match=r"'frozen', and Full\(\) freezes nothing"):
        _ = Session(harness.MODEL, Full(), partitioner).split_shapes


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
