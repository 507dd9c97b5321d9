"""A folder with a model's weights in 4 or 8 bits, to be asked, or to be tuned beside."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

import jax
from rich.console import Console
from rich.table import Table

from t5x_lite import trees
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.interop import hf_words, load_hf
from t5x_lite.interop.hf_tokenizers import find_vocabulary
from t5x_lite.peft.quantise import Quantise, Stored
from t5x_lite.sharding import Partitioner
from t5x_lite.train import logits
from t5x_lite.train import run as runs
from t5x_lite.train.checkpoint import Checkpointer, find_step
from t5x_lite.train.convert import format_of, save_run
from t5x_lite.train.session import Session
from t5x_lite.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes before and after, and what became of the answers."""

    disk: tuple[int, int]
    memory: tuple[int, int]
    part: tuple[int, int]  # in memory, of what was quantised
    change: logits.LogitChange


def quantize(
    *,
    source: str,
    output: str,
    kind: Literal["nf4", "int8"] = "nf4",
    targets: Sequence[str] = Quantise.targets,
    block: int | None = None,
    double_quantisation: bool = False,
    step: int | Literal["best"] | None = None,
    vocabulary: Vocabulary | None = None,
    partitioner: Partitioner = Partitioner(),
) -> Sizes:
    """Writes a run's folder with quantised weights, and prints sizes and the largest logit change.

    infer, eval and serve take the folder as any other. train starts from it
    (`RunCheckpoint.model_dir`) with `Compose((LoRA(), Quantise(...)))` of the same kind, targets
    and block; the weights are never made whole again.

    Args:
      source: a run's folder (adapters are merged first), or Hugging Face's.
      output: a folder that is not there yet, or empty.
      kind, targets, block, double_quantisation: see `Quantise`.
      step: which of a run's checkpoints; None: the latest; "best": by the run's best_metric.
      vocabulary: of the folder; None: the source's own.
      partitioner: the mesh that holds the model on its way.

    Raises InputError, before anything is written, for what does not fit.
    """
    quantise = Quantise(kind, targets, block, double_quantisation)
    partitioner = partitioner.at_hand()
    if os.path.exists(output) and os.listdir(output):
        raise InputError(f"quantize.output='{output}' is not empty: name a new folder")
    origin = format_of(source)
    if origin not in ("run", "hf"):
        raise InputError(
            f"'{source}' is in the format '{origin}': expected a run's folder or Hugging Face's; "
            "scripts/convert.py makes one of it"
        )
    run, params, disk = _read(source, origin, step, vocabulary, partitioner)
    session = Session(run.model, Stored(quantise), partitioner, run.seed)
    stored = session.split(params)[0]
    before = logits.answers(session.model, params, partitioner)
    memory = trees.nbytes(params), trees.nbytes(stored)
    part = _nbytes_of_targets(params, stored)
    del params
    after = logits.answers(session.model, session.transform.apply(stored, {}), partitioner)
    save_run(output, dataclasses.replace(run, transform=session.transform), stored, {}, 0)
    checkpointer = Checkpointer(output)
    try:
        now = checkpointer.nbytes(0)["params"]
    finally:
        checkpointer.close()
    sizes = Sizes((disk, now), memory, part, logits.logit_change(before, after))
    if jax.process_index() == 0:
        _print(output, quantise, sizes)
    return sizes


def _read(
    source: str,
    origin: str,
    step: int | Literal["best"] | None,
    vocabulary: Vocabulary | None,
    partitioner: Partitioner,
) -> tuple[runs.Run, Params, int]:
    """The run to write, the source's parameters in full, and their bytes on disk."""
    if origin == "hf":
        if step is not None:
            raise InputError(f"step={step} is for a run's checkpoints, and '{source}' is no run's")
        model, params = load_hf(source, partitioner=partitioner)
        words = find_vocabulary(source) if vocabulary is None else vocabulary
        told = hf_words.read(source, model.config)
        run = runs.Run(model.config, Stored(Quantise()), words, words.fingerprint)
        files = [name for name in os.listdir(source) if name.endswith((".safetensors", ".bin"))]
        disk = sum(os.path.getsize(os.path.join(source, name)) for name in files)
        return dataclasses.replace(run, labels=told.labels, asking=told.asking), params, disk
    run = runs.Run.read(source)
    if isinstance(run.transform, Stored):
        raise InputError(
            f"'{source}' is quantised already, as {run.transform.quantise}: name the folder that "
            "it was made from"
        )
    checkpoint = runs.RunCheckpoint(source, find_step(source, step))
    params = runs.load_params(checkpoint, run.model, partitioner)
    disk = 0
    under: runs.RunCheckpoint | None = checkpoint
    while under is not None and not under.is_hf:  # an adapter's base counts, too
        checkpointer = Checkpointer(under.model_dir)
        try:
            disk += checkpointer.nbytes(find_step(under.model_dir, under.step))["params"]
        finally:
            checkpointer.close()
        under = runs.Run.read(under.model_dir).base
    words = run.vocabulary if vocabulary is None else vocabulary
    run = dataclasses.replace(
        run,
        vocabulary=words,
        vocabulary_fingerprint=words.fingerprint,
        base=None,
        base_fingerprint=None,
    )
    return run, params, disk


def _nbytes_of_targets(params: Params, stored: Params) -> tuple[int, int]:
    """Bytes of what was quantised, before and after."""
    before, after = trees.flatten(params), trees.flatten(stored)
    gone = {path: leaf for path, leaf in before.items() if path not in after}
    codes = {path: leaf for path, leaf in after.items() if path not in before}
    return trees.nbytes(gone), trees.nbytes(codes)


def _print(output: str, quantise: Quantise, sizes: Sizes) -> None:
    table = Table(title=f"{output}: {quantise.kind}")
    for column in ("bytes", "before", "after", "share"):
        table.add_column(column, justify="left" if column == "bytes" else "right")
    rows = ("on disk", sizes.disk), ("in memory", sizes.memory), ("of what is coded", sizes.part)
    for name, (before, after) in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}")
    console = Console()
    console.print(table)
    console.print(f"Probe batch: {sizes.change}", soft_wrap=True)
