"""Adapters as folders to hand on, and any adapter put on the model that it belongs to.

adapter.json            transform, model, what base (by fingerprint), labels: all but the weights
adapter.safetensors     what was trained, by path
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import numpy as np
import safetensors
import safetensors.flax
from absl import logging
from jax.experimental import multihost_utils

from t5x_lite import trees
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.asking import Asking
from t5x_lite.interop import hf_words, load_peft, read_hf_config
from t5x_lite.interop.hf_tokenizers import find_vocabulary
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.transformer import Transformer
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.quantise import Quantise, Stored, find_quantise
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.records import from_record, to_record
from t5x_lite.sharding import Partitioner
from t5x_lite.train import run as runs
from t5x_lite.train.checkpoint import all_steps, find_step
from t5x_lite.train.session import Session
from t5x_lite.types import InputError, Params

FILE: Final = "adapter.json"
WEIGHTS: Final = "adapter.safetensors"
PEFT: Final = "adapter_config.json"
_SHOWN: Final = 8


@dataclass(frozen=True)
class Adapter:
    """What `adapter.json` says: what a tuned run's `run.json` does, but for the vocabulary."""

    model: ModelConfig
    transform: Transform
    base_fingerprint: str | None
    base: runs.RunCheckpoint | None = None  # where it was, for him who tuned it
    seed: int = 0
    labels: tuple[str, ...] = ()
    asking: Asking = Asking()

    @classmethod
    def of_run(cls, run: runs.Run, where: str) -> Adapter:
        """Raises InputError for a run, from `where`, that is no adapter."""
        if isinstance(run.transform, Full | Stored):
            raise InputError(
                f"'{where}' is no adapter: it holds a whole model; name it as the model"
            )
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: getattr(run, name) for name in fields})

    def run(self, vocabulary: Vocabulary, base: runs.RunCheckpoint) -> runs.Run:
        """The record of a run with this adapter beside a base."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return runs.Run(
            **{**fields, "base": base},
            vocabulary=vocabulary,
            vocabulary_fingerprint=vocabulary.fingerprint,
        )


def save_adapter(directory: str, adapter: Adapter, trainable: Params) -> None:
    """Writes an adapter's folder; the record comes last, and makes it one."""
    found = {path: _fetch(leaf) for path, leaf in trees.flatten(trainable).items()}
    if jax.process_index() != 0:
        return
    os.makedirs(directory, exist_ok=True)
    safetensors.flax.save_file(found, os.path.join(directory, WEIGHTS))
    record = {
        "model": to_record(adapter.model),
        "transform": to_record(adapter.transform),
        "base_fingerprint": adapter.base_fingerprint,
        "base": None if adapter.base is None else dataclasses.asdict(adapter.base),
        "seed": adapter.seed,
        "labels": list(adapter.labels),
        "asking": dataclasses.asdict(adapter.asking),
    }
    temporary = os.path.join(directory, FILE + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
    os.replace(temporary, os.path.join(directory, FILE))


def read_adapter(directory: str) -> Adapter:
    """Raises InputError for a folder that holds no adapter of ours, and for a damaged record."""
    path = os.path.join(directory, FILE)
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        base = record["base"]
        return Adapter(
            model=from_record(record["model"], runs.CLASSES),
            transform=from_record(record["transform"], runs.CLASSES),
            base_fingerprint=record["base_fingerprint"],
            base=None if base is None else runs.RunCheckpoint(**base),
            seed=record["seed"],
            labels=tuple(record["labels"]),
            asking=Asking(**record["asking"]),
        )
    except OSError as error:
        raise InputError(f"'{directory}' is no adapter's folder: it has no {FILE}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{path}' is not the record of an adapter: {error!r}") from error


def load_weights(directory: str, session: Session) -> Params:
    """What an adapter's folder holds, for a session of its model and transform, in its places.

    Raises InputError for a damaged file, and for arrays that are not the transform's.
    """
    path = os.path.join(directory, WEIGHTS)
    try:
        found = safetensors.flax.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"'{path}' is damaged or cut short: {error}. Copy it again") from error
    wanted = trees.flatten(session.split_shapes[0])
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted.keys() - found]
    problems += [f"unexpected {name} {found[name].shape}" for name in found.keys() - wanted]
    problems += [
        f"{name} is {found[name].shape}, the transform's is {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:_SHOWN])
        raise InputError(f"'{path}' does not fit its transform:\n  {shown}")
    return trees.map_with_path(
        lambda name, like: jax.device_put(found[name].astype(like.dtype), like.sharding),
        session.split_shapes[0],
    )


class Base:
    """A model's folder that adapters are put on: a run's, or Hugging Face's. Weights are read once.

    Raises InputError for another folder, from whatever reads it.
    """

    def __init__(
        self, path: str, step: int | None = None, partitioner: Partitioner = Partitioner()
    ):
        held = set(os.listdir(path)) if os.path.isdir(path) else set()
        if runs.FILE not in held and held & {FILE, PEFT}:
            raise InputError(f"'{path}' is an adapter: expected a whole model")
        self.path, self.step, self.partitioner = path, step, partitioner.at_hand()
        self._is_hf = runs.RunCheckpoint(path).is_hf
        self._run = None if self._is_hf else runs.Run.read(path)
        self._read: tuple[Any, Params] = (None, None)

    @property
    def model(self) -> ModelConfig:
        return read_hf_config(self.path) if self._run is None else self._run.model

    def vocabulary(self) -> Vocabulary:
        return find_vocabulary(self.path) if self._run is None else self._run.vocabulary

    @property
    def told(self) -> tuple[tuple[str, ...], Asking]:
        """Labels, and how it is asked."""
        told = hf_words.read(self.path, self.model) if self._run is None else self._run
        return told.labels, told.asking

    def checkpoint(self, pinned: runs.RunCheckpoint | None) -> runs.RunCheckpoint:
        """The checkpoint that an adapter was tuned on, for its base may have gone on; or the one
        that is asked for, or the latest."""
        step, restore = (None, ()) if pinned is None else (pinned.step, pinned.restore)
        if self._is_hf:
            return runs.RunCheckpoint(self.path, None, restore)
        kept = self.step is None and step in all_steps(self.path)
        return runs.RunCheckpoint(
            self.path, step if kept else find_step(self.path, self.step), restore
        )

    @property
    def quantise(self) -> Quantise | None:
        """How its weights are stored in codes, if they are."""
        stored = None if self._run is None else self._run.transform
        return stored.quantise if isinstance(stored, Stored) else None

    def params(self, session: Session, checkpoint: runs.RunCheckpoint) -> Params:
        key = (session.config, session.seed, find_quantise(session.transform), checkpoint)
        if self._read[0] != key:
            self._read = key, runs.load_base(checkpoint, session)
        return self._read[1]


@dataclass(frozen=True)
class Attached:
    """An adapter on its base."""

    adapter: Adapter
    session: Session
    params: Params = dataclasses.field(repr=False)  # the base's, as they are without it
    trainable: Params = dataclasses.field(repr=False)
    checkpoint: runs.RunCheckpoint  # where the base is

    @functools.cached_property
    def frozen(self) -> Params:
        return self.session.split(self.params)[1]

    def applied(self) -> Params:
        with self.session.partitioner.activate():
            return self.session.transform.apply(self.trainable, self.frozen)

    def merged(self) -> Params:
        """Whole weights. Raises InputError for what can't be merged."""
        with self.session.partitioner.activate():
            return jax.jit(self.session.transform.merge)(self.trainable, self.frozen)


def kind_of(path: str) -> Literal["run", "adapter", "peft"]:
    """Of an adapter's folder. Raises InputError for any other."""
    held = set(os.listdir(path)) if os.path.isdir(path) else set()
    if runs.FILE in held:
        return "run"
    if FILE in held:
        return "adapter"
    if PEFT in held:
        return "peft"
    what = f"no such folder: '{path}'" if not os.path.isdir(path) else f"'{path}' is no adapter"
    raise InputError(
        f"{what}; expected PEFT's with {PEFT}, ours with {FILE}, or a run's with {runs.FILE} that "
        "was tuned on the model"
    )


def attach(path: str, base: Base, step: int | Literal["best"] | None = None) -> Attached:
    """The adapter in a folder, of any kind, on a base.

    Args:
      path: a tuned run's folder, an adapter's, or PEFT's.
      base: the model that it was tuned on, wherever that is now. PEFT's folders don't say what
        they belong to: only shapes are checked.
      step: of a run.

    Raises InputError, one message, for a base with another fingerprint or of another shape.
    """
    kind = kind_of(path)
    if kind == "peft":
        model = base.model
        transform, trainable = load_peft(path, Transformer(model), partitioner=base.partitioner)
        checkpoint = base.checkpoint(None)
        if base.quantise is not None:
            transform = Compose((transform, base.quantise))
        session = Session(model, transform, base.partitioner)
        params = base.params(session, checkpoint)
        labels, asking = base.told
        adapter = Adapter(
            model, transform, session.fingerprint(params), checkpoint, labels=labels, asking=asking
        )
        logging.info("'%s' does not say what base it belongs to; its shapes fit", path)
        return Attached(adapter, session, params, trainable, checkpoint)
    run = runs.Run.read(path) if kind == "run" else None
    adapter = read_adapter(path) if run is None else Adapter.of_run(run, path)
    session = Session(adapter.model, adapter.transform, base.partitioner, adapter.seed)
    try:
        checkpoint = base.checkpoint(adapter.base)
        params = base.params(session, checkpoint)
    except InputError as error:
        raise InputError(f"the adapter '{path}' does not go on '{base.path}': {error}") from error
    found = session.fingerprint(params)
    if found != adapter.base_fingerprint:
        raise InputError(
            f"the adapter '{path}' was tuned on weights of fingerprint {adapter.base_fingerprint}, "
            f"and those in '{base.path}' have {found}: name the model that it was tuned on"
        )
    if run is None:
        trainable = load_weights(path, session)
    else:
        trainable = runs.load_trainable(runs.RunCheckpoint(path, step), session)
    return Attached(adapter, session, params, trainable, checkpoint)


def _fetch(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return jax.numpy.asarray(np.asarray(leaf))
