"""Hugging Face's models in and out: a directory with `config.json` and safetensors.

    model, params = load_hf("bert-base-uncased")
    save_hf("out", model, params, tokenizer="bert-base-uncased")

One leaf at a time goes from the file to its devices, and one file's tensors at a time come back,
so the host never holds the model twice.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np

from t5x_lite import trees
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.interop import choice, sentence_vectors
from t5x_lite.interop import safetensors_files as files
from t5x_lite.interop.binding import Binding
from t5x_lite.interop.hf_bart import BART
from t5x_lite.interop.hf_bert import BERT, ROBERTA
from t5x_lite.interop.hf_gpt2 import GPT2
from t5x_lite.interop.hf_llama import LLAMA
from t5x_lite.interop.hf_t5 import T5
from t5x_lite.interop.name_maps import Architecture, Settings, Tensors
from t5x_lite.interop.settings import refuse, special_tokens, write_labels
from t5x_lite.models import transformer
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.config_heads import EmbeddingHead
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError, Params

ARCHITECTURES: Final = (T5, BERT, ROBERTA, GPT2, LLAMA, BART)
CONFIG: Final = "config.json"
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


def load_hf(
    directory: str,
    *,
    partitioner: Partitioner | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    away: Mapping[str, Any] | None = None,
    architectures: Sequence[Architecture] = ARCHITECTURES,
) -> tuple[transformer.Transformer, Params]:
    """A model and its parameters from a directory that Hugging Face transformers wrote.

    Args:
      directory: with `config.json`, and `model.safetensors` or `model.safetensors.index.json` and
        the files that it lists.
      partitioner: places every leaf by its axes, as training does; None: on the first device.
      dtype: the model's compute dtype.
      param_dtype: of the parameters, whatever the file's.
      away: shardings of leaves that go elsewhere than the partitioner says, by path.
      architectures: those that are known; `[*ARCHITECTURES, MINE]` adds one (docs/add_a_model.md).

    Returns:
      `(model, params)`, with `model.config` made from `config.json`. A class without a head, such
      as BertModel, gets an EmbeddingHead, as sentence-transformers' `modules.json` describes it or
      of the mean, and its pooler is left out.

    Raises:
      InputError: for an architecture that is not known, a setting that our models don't compute, a
        file that is damaged, and tensors that are missing, unexpected or of a wrong shape: one
        message with the names.
    """
    architecture, settings, tensors, config = _open(directory, architectures)
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype)
    model = transformer.Transformer(config)
    structs = _structs(model)
    try:
        base = choice.base_of(architecture, settings, config, tensors)
        sources = Binding.of(architecture, config, base, _shapes(structs)).read(tensors)
    except InputError as error:
        raise InputError(f"'{directory}': {error}") from error
    if partitioner is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings: Mapping[str, Any] = dict.fromkeys(sources, first)
    else:
        shardings = trees.flatten(partitioner.tree_shardings(structs, transformer.axes(model)))
    shardings = {**shardings, **(away or {})}
    return model, trees.unflatten(
        {
            path: _place(struct, shardings[path], sources[path])
            for path, struct in trees.flatten(structs).items()
        }
    )


def read_hf_config(
    directory: str, *, architectures: Sequence[Architecture] = ARCHITECTURES
) -> ModelConfig:
    """The config of the model that `load_hf` loads, without its weights. InputError: as there."""
    return _open(directory, architectures)[3]


def save_hf(
    directory: str,
    model: transformer.Transformer,
    params: Params,
    *,
    tokenizer: str | None = None,
    vocabulary: Vocabulary | None = None,
    labels: Sequence[str] = (),
    architectures: Sequence[Architecture] = ARCHITECTURES,
    file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that Hugging Face transformers loads; the inverse of `load_hf`.

    Args:
      directory: made if need be; one that holds weights already is an error.
      model: of a config that one of the architectures can express.
      params: its parameters, as plain arrays: merge adapters first. Their dtype is the file's.
      tokenizer: a directory whose tokenizer files are copied; the special tokens and the labels'
        names in its config.json come with them.
      vocabulary: whose ids of special tokens are written where no tokenizer's config.json says
        them; None: those that the architecture was published with.
      labels: names of the head's labels, in order; () leaves those of the tokenizer's config.json,
        or else LABEL_0, LABEL_1, ...
      architectures: as for `load_hf`; the first that can express the config is taken.
      file_bytes: larger models are split into files of at most so many bytes, with an index. So
        much is held on the host at a time.

    Raises:
      InputError: for a config that no architecture expresses (with each one's reason), params that
        are not the model's, a vocabulary that is not, and a directory that is in use.
    """
    held = [name for name in files.listed(directory) if name.endswith(".safetensors")]
    if held:
        raise InputError(f"'{directory}' holds a model already ({held[0]}): choose another")
    shapes = _shapes(_structs(model))
    given = trees.flatten(params)
    if _shapes(params) != shapes:
        raise InputError(
            "these parameters are not the model's: "
            + _difference(shapes, _shapes(params))
            + " (adapters are merged before saving)"
        )
    architecture, settings = choice.choose(model.config, architectures)
    base = architecture.classes[settings["architectures"][0]]
    binding = Binding.of(architecture, model.config, base, shapes)
    dtype = np.dtype(next(iter(given.values())).dtype)
    settings |= {"model_type": architecture.model_type, "torch_dtype": dtype.name}
    carried = {} if tokenizer is None else _carried(tokenizer, architecture, settings)
    if not carried and vocabulary is not None:
        settings = special_tokens(settings, vocabulary, model.config)
    settings |= carried
    if different := choice.misread(model.config, architecture, settings):
        raise InputError(
            f"with this vocabulary's special tokens, {architecture.model_type} would be another "
            f"model: {', '.join(different)}"
        )
    if labels:
        if len(labels) != len(settings.get("id2label") or ()):
            raise InputError(
                f"labels={tuple(labels)}: not those of the model's {model.config.head}"
            )
        settings |= write_labels(labels)
    constants = {name: x.astype(dtype) for name, x in architecture.constants(model.config).items()}
    tensors = itertools.chain(constants.items(), binding.write(given))
    if jax.process_index() != 0:
        collections.deque(tensors, maxlen=0)
        return
    os.makedirs(directory, exist_ok=True)
    their_shapes = {name: x.shape for name, x in constants.items()} | binding.their_shapes()
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in their_shapes.items()}
    files.Writer(directory, sizes, file_bytes).write(tensors)
    if tokenizer is not None:
        for name in _tokenizer_files(tokenizer):
            shutil.copyfile(os.path.join(tokenizer, name), os.path.join(directory, name))
    if isinstance(model.config.head, EmbeddingHead):
        sentence_vectors.write_head(directory, model.config.head, model.config.embed_dim)
    # Last: a directory without it was not finished.
    files.write_json(os.path.join(directory, CONFIG), settings)


def _open(
    directory: str, architectures: Sequence[Architecture]
) -> tuple[Architecture, Settings, Tensors, ModelConfig]:
    """What a directory holds: nothing of the tensors is read but their names and shapes."""
    if not os.path.isdir(directory):
        raise InputError(f"'{directory}' is not a directory: expected one with {CONFIG}")
    settings = files.read_json(os.path.join(directory, CONFIG))
    try:
        architecture = choice.known(settings, architectures)
        refuse(settings, {"quantization_config": None})
        tensors = choice.today(files.open_tensors(directory), architecture)
        config = _read_config(architecture, settings, tensors)
        if isinstance(config.head, EmbeddingHead):
            config = dataclasses.replace(config, head=sentence_vectors.read_head(directory))
    except InputError as error:
        raise InputError(f"'{directory}': {error}") from error
    return architecture, settings, tensors, config


def _read_config(architecture: Architecture, settings: Settings, tensors: Tensors) -> ModelConfig:
    try:
        return architecture.read(settings, tensors)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"config.json lacks the setting {error}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"config.json has a setting that makes no {architecture.model_type}: {error}"
        ) from error


def _structs(model: transformer.Transformer) -> Params:
    return transformer.shapes(model)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}


def _place(struct: Any, sharding: Any, layers: list[np.ndarray]) -> jax.Array:
    """A leaf on its devices, each part copied from the views of its layers as it is asked for.

    Views `layers` are one for each index of the first axis, or a single one of the whole.
    """
    stacked = layers[0].ndim < len(struct.shape)
    copies: dict[str, np.ndarray] = {}

    def copy(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)  # devices that hold the same part share one copy
        if key not in copies:
            if stacked:
                parts = [layer[index[1:]] for layer in layers[index[0]]]
                copies[key] = np.stack(parts, dtype=struct.dtype, casting="unsafe")
            else:
                copies[key] = np.array(layers[0][index], struct.dtype, order="C")
        return copies[key]

    return jax.block_until_ready(jax.make_array_from_callback(struct.shape, sharding, copy))


def _difference(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """The first few paths that only one side has, or of which the shapes differ."""
    paths = [path for path in {**expected, **found} if expected.get(path) != found.get(path)]
    texts = [f"{p} is {found.get(p)}, expected {expected.get(p)}" for p in paths[:4]]
    return "; ".join(texts) + ("; ..." if len(paths) > 4 else "")


def _tokenizer_files(directory: str) -> list[str]:
    found = [name for name in TOKENIZER_FILES if os.path.exists(os.path.join(directory, name))]
    if not found:
        raise InputError(
            f"'{directory}' holds no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}"
        )
    return found


def _carried(tokenizer: str, architecture: Architecture, settings: Settings) -> dict[str, Any]:
    """Settings of the tokenizer's config.json that go with it: special tokens, labels' names."""
    _tokenizer_files(tokenizer)
    path = os.path.join(tokenizer, CONFIG)
    theirs = files.read_json(path) if os.path.exists(path) else {}
    if theirs.get("model_type") != settings["model_type"]:
        return {}
    carried = {key: x for key, x in theirs.items() if re.fullmatch(architecture.carried, key)}
    if len(theirs.get("id2label") or ()) == len(settings.get("id2label") or ()):
        carried |= {key: theirs[key] for key in ("id2label", "label2id") if key in theirs}
    return carried
