"""Weights from one format to another: runs' folders, Hugging Face's, PEFT's, T5X's."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Final

import jax

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.interop import (
    hf_words,
    load_hf,
    load_t5x,
    read_hf_config,
    save_hf,
    save_peft,
)
from t5x_lite.interop.hf_tokenizers import find_vocabulary, save_vocabulary
from t5x_lite.interop.t5x import load_t5x_adafactor
from t5x_lite.interop.t5x_files import find as find_t5x
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import Head
from t5x_lite.models.transformer import Transformer
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.quantise import without_quantise
from t5x_lite.sharding import Partitioner
from t5x_lite.train import adapters
from t5x_lite.train import run as runs
from t5x_lite.train.checkpoint import Checkpointer, versions
from t5x_lite.train.imported import adafactor_state
from t5x_lite.train.optim import Optimizer
from t5x_lite.train.session import Session
from t5x_lite.types import InputError, Params

# The file that tells a folder's format.
_MARKS: Final = {
    runs.FILE: "run",
    adapters.FILE: "adapter",
    adapters.PEFT: "peft",
    "config.json": "hf",
}
_TARGETS: Final = {
    "run": ("hf", "peft", "adapter"),
    "hf": ("run",),
    "t5x": ("run", "hf"),
    "peft": ("run", "hf", "adapter"),
    "adapter": ("run", "hf", "peft"),
}


def convert(
    *,
    source: str,
    output: str,
    to: str,
    base: str | None = None,
    vocabulary: Vocabulary | None = None,
    tokenizer: str | None = None,
    model: ModelConfig | None = None,
    optimizer: Optimizer | None = None,
    step: int | None = None,
    partitioner: Partitioner = Partitioner(),
) -> None:
    """Writes `output` in the format `to`, from whatever `source` is.

    Args:
      source: a folder: of a run, of Hugging Face's (config.json and safetensors), of an adapter
        (ours or PEFT's), or a T5X checkpoint.
      output: a folder that is not there yet, or empty.
      to: "run": what train (as train.initial), infer and eval start from. "hf": for transformers,
        adapters merged. "adapter": what a run trained, alone, to be handed on; of any transform.
        "peft": the same, of a kind that PEFT has.
      base: the model that an adapter belongs to: a run's folder, or Hugging Face's. For to="peft":
        what PEFT shall take for the base model.
      vocabulary: of the new run; None: that of the tokenizer's file in `source`.
      tokenizer: a folder whose tokenizer files go into to="hf"; None: the run's vocabulary does.
      model: what a T5X checkpoint holds; None: told from it.
      optimizer: an Adafactor: T5X's state of it goes into the new run, so that train resumes there.
      step: which of a run's checkpoints; None: the latest.
      partitioner: the mesh that holds the model on its way.

    Raises InputError, before anything is written, for what does not fit or can't be done.
    """
    partitioner = partitioner.at_hand()
    kind = format_of(source)
    if to not in _TARGETS[kind]:
        can = "' or '".join(_TARGETS[kind])
        raise InputError(f"'{source}' is in the format '{kind}': convert.to='{to}' can be '{can}'")
    if kind in ("peft", "adapter") and base is None:
        raise InputError(f"'{source}' is an adapter: name the model that it belongs to with --base")
    if os.path.exists(output) and os.listdir(output):
        raise InputError(f"convert.output='{output}' is not empty: name a new folder")
    if kind == "run" and to in ("peft", "adapter"):
        _run_to_adapter(source, output, to, base, step, partitioner)
    elif kind in ("peft", "adapter") and to != "hf":
        assert base is not None
        _from_adapter(source, output, to, base, step, partitioner)
    else:
        network, params = _load(source, base, model, step, partitioner)
        if to == "hf":
            origin = base if kind in ("peft", "adapter") else source
            assert origin is not None
            save_hf_directory(output, network, params, tokenizer, origin)
        else:
            vocabulary = find_vocabulary(source) if vocabulary is None else vocabulary
            session = Session(network.config, partitioner=partitioner)
            at, state = (0, {}) if optimizer is None else _resumed(source, session, optimizer)
            run = runs.Run(network.config, session.transform, vocabulary, vocabulary.fingerprint)
            if kind == "hf":
                told = hf_words.read(source, network.config)
                run = dataclasses.replace(run, labels=told.labels, asking=told.asking)
            save_run(output, run, params, state, at)
    if jax.process_index() == 0:
        print(f"'{output}' holds '{source}' in the format '{to}'")


def format_of(directory: str) -> str:
    """ "run", "adapter", "peft", "hf" or "t5x". Raises InputError for any other folder."""
    if not os.path.isdir(directory):
        raise InputError(f"'{directory}' is not a folder: expected one with weights")
    for name, kind in _MARKS.items():
        if os.path.exists(os.path.join(directory, name)):
            return kind
    try:
        find_t5x(directory)
    except InputError as error:
        raise InputError(
            f"'{directory}' is of no known format: expected one of {', '.join(_MARKS)} in it, or a "
            "T5X checkpoint"
        ) from error
    return "t5x"


def run_model(*, model_dir: str, head: Head | None = None) -> ModelConfig:
    """The model of a run's folder or a Hugging Face directory: `train.model = @run_model()`.

    With another head, where one is given: then `RunCheckpoint.restore` says that it is fresh.
    """
    if runs.RunCheckpoint(model_dir).is_hf:
        model = read_hf_config(model_dir)
    else:
        model = runs.Run.read(model_dir).model
    return model if head is None else dataclasses.replace(model, head=head, pair_head=None)


def run_vocabulary(*, model_dir: str) -> Vocabulary:
    """The vocabulary of such a folder: `Task.vocabulary = @run_vocabulary()`."""
    if runs.RunCheckpoint(model_dir).is_hf:
        return find_vocabulary(model_dir)
    return runs.Run.read(model_dir).vocabulary


def _load(
    source: str,
    base: str | None,
    config: ModelConfig | None,
    step: int | None,
    partitioner: Partitioner,
) -> tuple[Transformer, Params]:
    """A model and its parameters, adapters merged."""
    kind = format_of(source)
    if kind == "run":
        network = Transformer(runs.Run.read(source).model)
        checkpoint = runs.RunCheckpoint(source, step)
        return network, runs.load_params(checkpoint, network.config, partitioner)
    if kind == "hf":
        return load_hf(source, partitioner=partitioner)
    if kind == "t5x":
        return load_t5x(source, config=config, partitioner=partitioner)
    assert base is not None  # `convert` asks for an adapter's
    found = adapters.attach(source, adapters.Base(base, step, partitioner))
    return found.session.model, found.merged()


def _resumed(source: str, session: Session, optimizer: Optimizer) -> tuple[int, Any]:
    """Step and optimizer state of a T5X checkpoint."""
    if format_of(source) != "t5x":
        raise InputError("convert.optimizer is for a T5X checkpoint: no other source has its state")
    moments = load_t5x_adafactor(source, config=session.config)
    if moments is None:
        raise InputError(f"'{source}' has no optimizer's state: leave convert.optimizer out")
    shapes = session.state_shapes(session.optimizer(optimizer))
    return moments.step, adafactor_state(shapes.opt_state, shapes.params, moments)


def save_run(output: str, run: runs.Run, trainable: Params, state: Any, step: int) -> None:
    """A run's folder with one checkpoint."""
    size = run.vocabulary.size
    if size > run.model.vocab_size:
        raise InputError(
            f"the vocabulary {run.vocabulary} has {size} tokens, and the model "
            f"{run.model.vocab_size}: it is not the model's"
        )
    checkpointer = Checkpointer(output)
    try:
        checkpointer.save(step, trainable, state, {"run": runs.FILE, "versions": versions()})
        checkpointer.wait()
    finally:
        checkpointer.close()
    if jax.process_index() == 0:
        run.write(output)  # last: what makes the folder a run's


def save_hf_directory(
    output: str,
    network: Transformer,
    params: Params,
    tokenizer: str | None,
    origin: str,
    labels: tuple[str, ...] = (),
) -> None:
    """The model, and the tokenizer that is named or comes with `origin`; labels likewise."""
    kind = format_of(origin)
    if tokenizer is None and kind == "hf":
        tokenizer = origin
    run = runs.Run.read(origin) if kind == "run" else None
    vocabulary, own = (None, ()) if run is None else (run.vocabulary, run.labels)
    save_hf(
        output, network, params, tokenizer=tokenizer, vocabulary=vocabulary, labels=labels or own
    )
    if tokenizer is None and vocabulary is not None and jax.process_index() == 0:
        save_vocabulary(output, vocabulary, network.config)


def _run_to_adapter(
    source: str, output: str, to: str, base: str | None, step: int | None, partitioner: Partitioner
) -> None:
    """What a run trained beside its base, alone."""
    run = runs.Run.read(source)
    adapter = adapters.Adapter.of_run(run, source)
    session = Session(run.model, run.transform, partitioner, run.seed)
    trainable = runs.load_trainable(runs.RunCheckpoint(source, step), session)
    if to == "adapter":
        adapters.save_adapter(output, adapter, trainable)
        return
    params = None
    if isinstance(run.transform, LoRA) and run.transform.init == "pissa" and run.base is not None:
        params = runs.load_params(run.base, run.model, partitioner, run.seed)
    trained = without_quantise(run.transform)
    save_peft(output, session.model, trained, trainable, base=base, params=params)


def _from_adapter(
    source: str, output: str, to: str, base: str, step: int | None, partitioner: Partitioner
) -> None:
    """An adapter's folder, ours or PEFT's, in the other format, or as a run beside its base."""
    under = adapters.Base(base, step, partitioner)
    found = adapters.attach(source, under)
    transform, trainable = without_quantise(found.session.transform), found.trainable
    if to == "run":
        run = found.adapter.run(under.vocabulary(), found.checkpoint)
        save_run(output, run, trainable, {}, 0)
    elif to == "adapter":
        adapters.save_adapter(output, found.adapter, trainable)
    else:
        save_peft(output, found.session.model, transform, trainable, base=base, params=found.params)
