"""An optimizer's state from another codebase, in the structure of ours."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from t5x_lite import trees
from t5x_lite.interop.t5x import AdafactorMoments
from t5x_lite.train.adafactor import AdafactorState
from t5x_lite.types import InputError, Params


def adafactor_state(opt_state: Any, params: Params, moments: AdafactorMoments) -> Any:
    """`opt_state` with step and moments of a T5X run, so that training goes on from there.

    Args:
      opt_state: what `optimizer.init(params)` gives, as arrays or shape structs; arrays are placed
        as it says. Around Adafactor's state there may be other transformations.
      params: the trainable parameters, arrays or shape structs.
      moments: of the same parameters.

    Raises InputError for another optimizer, for a parameter that `moments` lack, and where T5X kept
    factors of a second moment and ours keeps it in full.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
    if lacking := [path for path in shapes if path not in moments.second]:
        raise InputError(f"Adafactor's state has nothing for the parameter '{lacking[0]}'")
    is_adafactor = lambda node: isinstance(node, AdafactorState)
    found = [
        node for node in jax.tree.leaves(opt_state, is_leaf=is_adafactor) if is_adafactor(node)
    ]
    if len(found) != 1:
        raise InputError(
            "T5X's state is Adafactor's: train with an Adafactor, or load the parameters alone"
        )

    def second(path: str, like: Any) -> Any:
        shape = shapes[path]
        full = all(size == 1 for size in like.shape) and np.prod(shape) > 1
        if full:  # the place that Adafactor leaves unused beside a full second moment
            return _put(np.zeros(like.shape, np.float32), like)
        for mean in moments.second[path]:
            # Means of means: of what T5X kept in full, ours may keep factors.
            axes = tuple(
                axis for axis, size in enumerate(like.shape) if size == 1 and mean.shape[axis] > 1
            )
            coarser: np.ndarray = mean.mean(axis=axes, keepdims=True, dtype=np.float32)
            if coarser.shape == tuple(like.shape):
                return _put(coarser, like)
        raise InputError(
            f"T5X kept factors {[mean.shape for mean in moments.second[path]]} of the second "
            f"moment of '{path}' {shape}, and this Adafactor keeps {tuple(like.shape)}: set "
            f"Adafactor.min_dim_size_to_factor to {min(shape)} or less"
        )

    def fill(node: Any) -> Any:
        if not is_adafactor(node):
            return node
        momentum = node.momentum
        if momentum is not None:
            if not moments.first:
                raise InputError(
                    "T5X trained without momentum, and this Adafactor has beta1: set it to None"
                )
            # T5X averages what is subtracted, ours what is added.
            momentum = trees.map_with_path(
                lambda path, like: _put(-moments.first[path].astype(like.dtype), like), momentum
            )
        return AdafactorState(
            _put(np.asarray(moments.step, np.int32), node.count),
            trees.map_with_path(second, node.v_row),
            trees.map_with_path(second, node.v_col),
            momentum,
        )

    return jax.tree.map(fill, opt_state, is_leaf=is_adafactor)


def _put(array: np.ndarray, like: Any) -> jax.Array:
    """`array` where `like` is, or is to be."""
    return jax.device_put(array, like.sharding)
