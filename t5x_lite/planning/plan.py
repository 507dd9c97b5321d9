"""What a run would need and take on TPUs, before there are any: `scripts/plan.py`.

The run's own train step is compiled for the slice by libtpu, on any machine. Memory is the
compiler's account and exact; times are estimates, by the method that `METHOD` states.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax
from rich.console import Console
from rich.table import Table

from t5x_lite import sharding, types
from t5x_lite.data.pipeline import Batches
from t5x_lite.models import flops
from t5x_lite.models.config import ModelConfig
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.planning import hlo
from t5x_lite.planning.chips import Slice
from t5x_lite.sharding import Partitioner
from t5x_lite.train.loop import compile_step
from t5x_lite.train.optim import Optimizer
from t5x_lite.train.session import Session
from t5x_lite.train.step import Loss
from t5x_lite.types import InputError

METHOD: Final = (
    "products by the compiler's cycles, at least their operations at the chip's peak; elementwise "
    "loops by bytes at HBM's full bandwidth; loops times their trip counts; collectives round a "
    "ring at the links' bandwidth, hidden behind what is scheduled between start and end; Pallas "
    "kernels by roofline, of all tiles. Cautiously: the compiler's cycles for elementwise loops "
    "too, and kernels at half of their rooflines. No input pipeline, no host, no stragglers."
)
# Windowed products send a kernel round in small slices, of which products are slow (see docs).
OPTIONS: Final = (("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000"),)


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A global batch by its sizes alone, for runs whose data is elsewhere; 0: no such stream."""

    rows: int
    encoder: int = 0  # tokens a row
    decoder: int = 0
    masked: int = 0  # slots a row, where an encoder's head answers

    def __post_init__(self) -> None:
        if self.rows < 1 or not (self.decoder or (self.encoder and self.masked)):
            raise InputError(
                f"{self}: expected rows, and a decoder, or an encoder with masked slots"
            )

    def structs(self, partitioner: Partitioner) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch's arrays as shape structs, packed."""
        lengths: dict[str, int] = {}
        keys: tuple[str, ...]
        if self.encoder:
            keys = ("INPUT_TOKENS", "SEGMENT_IDS", "POSITIONS")
            lengths |= {getattr(types, f"ENCODER_{key}"): self.encoder for key in keys}
        if self.decoder:
            keys = ("INPUT_TOKENS", "SEGMENT_IDS", "POSITIONS", "TARGET_TOKENS", "LOSS_WEIGHTS")
            lengths |= {getattr(types, f"DECODER_{key}"): self.decoder for key in keys}
        if self.masked:
            keys = ("POSITIONS", "TARGET_TOKENS", "LOSS_WEIGHTS")
            lengths |= {getattr(types, f"MASKED_{key}"): self.masked for key in keys}
        return _structs(
            {key: (length, ()) for key, length in lengths.items()}, self.rows, partitioner
        )


@dataclass(frozen=True)
class Plan:
    """What was found. Bytes and seconds are of one chip and one step."""

    topology: str
    mesh: dict[str, int]
    chips: int
    parameters: int
    trained: int
    memory: dict[str, int]  # bytes by kind
    hbm: int  # bytes that the chip has
    flops: float  # of the model's mathematics, on all chips
    step_seconds: float
    cautious_seconds: float  # the same step, where nothing but products goes as well as it can
    compute_seconds: float
    exposed_seconds: float  # waiting for collectives
    tokens: int  # a step
    collectives: list[dict[str, Any]]
    costs: dict[str, float]  # seconds of the largest, by place in the model
    mfu: float  # by step_seconds
    compile_seconds: float
    method: str = METHOD

    @property
    def used(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.used <= self.hbm

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


def plan(
    *,
    topology: str,
    model: ModelConfig,
    optimizer: Optimizer,
    batches: Batches | None = None,
    batch: BatchShape | None = None,
    transform: Transform = Full(),
    loss: Loss = Loss(),
    microbatches: int = 1,
    partitioner: Partitioner = Partitioner(),
    total_steps: int | None = None,
    seed: int = 0,
    compiler_options: Sequence[tuple[str, str]] = OPTIONS,
    output: str | None = None,
    program: str | None = None,
    console: Console | None = None,
) -> Plan:
    """Compiles the run's train step for a TPU slice that need not be there, and says what it costs.

    Args:
      topology: chip and sides of the slice: v5e:4x4, v4:4x4x4.
      model, optimizer, transform, loss, microbatches, partitioner, total_steps, seed: the run's.
      batches: the run's; read for the shapes of its first batch.
      batch: in place of `batches`, its sizes: nothing is read.
      compiler_options: of XLA for TPUs, by name.
      output: a JSON file to write.
      program: a file for the compiled program's text.

    Raises InputError without libtpu, and for a mesh that the slice or the model does not divide.
    """
    slice_ = Slice.parse(topology)
    if batch is None and batches is None:
        raise InputError("plan needs the run's batches, or batch=@BatchShape(), its sizes")
    # The cache of compiled programs can't be read for devices that are not there.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        found = _planned(
            slice_, model, optimizer, batches, batch, transform, loss, microbatches, partitioner,
            seed, dict(compiler_options), program,
        )  # fmt: skip
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    if output is not None:
        os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
        with open(output, "w", encoding="utf-8") as file:
            json.dump({**dataclasses.asdict(found), "fits": found.fits}, file, indent=1)
            file.write("\n")
    show(found, total_steps, output, console or Console(width=max(Console().width, 100)))
    return found


def _planned(
    slice_: Slice,
    model: ModelConfig,
    optimizer: Optimizer,
    batches: Batches | None,
    batch: BatchShape | None,
    transform: Transform,
    loss: Loss,
    microbatches: int,
    partitioner: Partitioner,
    seed: int,
    options: Mapping[str, str],
    program: str | None,
) -> Plan:
    with sharding.described(slice_.devices()):
        partitioner = dataclasses.replace(partitioner)  # a mesh of its own
        session = Session(model, transform, partitioner, seed)
        rows = batch.rows if batch is not None else batches.batch_size if batches else 0
        partitioner.check_batch_size(rows, microbatches)
        shapes = batch.structs(partitioner) if batch is not None else _read(batches, partitioner)
        transformation = session.optimizer(optimizer)
        state, frozen = session.state_shapes(transformation), session.split_shapes[1]
        compiled, seconds = compile_step(
            session, transformation, loss, microbatches, seed, state, frozen, shapes, options
        )
    text: str = compiled.as_text()  # type: ignore[attr-defined]
    if program is not None:
        with open(program, "w", encoding="utf-8") as file:
            file.write(text)
    return measure(compiled, slice_, session, state, frozen, shapes, seconds)


def measure(
    compiled: Any,
    slice_: Slice,
    session: Session,
    state: Any,
    frozen: types.Params,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    compile_seconds: float,
) -> Plan:
    """A compiled step's plan."""
    chip = slice_.chip
    machine = hlo.Machine(
        chip.clock, chip.flops, chip.hbm_bandwidth, slice_.size, slice_.ring_bandwidth
    )
    program = hlo.Program.parse(compiled.as_text())
    times = hlo.estimate(program, machine)
    cautious = hlo.estimate(program, dataclasses.replace(machine, cautious=True))
    full = session.transform.trains_base
    wanted = float(flops.train_flops(session.config, batch, full=full))
    least = wanted / slice_.size / chip.flops  # no program is faster than its mathematics
    step = max(times.total, least)
    memory = {
        "trained parameters": _local(state.params),
        "frozen parameters": _local(frozen),
        "optimizer state": _local(state.opt_state),
        "batch": _local(batch),
        "activations, gradients and temporaries": _temporary(compiled),
    }
    return Plan(
        topology=str(slice_),
        mesh=dict(session.partitioner.mesh.shape),
        chips=slice_.size,
        parameters=_count(session.base_shapes),
        trained=_count(state.params),
        memory=memory,
        hbm=chip.hbm_bytes,
        flops=wanted,
        step_seconds=step,
        cautious_seconds=max(cautious.total, least),
        compute_seconds=times.compute,
        exposed_seconds=times.exposed,
        tokens=sum(math.prod(x.shape) for key, x in batch.items() if key in _STREAMS),
        collectives=[dataclasses.asdict(traffic) for traffic in times.traffic.values()],
        costs=dict(sorted(times.by_source.items(), key=lambda one: -one[1])[:12]),
        mfu=least / step,
        compile_seconds=compile_seconds,
    )


_STREAMS = (types.ENCODER_INPUT_TOKENS, types.DECODER_INPUT_TOKENS)


def show(found: Plan, total_steps: int | None, output: str | None, console: Console) -> None:
    """Prints a plan for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    table = Table(title=f"{found.topology}, {mesh}: memory of a chip")
    table.add_column("kind")
    table.add_column("GiB", justify="right")
    for kind, size in found.memory.items():
        table.add_row(kind, f"{size / 2**30:.2f}")
    verdict = "fits" if found.fits else "does NOT fit"
    table.add_row(f"all, of {found.hbm / 2**30:.0f}: {verdict}", f"{found.used / 2**30:.2f}")
    console.print(table)
    table = Table(title="Collectives of a step, each chip")
    for column in ("kind", "times", "sends, MiB", "on the links, ms"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for one in found.collectives:
        ms = 1e3 * one["seconds"]
        table.add_row(
            one["kind"], f"{one['count']:,.0f}", f"{one['sent'] / 2**20:,.1f}", f"{ms:.2f}"
        )
    console.print(table)
    table = Table(title="Largest costs of a step, estimated")
    for column in ("where", "ms", "percent"):
        table.add_column(column, justify="left" if column == "where" else "right")
    for where, seconds in found.costs.items():
        table.add_row(where, f"{1e3 * seconds:.2f}", f"{100 * seconds / found.step_seconds:.0f}")
    console.print(table)
    say = console.print
    say(
        f"{found.parameters:,} parameters, {found.trained:,} trained; {found.tokens:,} tokens a "
        "step"
    )
    say(
        f"Step, estimated: {1e3 * found.step_seconds:,.1f} ms, of which "
        f"{1e3 * found.exposed_seconds:,.1f} wait for collectives; MFU {found.mfu:.2f}, "
        f"{found.tokens_per_second:,.0f} tokens/s"
    )
    slow = found.cautious_seconds
    say(f"Cautiously: {1e3 * slow:,.1f} ms, MFU {found.mfu * found.step_seconds / slow:.2f}")
    if total_steps is not None:
        hours = total_steps * found.step_seconds * found.chips / 3600
        say(f"{total_steps:,} steps: {hours:,.1f} chip-hours")
    say(f"Method: {found.method}")
    if output is not None:
        say(f"Written: {output}", soft_wrap=True)


def _read(batches: Batches | None, partitioner: Partitioner) -> dict[str, jax.ShapeDtypeStruct]:
    assert batches is not None
    first = batches.batch(0, slice(0, 1))
    shapes = {key: (value.shape[1], value.shape[2:]) for key, value in first.items()}
    return _structs(shapes, batches.batch_size, partitioner)


def _structs(
    lengths: Mapping[str, tuple[int, tuple[int, ...]]], rows: int, partitioner: Partitioner
) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        key: jax.ShapeDtypeStruct(
            (rows, length, *rest),
            "float32" if key in types.FLOAT_KEYS else "int32",
            sharding=partitioner.batch_sharding,
        )
        for key, (length, rest) in lengths.items()
    }


def _local(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _temporary(compiled: Any) -> int:
    """What stands in memory beside the arguments; results in their place count once."""
    used = compiled.memory_analysis()
    return int(used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes)
