"""Any folder with a model, opened to be asked: a run's, Hugging Face's, an adapter on either."""

from __future__ import annotations

import dataclasses
import os
from typing import Final, Literal

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.loaded import Loaded
from t5x_lite.interop import hf_words, load_hf, load_peft
from t5x_lite.interop.hf_tokenizers import find_vocabulary
from t5x_lite.peft.quantise import Stored
from t5x_lite.sharding import Partitioner
from t5x_lite.train import adapters
from t5x_lite.train import run as runs
from t5x_lite.train.session import Session
from t5x_lite.types import InputError, Params

_HF: Final = "config.json"


def open_model(
    path: str,
    *,
    adapter: str | None = None,
    step: int | Literal["best"] | None = None,
    vocabulary: Vocabulary | None = None,
    partitioner: Partitioner = Partitioner(),
) -> Loaded:
    """The model in a folder, with an adapter if one is named.

    Args:
      path: a run's folder (a tuned run finds its base by itself), or Hugging Face's: config.json,
        safetensors, a tokenizer's files.
      adapter: a PEFT directory, an adapter's folder, or a run's that was tuned on the model in
        `path`.
      step: the checkpoint, of the adapter if that is a run, else of `path`; None: the latest;
        "best": by the run's best_metric.
      vocabulary: None: the run's, or that of the tokenizer's files.
      partitioner: the mesh.

    Raises InputError, one message, for a folder that is not there, not a model's or half-written,
    for an adapter that nobody knows, and for one of another base.
    """
    kind = _kind(path)
    if adapter is not None and (tuned := adapters.kind_of(adapter)) != "peft":
        loaded = _open_tuned(path, adapter, step, partitioner)
    elif kind == "run":
        loaded = _open_run(path, step, partitioner, merged=adapter is not None)
    else:
        if step is not None and adapter is None:
            raise InputError(f"step={step} is for a run's checkpoints, and '{path}' is no run's")
        loaded = _open_hf(path, vocabulary, partitioner)
    if adapter is not None and tuned == "peft":
        transform, trainable = load_peft(adapter, loaded.model, partitioner=partitioner)
        loaded = dataclasses.replace(loaded, params=transform.apply(trainable, loaded.params))
    if vocabulary is not None:
        loaded = dataclasses.replace(loaded, vocabulary=vocabulary)
    known, size = loaded.model.config.vocab_size, loaded.vocabulary.size
    if size > known:
        raise InputError(
            f"the vocabulary {loaded.vocabulary} has {size} tokens, and the model in '{path}' "
            f"{known}: it is not the model's"
        )
    return loaded


def _kind(path: str) -> str:
    """ "run" or "hf"."""
    if not os.path.isdir(path):
        raise InputError(f"no such folder: '{path}'; expected one with a model")
    held = set(os.listdir(path))
    if runs.FILE in held:
        return "run"
    if _HF in held:
        return "hf"
    if held & {adapters.PEFT, adapters.FILE}:
        raise InputError(
            f"'{path}' is an adapter: name its model's folder, and this one as the adapter "
            "(--model_dir=... --adapter=...)"
        )
    half = "; its weights are there, but the copy is not whole" if _weights(held) else ""
    raise InputError(
        f"'{path}' holds no model: expected a run's {runs.FILE} or Hugging Face's {_HF}{half}. "
        "scripts/convert.py reads T5X checkpoints"
    )


def _weights(held: set[str]) -> bool:
    return any(name.endswith((".safetensors", ".bin")) or name == "checkpoints" for name in held)


def _open_run(
    path: str, step: int | Literal["best"] | None, partitioner: Partitioner, *, merged: bool
) -> Loaded:
    run = runs.Run.read(path)
    session, trainable, frozen = runs.load(runs.RunCheckpoint(path, step), partitioner)
    transform = session.transform
    # Quantised weights stay so under an adapter.
    merges = merged and not isinstance(transform, Stored)
    combine = transform.merge if merges else transform.apply
    with partitioner.activate():
        return _of_run(run, session, combine(trainable, frozen))


def _of_run(run: runs.Run, session: Session, params: Params) -> Loaded:
    return Loaded(
        session.model,
        params,
        run.vocabulary,
        session.partitioner,
        labels=run.labels,
        asking=run.asking,
    )


def _open_tuned(
    path: str, adapter: str, step: int | Literal["best"] | None, partitioner: Partitioner
) -> Loaded:
    """A run's or a folder's adapter on the model in `path`, wherever that was when it was tuned."""
    base = adapters.Base(path, partitioner=partitioner)
    found = adapters.attach(adapter, base, step)
    own = adapters.kind_of(adapter) == "run"
    return Loaded(
        found.session.model,
        found.applied(),
        runs.Run.read(adapter).vocabulary if own else base.vocabulary(),
        partitioner,
        labels=found.adapter.labels,
        asking=found.adapter.asking,
    )


def _open_hf(path: str, vocabulary: Vocabulary | None, partitioner: Partitioner) -> Loaded:
    model, params = load_hf(path, partitioner=partitioner)
    told = hf_words.read(path, model.config)
    vocabulary = find_vocabulary(path) if vocabulary is None else vocabulary
    ends = () if told.ends == (vocabulary.eos_id,) else told.ends
    return Loaded(
        model,
        params,
        vocabulary,
        partitioner,
        labels=told.labels,
        end_ids=ends,
        asking=told.asking,
    )
