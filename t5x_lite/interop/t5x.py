"""T5X's checkpoints in: parameters, and Adafactor's state.

`load_t5x("t5_1_1_small/checkpoint_1000000")` gives a model and its parameters. Native and Orbax
files, layers one by one and scanned, encoder-decoders and decoders; see `t5x_files`, `t5x_layout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import trees
from t5x_lite.interop import t5x_files, t5x_layout
from t5x_lite.interop.t5x_files import StoredArray
from t5x_lite.interop.t5x_layout import Stored
from t5x_lite.models import transformer
from t5x_lite.models.config import ModelConfig, StackConfig
from t5x_lite.models.config_heads import LMHead
from t5x_lite.models.config_positions import RelativeBias
from t5x_lite.models.transformer import Transformer
from t5x_lite.sharding import Partitioner
from t5x_lite.types import InputError, Params

_SHOWN = 8  # problems in one message


@dataclass(frozen=True)
class AdafactorMoments:
    """Adafactor's state by our parameter's path, in no optimizer's structure.

    Every array has its parameter's rank, with 1 in place of dimensions over which a mean was taken.
    `t5x_lite.train.imported` turns it into the state of our Adafactor.
    """

    step: int
    # Means of the squared gradients, float32: the full one, or two that are factors of it.
    second: Mapping[str, tuple[np.ndarray, ...]]
    # What was subtracted from parameters, averaged; empty without momentum.
    first: Mapping[str, np.ndarray]


def load_t5x(
    directory: str, *, config: ModelConfig | None = None, partitioner: Partitioner | None = None
) -> tuple[Transformer, Params]:
    """A model and its parameters from a T5X checkpoint.

    Parameters are read one at a time and placed before the next is read.

    Args:
      directory: a checkpoint's folder, or one of several named `checkpoint_<step>`: the latest.
      config: what the checkpoint holds, checked against it. None: see `infer_config`.
      partitioner: where parameters go. None: whole, on the first device.

    Raises InputError for parameters that are missing, unknown or of another shape, and for files
    that are missing or damaged, naming path and shape.
    """
    arrays = t5x_files.arrays(directory, "target")
    config = infer_config(arrays) if config is None else config
    model = Transformer(config)
    shapes, names = shapes_and_names(model)
    stored = _matched(arrays, "target/", shapes, names, directory)
    shardings: dict[str, Any] = dict.fromkeys(shapes)
    if partitioner is not None:
        tree = trees.unflatten(shapes)
        shardings = trees.flatten(partitioner.tree_shardings(tree, trees.unflatten(names)))
    params = {}
    for path, shape in shapes.items():
        array = t5x_layout.read(path, stored[path], shape.shape, shape.dtype)
        params[path] = _put(array, shardings[path])
        del array
    return model, trees.unflatten(params)


def load_t5x_adafactor(
    directory: str, *, config: ModelConfig | None = None
) -> AdafactorMoments | None:
    """Adafactor's state from a T5X checkpoint; None where there is none.

    Arguments and errors as for `load_t5x`. Also InputError for another optimizer's state.
    """
    state = t5x_files.arrays(directory, "state")
    slots = {path: array for path, array in state.items() if path.startswith("state/param_states/")}
    if not slots:
        return None
    if not any(path.endswith("/v_row") for path in slots):
        raise InputError(
            f"'{directory}' holds the state of another optimizer than Adafactor, for instance "
            f"'{next(iter(slots))}': load the parameters alone"
        )
    if config is None:
        config = infer_config(t5x_files.arrays(directory, "target"))
    shapes, names = shapes_and_names(Transformer(config))
    by_slot = {
        slot: {
            path.removesuffix(f"/{slot}"): array
            for path, array in slots.items()
            # T5X fills the slots that it does not use with one zero.
            if path.endswith(f"/{slot}") and array.shape != (1,)
        }
        for slot in ("v", "v_row", "v_col", "m")
    }
    prefix = "state/param_states/"
    first = {}
    if by_slot["m"]:
        stored = _matched(by_slot["m"], prefix, shapes, names, directory)
        first = {path: _read(path, stored[path], shapes[path]) for path in shapes}
    second: dict[str, tuple[np.ndarray, ...]] = {}
    full, _ = t5x_layout.group(_strip(by_slot["v"], prefix))
    for path, shape in shapes.items():
        if path in full:
            t5x_layout.check_state(path, full[path])
            problem = t5x_layout.check(path, full[path], shape.shape, names[path])
            if problem:
                raise InputError(f"Adafactor's state in '{directory}': {problem}")
            second[path] = (_read(path, full[path], shape),)
    factored = [t5x_layout.group(_strip(by_slot[slot], prefix))[0] for slot in ("v_row", "v_col")]
    for path, shape in shapes.items():
        if path in second:
            continue
        if path not in factored[0] or path not in factored[1]:
            raise InputError(
                f"Adafactor's state in '{directory}' has nothing for '{path}' {shape.shape}"
            )
        t5x_layout.check_state(path, factored[0][path])
        second[path] = t5x_layout.read_factors(
            path, factored[0][path], factored[1][path], shape.shape, names[path]
        )
    step = state["state/step"].read() if "state/step" in state else np.zeros((), np.int32)
    return AdafactorMoments(int(step), second, first)


def infer_config(arrays: Mapping[str, StoredArray]) -> ModelConfig:
    """The T5 that parameters `target/...` are of, as far as shapes say.

    What they don't is T5's: gated GELU where the feed-forward block has two inputs (T5 1.1), else
    ReLU (T5 1.0); tied logits are scaled; relative distances reach 128. Raises InputError where
    something essential is missing.
    """
    stored, _ = t5x_layout.group(_strip(arrays, "target/"))

    def first(path: str) -> StoredArray:
        if path not in stored:
            raise InputError(
                f"the checkpoint has no '{path}' under any name of T5X's, so its model can't be "
                "told: is it a T5? Otherwise pass `config`"
            )
        return stored[path].arrays[0]

    def stack(name: str) -> StackConfig | None:
        if f"{name}/final_norm/scale" not in stored:
            return None
        norm = f"{name}/layers/mlp_norm/scale"
        first(norm)
        scanned = stored[norm].scanned
        bias = first(f"{name}/relative_bias/embedding")
        heads, buckets = bias.shape[0], bias.shape[-1]
        query = first(f"{name}/layers/self_attention/query/kernel")
        joined = _without_layers(query, stored)
        gated = f"{name}/layers/mlp/wi_1/kernel" in stored
        return StackConfig(
            num_layers=_layers(scanned, embed_dim) if scanned else max(stored[norm].layers) + 1,
            num_heads=heads,
            head_dim=joined // (embed_dim * heads),
            mlp_dim=_without_layers(first(f"{name}/layers/mlp/wo/kernel"), stored) // embed_dim,
            mlp_activations=("gelu", "linear") if gated else ("relu",),
            positions=RelativeBias(num_buckets=buckets),
        )

    def _layers(norm: StoredArray, embed_dim: int) -> int:
        axis = t5x_layout.scan_axis(norm.shape, (embed_dim,), None, "")
        if axis is None:
            raise InputError(f"'{norm.path}' is {norm.shape}: expected ({embed_dim}, layers)")
        return norm.shape[axis]

    def _without_layers(array: StoredArray, stored: Mapping[str, Stored]) -> int:
        """The number of one layer's elements."""
        size = int(np.prod(array.shape))
        name = array.path.split("/")[1]
        scanned = stored[f"{name}/layers/mlp_norm/scale"].scanned
        return size if scanned is None else size // _layers(scanned, embed_dim)

    vocab_size, embed_dim = first("token_embedding/embedding").shape
    untied = "lm_head/kernel" in stored
    return ModelConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        head=LMHead() if untied else LMHead(tied=True, scaled=True),
    )


def shapes_and_names(
    model: Transformer,
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str, ...]]]:
    """The model's parameters by path: shapes, and the names of their axes."""
    shapes = transformer.shapes(model)
    names = trees.flatten(transformer.axes(model), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return trees.flatten(shapes), names


def _matched(
    arrays: Mapping[str, StoredArray],
    prefix: str,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    names: Mapping[str, Sequence[str | None]],
    directory: str,
) -> dict[str, Stored]:
    """Where each parameter is stored. Raises InputError with all that does not fit."""
    stored, unknown = t5x_layout.group(_strip(arrays, prefix))
    problems = [f"unknown {prefix}{path} {arrays[prefix + path].shape}" for path in unknown]
    for path, shape in shapes.items():
        if path not in stored:
            problems.append(f"missing {path} {shape.shape}")
        elif problem := t5x_layout.check(path, stored[path], shape.shape, names[path]):
            problems.append(problem)
    for path in stored:
        if path not in shapes:
            first = stored[path].arrays[0]
            problems.append(f"the model has no {path}: {first.path} {first.shape}")
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            f"the T5X checkpoint in '{directory}' does not fit the model:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
        )
    return stored


def _strip(arrays: Mapping[str, StoredArray], prefix: str) -> dict[str, StoredArray]:
    return {path.removeprefix(prefix): array for path, array in arrays.items()}


def _read(path: str, stored: Stored, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return t5x_layout.read(path, stored, shape.shape, np.dtype(np.float32))


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
