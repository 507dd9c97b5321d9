"""Checkpoints: trainable parameters, optimizer state, the data's one integer, and metadata.

Written by Orbax in the background, each in a directory of its own that gets its final name only
when it is whole; so a crash, a kill or a full disk costs the checkpoint under way and no other.
Arrays are stored whole and by path: they restore onto any mesh and number of processes.
"""

from __future__ import annotations

import datetime
import functools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
from absl import logging

from t5x_lite import trees
from t5x_lite.types import InputError, Params

DIRECTORY = "checkpoints"
BEST = "best"
AT_ONCE: Final = 2**28  # bytes that are being written or read at once, or one array if it has more


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When checkpoints are written and which of them stay. The last step is always written."""

    period: int = 1000  # steps between checkpoints
    keep: int | None = 3  # the newest so many stay (or the best, with best_metric); None: all
    keep_period: int | None = None  # those at multiples of this stay for good
    best_metric: str | None = None  # "<evaluation>/<metric>", as in metrics.jsonl
    best_mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        for name in ("period", "keep", "keep_period"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"CheckpointPolicy.{name}={value}: expected at least 1")


class Checkpointer:
    """Saves and restores one run's checkpoints, under `model_dir/checkpoints/<step>`.

    What is being written or read takes its memory twice, as arrays and as chunks. Orbax would do
    96 GB at once; here it is a few arrays. `shapes` is a tree of all that will be saved. Raises
    InputError, when built, for a folder that can't be made.
    """

    def __init__(
        self, model_dir: str, policy: CheckpointPolicy = CheckpointPolicy(), shapes: Any = ()
    ):
        self.directory = os.path.abspath(os.path.join(model_dir, DIRECTORY))
        try:
            os.makedirs(self.directory, exist_ok=True)  # now, and not at the first checkpoint
        except OSError as error:
            raise InputError(f"no checkpoints can be written in '{model_dir}': {error}") from error
        self.policy = policy
        # Written by shards.
        self._writing = _at_once(
            leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(shapes)
        )

    @functools.cached_property
    def _manager(self) -> Any:
        ocp, policy = _orbax(), self.policy
        best = policy.best_metric
        options = ocp.CheckpointManagerOptions(
            max_to_keep=policy.keep,
            keep_period=policy.keep_period,
            best_fn=None if best is None else (lambda metrics: metrics[best]),
            best_mode=policy.best_mode,
            cleanup_tmp_directories=True,
            create=True,
        )
        return ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(save_concurrent_gb=self._writing),
                "optimizer": ocp.StandardCheckpointHandler(save_concurrent_gb=self._writing),
                "data": ocp.JsonCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        params: Params,
        opt_state: Any,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing; returns once the arrays are copied, so that they may be donated.

        Without optimizer state (`{}`: weights from elsewhere) a run can start from the checkpoint,
        and not resume it.
        """
        best = self.policy.best_metric
        if best is not None and best not in (metrics or {}):
            raise InputError(
                f"CheckpointPolicy.best_metric='{best}' was not measured at step {step}; measured: "
                f"{', '.join(sorted(metrics or {})) or 'nothing'}. Evaluate whenever a checkpoint "
                "is written: make CheckpointPolicy.period a multiple of train.eval_period"
            )
        ocp, optimizer = _orbax(), _by_path(opt_state)
        if best is not None:
            score = {"metric": best, "mode": self.policy.best_mode, "value": (metrics or {})[best]}
            metadata = {**metadata, BEST: score}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                data=ocp.args.JsonSave({"step": step}),
                metadata=ocp.args.JsonSave(dict(metadata)),
                **({"optimizer": ocp.args.StandardSave(optimizer)} if optimizer else {}),
            ),
            metrics=None if best is None else dict(metrics or {}),
        )

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any]:
        """Arrays of the given shapes, dtypes and shardings (trees of `jax.ShapeDtypeStruct`)."""
        self._check(step, params)
        if self._manager.item_metadata(step).get("optimizer") is None:
            raise InputError(
                f"checkpoint {self.directory}/{step} holds weights without an optimizer's state: "
                "start from it (train.initial) in another train.model_dir"
            )
        restored = self._arrays(step, "params", params)
        flat = trees.flatten(self._arrays(step, "optimizer", _by_path(opt_state)))
        return restored, trees.map_with_path(lambda path, _: flat[path], opt_state)

    def restore_params(self, step: int, params: Params) -> Params:
        """The trainable parameters alone."""
        self._check(step, params)
        return self._arrays(step, "params", params)

    def _arrays(self, step: int, item: str, shapes: Params) -> Params:
        """An item's arrays, a few at a time."""
        # Stored in chunks of another mesh, perhaps: a shard may take the whole array to read.
        reading = _at_once(leaf.shape for leaf in jax.tree.leaves(shapes))
        ocp = _orbax()
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=reading)
        with ocp.Checkpointer(handler) as reader:
            path = os.path.join(self.directory, str(step), item)
            return reader.restore(path, args=ocp.args.StandardRestore(shapes))

    def _check(self, step: int, params: Params) -> None:
        """Raises InputError where the stored parameters are not those that are asked for."""
        stored = trees.flatten(self._manager.item_metadata(step)["params"].tree)
        stored = {path: tuple(leaf.shape) for path, leaf in stored.items()}
        wanted = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
        problems = [f"missing {path} {wanted[path]}" for path in wanted if path not in stored]
        problems += [f"unexpected {path} {stored[path]}" for path in stored if path not in wanted]
        problems += [
            f"{path} is {stored[path]}, the model's is {wanted[path]}"
            for path in wanted
            if path in stored and stored[path] != wanted[path]
        ]
        if problems:
            more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise InputError(
                f"checkpoint {self.directory}/{step} does not fit this model and transform:\n  "
                + "\n  ".join(problems[:8])
                + more
            )

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given."""
        ocp = _orbax()
        item = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        found: dict[str, Any] = self._manager.restore(step, args=item)["metadata"]
        return found

    def nbytes(self, step: int) -> dict[str, int]:
        """Bytes on disk by item, e.g. `{"params": 1234, "optimizer": 56, ...}`."""
        root = os.path.join(self.directory, str(step))
        sizes: dict[str, int] = {}
        for folder, _, files in os.walk(root):
            item = os.path.relpath(folder, root).split(os.sep)[0]
            total = sum(os.path.getsize(os.path.join(folder, name)) for name in files)
            sizes[item] = sizes.get(item, 0) + total
        return sizes

    def wait(self) -> None:
        """Returns when all that was saved is on disk. Raises what went wrong in the background."""
        if "_manager" in vars(self):
            self._manager.wait_until_finished()

    def close(self) -> None:
        if "_manager" in vars(self):
            self._manager.close()


def _orbax() -> Any:
    """A sixth of a second to import: a fresh run has need of it when it first saves."""
    import orbax.checkpoint

    return orbax.checkpoint


def all_steps(model_dir: str) -> list[int]:
    """Steps of a run's finished checkpoints, in order. Raises InputError if there is none."""
    directory = os.path.join(model_dir, DIRECTORY)
    if not os.path.isdir(directory):
        raise InputError(
            f"'{model_dir}' has no '{DIRECTORY}' folder: expected a run's folder (train.model_dir "
            "of an earlier run)"
        )
    steps = sorted(int(name) for name in os.listdir(directory) if name.isdigit())
    if not steps:
        raise InputError(f"'{directory}' holds no finished checkpoint yet")
    return steps


def find_step(model_dir: str, step: int | Literal["best"] | None = None) -> int:
    """The checkpoint step asked for, or the latest. Raises InputError if there is none.

    "best" is by the metric of the run's `CheckpointPolicy.best_metric`, among what is still there.
    """
    steps = all_steps(model_dir)
    if step is None:
        return steps[-1]
    if step == "best":
        return _best_step(model_dir, steps)
    if step not in steps:
        raise InputError(f"'{model_dir}' has no checkpoint of step {step}; it has {steps}")
    return step


def _best_step(model_dir: str, steps: list[int]) -> int:
    checkpointer = Checkpointer(model_dir)
    try:
        found = {step: checkpointer.metadata(step).get(BEST) for step in steps}
    finally:
        checkpointer.close()
    scores = {step: score for step, score in found.items() if score is not None}
    if not scores:
        raise InputError(
            f"no checkpoint of '{model_dir}' remembers a score to be the best by: train with "
            f"CheckpointPolicy.best_metric, or name a step; it has {steps}"
        )
    last = scores[max(scores)]  # the policy may have changed on the way: the newest counts
    same = {step: score["value"] for step, score in scores.items() if _same(score, last)}
    sign = -1 if last["mode"] == "max" else 1
    numbers = {step: sign * value for step, value in same.items() if not math.isnan(value)}
    return min(numbers, key=lambda step: (numbers[step], step)) if numbers else max(same)


def _same(score: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(score[key] == other[key] for key in ("metric", "mode"))


def versions() -> dict[str, str]:
    """Versions of what a checkpoint depends on, and the time, for its metadata."""
    import importlib.metadata

    names = ("t5x_lite", "jax", "flax", "optax", "orbax-checkpoint")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            logging.info("%s is not installed as a package; its version is not recorded", name)
    found["written"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return found


def _at_once(shapes: Iterable[tuple[int, ...]]) -> Any:
    """A limit for Orbax, in GB: above what any of the arrays takes, at 4 bytes a number."""
    largest = max((4 * math.prod(shape) for shape in shapes), default=None)
    # Where nobody knows what will be saved, Orbax's own.
    return 96 if largest is None else max(AT_ONCE, largest + 2**20) / 10**9


def _by_path(tree: Any) -> dict[str, Any]:
    """Nested dicts for any pytree: what is stored does not depend on optax's classes."""
    return trees.unflatten(trees.flatten(tree)) if jax.tree.leaves(tree) else {}
