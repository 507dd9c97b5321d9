"""What a run would need and take on TPUs, before there are any: `scripts/plan.py`.

The run's own step is compiled for the slice by libtpu, on any machine. Memory is the compiler's
account and exact; times are estimates, by the method that `request.METHOD` states.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Final

import jax
from rich.console import Console

from t5x_lite.data.pipeline import Batches
from t5x_lite.models.config import ModelConfig
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.planning import report
from t5x_lite.planning.chips import Slice
from t5x_lite.planning.largest import find_largest
from t5x_lite.planning.request import Arrays, BatchShape, Plan, Request, Step
from t5x_lite.planning.search import Search, Tried, search_plans
from t5x_lite.sharding import Partitioner
from t5x_lite.train.optim import Optimizer
from t5x_lite.train.step import Loss
from t5x_lite.types import InputError

# Windowed products send a kernel round in small slices, of which products are slow (see docs).
OPTIONS: Final = (("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000"),)


def plan(
    *,
    topology: str,
    num_slices: int = 1,
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
    step: Step = "train",
    new_tokens: int = 64,
    search: bool = False,
    tries: Search = Search(),
    largest_batch: bool = False,
    compiler_options: Sequence[tuple[str, str]] = OPTIONS,
    output: str | None = None,
    program: str | None = None,
    console: Console | None = None,
) -> Plan:
    """Compiles a run's step for a TPU slice that need not be there, and says what it costs.

    Args:
      topology: chip and sides of the slice: v5e:4x4, v4:4x4x4.
      num_slices: how many of these, joined by the data-centre network.
      model, optimizer, transform, loss, microbatches, partitioner, total_steps, seed: the run's.
      batches: the run's; read for the shapes of its first batch.
      batch: in place of `batches`, its sizes: nothing is read.
      step: "train"; "eval", the loss alone; or "decode", a batch's prompts and what comes behind
        them, greedily, as one program.
      new_tokens: behind each prompt, for "decode".
      search: try meshes, remat and microbatches, and plan the best.
      tries: what a search tries.
      largest_batch: try more or fewer rows of the global batch than the run's, up to ten times,
        and plan the most that fit.
      compiler_options: of XLA for TPUs, by name.
      output: a JSON file to write.
      program: a file for the compiled program's text; for one program alone.

    Raises InputError without libtpu, for a mesh that the slice or the model does not divide, and
    for a step that takes more memory than a chip has.
    """
    if step not in ("train", "eval", "decode"):
        raise InputError(f"plan.step='{step}': expected train, eval or decode")
    if step == "decode" and model.decoder is None:
        raise InputError("plan.step='decode': this model has no decoder to write with")
    if [search, largest_batch, program is not None].count(True) > 1:
        raise InputError(
            "plan.program is one step's text, and plan.search and .largest_batch compile many: "
            "search first, then find the largest batch for its mesh and remat, then plan that"
        )
    if batch is None and batches is None:
        raise InputError("plan needs the run's batches, or batch=@BatchShape(), its sizes")
    request = Request(
        slice=Slice.parse(topology, num_slices),
        step=step,
        model=model,
        optimizer=optimizer,
        arrays=batch.arrays() if batch is not None else Arrays.of(batches),  # type: ignore[arg-type]
        transform=transform,
        loss=loss,
        microbatches=microbatches,
        partitioner=partitioner,
        seed=seed,
        new_tokens=new_tokens,
        options=dict(compiler_options),
    )
    console = console or Console(width=max(Console().width, 100))
    # The cache of compiled programs can't be read for devices that are not there.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    tried: list[Tried] = []
    largest = None
    try:
        if search:
            found, tried = search_plans(request, tries, console)
        elif largest_batch:
            largest = find_largest(request, console)
            found = largest.plan
        else:
            found = request.plan(program)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    record = {**dataclasses.asdict(found), "fits": found.fits}
    if tried:
        report.show_search(tried, console)
        record["tried"] = [one.record() for one in tried]
    if largest is not None:
        record["largest_batch"] = largest.record()
    if output is not None:
        os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
        with open(output, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
    report.show(found, total_steps, output, console)
    if largest is not None:
        report.show_largest(largest, console)
    return found
