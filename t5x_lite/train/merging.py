"""Adapters into weights, and several adapters into one: the programs around `peft.combining`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.interop import save_peft
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.transformer import dummy_batch
from t5x_lite.peft.combining import Linear, Method, combine, difference
from t5x_lite.peft.compose import Compose
from t5x_lite.peft.lora import LoRA
from t5x_lite.peft.quantise import find_quantise
from t5x_lite.peft.transform import Full
from t5x_lite.sharding import Partitioner
from t5x_lite.train.adapters import Attached, Base, attach, save_adapter
from t5x_lite.train.convert import save_hf_directory, save_run
from t5x_lite.types import Array, InputError, Params


def merge_adapter(
    *,
    base: str,
    adapter: str,
    output: str,
    to: str = "hf",
    weights: tuple[float, ...] | float = (),
    method: Method = Linear(),
    step: int | None = None,
    tokenizer: str | None = None,
    rows: int = 4,
    length: int = 32,
    partitioner: Partitioner = Partitioner(),
) -> dict[str, float]:
    """Adds an adapter to its base's weights in float32, and writes the whole model.

    It says by how much that changes logits of random tokens: rounding alone.

    Args:
      base: the model: a run's folder, or Hugging Face's.
      adapter: a tuned run's folder, an adapter's, or PEFT's; `FOLDER,FOLDER`: several LoRA's, that
        are combined first.
      output: a folder that is not there yet, or empty.
      to: "hf", for transformers, or "run".
      weights: of several adapters, one for each.
      method: how several are combined; see `combine_adapters`.
      step: the base run's checkpoint; None: the one that the adapter was tuned on, or the latest.
      tokenizer: a folder whose tokenizer files go into to="hf"; None: the base's.
      rows, length: of the batch of random tokens, at least.
      partitioner: the mesh.

    Returns:
      `largest_change` and `largest_logit`. Raises InputError, before anything is written, for an
      adapter of another base, and for one that no weights stand for.
    """
    _check(output, "merge_adapter", to, ("hf", "run"))
    names = _names(adapter)
    under = Base(base, step, partitioner)
    if len(names) == 1 and not weights:
        found = attach(names[0], under)
    else:
        found = _combined(names, under, weights, method)
    merged = found.merged()
    change, largest = logit_change(found, merged, rows, length)
    model, vocabulary = found.session.model, under.vocabulary()
    adapted = found.adapter
    if to == "hf":
        save_hf_directory(output, model, merged, tokenizer, base, adapted.labels)
    else:
        run = dataclasses.replace(adapted, transform=Full(), base_fingerprint=None)
        whole = dataclasses.replace(run.run(vocabulary, found.checkpoint), base=None)
        save_run(output, whole, merged, {}, 0)
    if jax.process_index() == 0:
        print(
            f"'{output}' holds '{base}' with '{adapter}' merged. Largest change of a logit on "
            f"{rows} rows of random tokens: {change:.1e}, of logits up to {largest:.1f}"
        )
    return {"largest_change": change, "largest_logit": largest}


def combine_adapters(
    *,
    base: str,
    adapters: str,
    weights: tuple[float, ...] | float,
    output: str,
    method: Method = Linear(),
    to: str = "adapter",
    step: int | None = None,
    partitioner: Partitioner = Partitioner(),
) -> None:
    """Writes one LoRA adapter made of several for the same base.

    Args:
      base: the model that all of them were tuned on.
      adapters: `FOLDER,FOLDER`: tuned runs', adapters' or PEFT's.
      weights: one for each; negative ones subtract.
      output: a folder that is not there yet, or empty.
      method: `@Linear()`, `@Pruning()`, `@Ties()`, `@Dare()` mix the factors, as PEFT does;
        `@Concatenation()` is the exact sum of the updates, `@Truncation()` its best approximation.
      to: "adapter": a folder of ours, "peft", or "run", to be trained on.
      step: the base run's checkpoint; None: the one that they were tuned on, or the latest.
      partitioner: the mesh.

    Raises InputError, before anything is written, for what can't be combined.
    """
    _check(output, "combine_adapters", to, ("adapter", "peft", "run"))
    under = Base(base, step, partitioner)
    found = _combined(_names(adapters), under, weights, method)
    transform = found.session.transform
    if to == "peft":
        save_peft(output, found.session.model, transform, found.trainable, base=base)
    elif to == "adapter":
        save_adapter(output, found.adapter, found.trainable)
    else:
        run = found.adapter.run(under.vocabulary(), found.checkpoint)
        save_run(output, run, found.trainable, {}, 0)
    if jax.process_index() == 0:
        print(f"'{output}' holds {adapters} as one adapter of '{base}'")


def logit_change(
    found: Attached, merged: Params, rows: int = 4, length: int = 32
) -> tuple[float, float]:
    """By how much merging changes a logit of a batch of random tokens, and the largest logit."""
    session = found.session
    apply = jax.jit(session.model.apply)
    shards = session.partitioner.batch_shards
    batch = random_batch(session.config, -(-rows // shards) * shards, length)
    with session.partitioner.activate():
        expected = apply({"params": found.applied()}, batch)
        change = jnp.max(jnp.abs(apply({"params": merged}, batch) - expected))
        return float(change), float(jnp.max(jnp.abs(expected)))


def random_batch(config: ModelConfig, rows: int, length: int) -> dict[str, Array]:
    """Unpadded rows of tokens at random, always the same."""
    rng = np.random.default_rng(0)
    batch = dict(dummy_batch(config, rows, length))
    for key, value in batch.items():
        if key.endswith("_input_tokens"):
            batch[key] = jnp.asarray(rng.integers(0, config.vocab_size, value.shape), jnp.int32)
    return batch


def _combined(
    names: list[str], base: Base, weights: tuple[float, ...] | float, method: Method
) -> Attached:
    """Several adapters on their base, as one."""
    if isinstance(weights, int | float):  # gin's (0.7) is no tuple
        weights = (weights,)
    if len(weights) != len(names):
        raise InputError(
            f"{len(names)} adapters and {len(weights)} weights: expected one for each, such as "
            f"--weights='({', '.join(['1.0'] * len(names))}{',' if len(names) == 1 else ''})'"
        )
    found = [attach(name, base) for name in names]
    parts = [_low_rank(one, name) for one, name in zip(found, names, strict=True)]
    lora, tree = combine(parts, weights, method)
    quantise = find_quantise(found[0].session.transform)
    transform = lora if quantise is None else Compose((lora, quantise))
    session = dataclasses.replace(found[0].session, transform=transform)
    params = found[0].params
    adapter = dataclasses.replace(
        found[0].adapter, transform=transform, base_fingerprint=session.fingerprint(params)
    )
    placed = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), tree, session.split_shapes[0]
    )
    return Attached(adapter, session, params, placed, found[0].checkpoint)


def _low_rank(found: Attached, name: str) -> tuple[LoRA, Any]:
    """An adapter as a LoRA of the base's weights. Raises InputError for any other."""
    transform, tree = found.session.transform, found.trainable
    if isinstance(transform, Compose):
        parts = [pair for pair in transform.parts(tree) if jax.tree.leaves(pair[1])]
        if len(parts) == 1:
            ((transform, tree),) = parts
    if type(transform) is not LoRA:
        raise InputError(
            f"'{name}' is {type(transform).__name__}, no sum of low-rank updates: only LoRA "
            "adapters can be combined"
        )
    return difference(transform, tree, found.params, found.session.names)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("no adapter is named: expected FOLDER, or FOLDER,FOLDER")
    return names


def _check(output: str, program: str, to: str, known: tuple[str, ...]) -> None:
    if to not in known:
        raise InputError(f"{program}.to='{to}': expected one of {', '.join(known)}")
    if os.path.exists(output) and os.listdir(output):
        raise InputError(f"{program}.output='{output}' is not empty: name a new folder")
