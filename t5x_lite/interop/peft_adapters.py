"""Adapters of Hugging Face PEFT in and out: a JSON config beside a safetensors file.

model, base = load_hf("t5-small")
transform, trainable = load_peft("adapter", model)
model.apply({"params": transform.apply(trainable, base)}, batch)
save_peft("out", model, transform, trainable, base="t5-small")
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

import jax
import numpy as np

from t5x_lite import trees
from t5x_lite.interop import peft_files, peft_ia3, peft_lora, peft_prompts
from t5x_lite.interop.hf import ARCHITECTURES
from t5x_lite.interop.name_maps import Architecture
from t5x_lite.interop.peft_modules import find_modules
from t5x_lite.models import transformer
from t5x_lite.models.transformer import Transformer
from t5x_lite.peft.combining import difference
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.ia3 import IA3
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.transform import Transform
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError, Params

# By PEFT's name and by ours: a module with PARTS, EXPECTED, `load` and `save`.
_LOADED: Final[dict[str, ModuleType]] = {"LORA": peft_lora, "IA3": peft_ia3}
_SAVED: Final[tuple[tuple[type[Transform], ModuleType], ...]] = (
    (LoRA, peft_lora),
    (IA3, peft_ia3),
)


def load_peft(
    directory: str,
    model: Transformer,
    *,
    partitioner: Partitioner | None = None,
    architectures: Sequence[Architecture] = ARCHITECTURES,
) -> tuple[Transform, Params]:
    """A PEFT adapter as a transform of the model's parameters, and its trainable tree.

    LoRA (rsLoRA and DoRA with it), IA3, prompts and prefixes, exactly as their configs say; see
    `peft_lora.load`, `peft_ia3.load` and `peft_prompts.load_prompt`.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      model: what the adapter was trained on, as `load_hf` gives it.
      partitioner: places the adapter by its axes; None: on the first device.
      architectures: as for `load_hf`.

    Raises InputError for adapters of another kind, for modules that the model lacks, wrong shapes
    and damaged files, naming them.
    """
    settings = peft_files.read_config(directory)
    kind = settings.get("peft_type")
    if kind in peft_prompts.KINDS:
        tensors = peft_files.read_weights(directory)
        transform, tree = peft_prompts.load_prompt(directory, settings, tensors, model)
        names = trees.flatten(transformer.axes(model), is_leaf=lambda leaf: isinstance(leaf, tuple))
        return transform, _placed(transform, trees.flatten(tree), names, partitioner)
    if kind not in _LOADED:
        raise InputError(
            f"'{directory}' is an adapter with peft_type={kind!r}: expected one of "
            f"{', '.join((*_LOADED, *peft_prompts.KINDS))}. Merge it with PEFT (merge_and_unload), "
            "save the model, and load that"
        )
    reader = _LOADED[kind]
    peft_files.check_settings(directory, settings, reader.EXPECTED, kind)
    tensors = peft_files.read_weights(directory)
    found = peft_files.by_module(directory, tensors, reader.PARTS)
    modules = find_modules(model.config, architectures, found)
    transform, leaves = reader.load(directory, settings, found, modules)
    return transform, _placed(transform, leaves, modules.names, partitioner)


def save_peft(
    directory: str,
    model: Transformer,
    transform: Transform,
    trainable: Params,
    *,
    base: str | None = None,
    params: Params | None = None,
    architectures: Sequence[Architecture] = ARCHITECTURES,
) -> None:
    """Writes an adapter that PEFT loads; the inverse of `load_peft`.

    PiSSA's factors replace a part of the base, so that it is written as what it adds to it: a LoRA
    of twice the rank. Of a Compose, the one transform that trains something is written.

    Args:
      directory: made if need be.
      model: the model that was tuned.
      transform, trainable: one of those that `load_peft` gives, and its trainable tree.
      base: what PEFT shall take for the base model: a folder or a name on the hub.
      params: the base's parameters, before it was split; PiSSA alone needs them.
      architectures: as for `load_hf`.

    Raises InputError for another transform, and for adapted parameters that are no linear module of
    the architecture's (embeddings).
    """
    transform, trainable = _alone(transform, trainable)
    if isinstance(transform, peft_prompts.TRANSFORMS):
        peft_prompts.save_prompt(directory, model, transform, trainable, base=base)
        return
    writer = next((own for kind, own in _SAVED if isinstance(transform, kind)), None)
    if writer is None:
        raise InputError(
            f"PEFT knows no {type(transform).__name__} of ours: expected a LoRA, DoRA, IA3, "
            "PromptTuning or PrefixTuning"
        )
    modules = find_modules(model.config, architectures)
    if isinstance(transform, LoRA) and transform.init == "pissa":
        if params is None:
            raise InputError(
                "PiSSA's adapter is written as what it adds to its base: save_peft needs the "
                "base's `params`"
            )
        transform, trainable = difference(
            transform, trainable, params, trees.unflatten(modules.names)
        )
    flat = {path: peft_files.fetch(leaf) for path, leaf in trees.flatten(trainable).items()}
    settings, tensors = writer.save(transform, flat, modules)
    named = {
        "peft_type": settings.pop("peft_type"),
        "task_type": peft_files.task(model.config),
        "base_model_name_or_path": base,
    }
    peft_files.write(directory, named | settings, tensors)


def _alone(transform: Transform, trainable: Params) -> tuple[Transform, Params]:
    """The one part of a Compose that trains something."""
    if not isinstance(transform, Compose):
        return transform, trainable
    parts = [(part, own) for part, own in transform.parts(trainable) if jax.tree.leaves(own)]
    if len(parts) != 1:
        names = " and ".join(type(part).__name__ for part, _ in parts)
        raise InputError(
            f"PEFT has no adapter that is {names} at once: merge it (scripts/merge_adapter.py), or "
            "hand it on as a folder of ours (convert --to=adapter)"
        )
    return parts[0]


def _placed(
    transform: Transform,
    leaves: dict[str, np.ndarray],
    names: Any,
    partitioner: Partitioner | None,
) -> Params:
    tree = trees.unflatten(leaves)
    if partitioner is None:
        return jax.tree.map(jax.numpy.asarray, tree)
    shardings = partitioner.tree_shardings(tree, transform.split_names(trees.unflatten(names))[0])
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: leaf[index]
        ),
        tree,
        shardings,
    )
