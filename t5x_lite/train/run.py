"""A run's folder: what is in it, and how to get its model back without gin.

run.json            model, transform, vocabulary, base, labels: enough to load and ask the run
config.gin          the operative config: enough to launch it again
vocabulary.model    the vocabulary's file: a SentencePiece model or a tokenizer.json
checkpoints/        see `checkpoint`
metrics.jsonl       one line a record, the same for the same config and seed
timing.jsonl        tokens/s, FLOP/s, MFU
predictions/        what generation wrote, beside its score
profile/            a trace of `train.profile_steps`, if asked for
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
from absl import logging
from jax.sharding import Sharding

from t5x_lite import trees
from t5x_lite.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    Vocabulary,
)
from t5x_lite.decode.asking import Asking
from t5x_lite.interop import choice
from t5x_lite.interop.hf import load_hf, read_hf_config
from t5x_lite.models import config_heads, config_positions
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.peft.bottleneck import Bottleneck
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.ia3 import IA3
from t5x_lite.peft.lora import DoRA, LoRA
from t5x_lite.peft.prefix import PrefixTuning
from t5x_lite.peft.prompt import PromptTuning
from t5x_lite.peft.quantise import Quantise, Stored, find_quantise
from t5x_lite.peft.transform import BitFit, Freeze, Full, Transform
from t5x_lite.records import from_record, to_record
from t5x_lite.sharding import Partitioner
from t5x_lite.train import initial
from t5x_lite.train.checkpoint import Checkpointer, find_step
from t5x_lite.train.session import Session
from t5x_lite.types import InputError, Params

FILE = "run.json"
VOCABULARY_FILE = "vocabulary.model"
CLASSES = (
    ModelConfig,
    StackConfig,
    *config_positions.CLASSES,
    *config_heads.CLASSES,
    Full,
    Freeze,
    LoRA,
    DoRA,
    IA3,
    BitFit,
    Bottleneck,
    Compose,
    PrefixTuning,
    PromptTuning,
    Quantise,
    Stored,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    ByteVocabulary,
)


@dataclass(frozen=True)
class RunCheckpoint:
    """Weights to start from: a run's folder, and a step (None: the latest).

    Or a Hugging Face directory, which has no steps. Where the new model is another, `restore` says
    which of its parameters are found where: see `initial`.
    """

    model_dir: str
    step: int | Literal["best"] | None = None  # "best": by its CheckpointPolicy.best_metric
    restore: tuple[initial.Rule, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "restore", tuple((ours, its) for ours, its in self.restore))

    @property
    def is_hf(self) -> bool:
        """Whether the folder is Hugging Face's, and no run's."""
        held = set(os.listdir(self.model_dir)) if os.path.isdir(self.model_dir) else set()
        return "config.json" in held and FILE not in held


@dataclass(frozen=True)
class Run:
    """What `run.json` says."""

    model: ModelConfig
    transform: Transform
    vocabulary: Vocabulary
    vocabulary_fingerprint: str
    base: RunCheckpoint | None = None  # where frozen parameters come from
    base_fingerprint: str | None = None  # of the base's parameters that are not trained
    seed: int = 0  # what fresh weights were drawn from
    labels: tuple[str, ...] = ()  # names of what a SequenceHead or TokenHead tells apart, in order
    asking: Asking = Asking()  # how it was trained to be asked

    def write(self, model_dir: str) -> None:
        """Writes `run.json` and the vocabulary's file beside it."""
        os.makedirs(model_dir, exist_ok=True)
        vocabulary = to_record(self.vocabulary.stored(os.path.join(model_dir, VOCABULARY_FILE)))
        if "path" in vocabulary:
            vocabulary["path"] = VOCABULARY_FILE  # the folder may move
        record = {
            "model": to_record(self.model),
            "transform": to_record(self.transform),
            "vocabulary": {**vocabulary, "fingerprint": self.vocabulary_fingerprint},
            "base": None if self.base is None else dataclasses.asdict(self.base),
            "base_fingerprint": self.base_fingerprint,
            "seed": self.seed,
            "labels": list(self.labels),
            "asking": dataclasses.asdict(self.asking),
        }
        temporary = os.path.join(model_dir, FILE + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
            file.write("\n")
        os.replace(temporary, os.path.join(model_dir, FILE))

    @classmethod
    def read(cls, model_dir: str) -> Run:
        """Raises InputError unless `model_dir` is a run's folder with a readable `run.json`."""
        path = os.path.join(model_dir, FILE)
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
        except FileNotFoundError as error:
            raise InputError(
                f"'{model_dir}' is not a run's folder: it has no {FILE}. Expected a folder that "
                "scripts/train.py wrote (train.model_dir)"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"'{path}' is not readable JSON: {error}") from error
        try:
            vocabulary = dict(record["vocabulary"])
            fingerprint = vocabulary.pop("fingerprint")
            if "path" in vocabulary:
                vocabulary["path"] = os.path.join(model_dir, vocabulary["path"])
            base = record["base"]
            return cls(
                model=from_record(record["model"], CLASSES),
                transform=from_record(record["transform"], CLASSES),
                vocabulary=from_record(vocabulary, CLASSES),
                vocabulary_fingerprint=fingerprint,
                base=None if base is None else RunCheckpoint(**base),
                base_fingerprint=record["base_fingerprint"],
                seed=record["seed"],
                # Runs of before had neither.
                labels=tuple(record.get("labels", ())),
                asking=Asking(**record.get("asking", {})),
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"'{path}' is not the record of a run of this version: {error!r}"
            ) from error


def load_params(
    source: RunCheckpoint,
    config: ModelConfig,
    partitioner: Partitioner,
    seed: int = 0,
    away: Mapping[str, Sharding] | None = None,
) -> Params:
    """A model's parameters, merged, in the shapes and shardings of `config`'s base model.

    `config` may differ from the run's in what parameters do not depend on (dropout, dtype, remat),
    and in what `source.restore` tells; fresh ones are drawn from `seed`. What has a sharding in
    `away`, by path, is read to there, where it is neither merged nor found by `source.restore`; all
    else is on the devices. Raises InputError where shapes differ, where there is no checkpoint, or
    where a tuned run's base is no longer what it was tuned on.
    """
    own, read = (None, None) if source.restore else (config, away)
    if own is not None:
        _check_same(source, own)
    if source.is_hf:
        _, found = load_hf(
            source.model_dir, partitioner=partitioner, param_dtype=config.param_dtype, away=read
        )
    else:
        session, trainable, frozen = load(source, partitioner, own, read)
        found = session.transform.merge(trainable, frozen)
    if not source.restore:
        return found
    target = Session(config, partitioner=partitioner, seed=seed)
    return initial.fill(target, found, source.restore, source.model_dir)


def load_base(source: RunCheckpoint, session: Session) -> Params:
    """What `session.split` takes: `load_params`, but quantised weights come as they are.

    They are never made whole on the way. Raises InputError as `check_base` does.
    """
    config, partitioner = session.config, session.partitioner
    if not check_base(source, session):
        return load_params(source, config, partitioner, session.seed, session.away)
    if not source.restore:
        _check_same(source, config)
    own = None if source.restore else config
    stored, trainable, frozen = load(source, partitioner, own)
    found = stored.transform.apply(trainable, frozen)
    if not source.restore:
        return found
    return initial.fill(session, found, source.restore, source.model_dir)


def check_base(source: RunCheckpoint, session: Session) -> bool:
    """Whether `source` holds quantised weights.

    Raises InputError if it does and the session's transform keeps no quantised weights, other ones,
    or trains them.
    """
    run = None if source.is_hf else Run.read(source.model_dir)
    if run is None or not isinstance(run.transform, Stored):
        return False
    _check_quantise(source.model_dir, run.transform.quantise, session)
    return True


def _check_quantise(where: str, theirs: Quantise, session: Session) -> None:
    """Raises InputError unless weights quantised by `theirs` can stand in the session."""
    ours = find_quantise(session.transform)
    if ours is None:
        raise InputError(
            f"the weights in '{where}' are quantised, and {type(session.transform).__name__} needs "
            "them in full: take the folder they were made from, or tune anew beside them, by "
            f"--gin_file=peft/qlora.gin or any transform composed with {theirs}"
        )
    if ours != theirs:
        raise InputError(
            f"the weights in '{where}' are quantised as {theirs}, and this run's transform has "
            f"{ours}: make the two alike"
        )
    base = trees.flatten(session.base_shapes)
    trained = trees.flatten(session.split_shapes[0])
    if clash := [path for path in trained if path in base and theirs.takes(path)]:
        raise InputError(
            f"'{clash[0]}' is to be trained, and the weights in '{where}' have it quantised: start "
            "from the folder that they were made from"
        )


def _check_same(source: RunCheckpoint, config: ModelConfig) -> None:
    """Raises InputError where weights would be read into a model that computes something else."""
    theirs = read_hf_config(source.model_dir) if source.is_hf else Run.read(source.model_dir).model
    if different := choice.differences(choice.essence(theirs), choice.essence(config)):
        raise InputError(
            f"the weights in '{source.model_dir}' are of another model than this one: "
            f"{', '.join(different)}. Take that folder's own, @run_model(), or say with "
            "RunCheckpoint.restore what is to be read from where"
        )


def load(
    source: RunCheckpoint,
    partitioner: Partitioner,
    config: ModelConfig | None = None,
    away: Mapping[str, Sharding] | None = None,
) -> tuple[Session, Params, Params]:
    """A run's `(session, trainable, frozen)`; its base is loaded in turn.

    All on the devices, but of a model that was trained whole what is `away`, by path.
    """
    run = Run.read(source.model_dir)
    partitioner = partitioner.at_hand()
    session = Session(config or run.model, run.transform, partitioner, run.seed)
    whole = isinstance(run.transform, Full)
    trainable = load_trainable(source, session, away if whole else None)
    return session, trainable, load_frozen(run, session)


def load_trainable(
    source: RunCheckpoint, session: Session, away: Mapping[str, Sharding] | None = None
) -> Params:
    """A checkpoint's trainable parameters, for a session of its run; see `load` for `away`."""
    shapes = trees.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=(away or {}).get(path, x.sharding)
        ),
        session.split_shapes[0],
    )
    step = find_step(source.model_dir, source.step)
    checkpointer = Checkpointer(source.model_dir)
    try:
        trainable = checkpointer.restore_params(step, shapes)
    finally:
        checkpointer.close()
    logging.info(
        "restored %d trainable parameters of %s, step %d",
        trees.count(trainable),
        source.model_dir,
        step,
    )
    return trainable


def load_frozen(run: Run, session: Session) -> Params:
    """The frozen parameters that a run was tuned beside; empty for full fine-tuning."""
    if not trees.flatten(session.split_shapes[1]):
        return {}
    base = session.init_base() if run.base is None else load_base(run.base, session)
    found = session.fingerprint(base)
    if run.base_fingerprint != found:
        where = "its seed" if run.base is None else f"'{run.base.model_dir}'"
        raise InputError(
            f"the frozen weights from {where} have fingerprint {found}, but this run was tuned on "
            f"{run.base_fingerprint}: adapters only fit the base they were trained beside"
        )
    return session.split(base)[1]
