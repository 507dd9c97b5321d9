"""What a run works with: model, transform, optimizer, mesh, and parameters sharded from birth.

Nothing unsharded ever exists: shapes come from `jax.eval_shape`, shardings from names, and arrays
from a jitted initialiser or a restore that is told where each shard goes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite import programs, trees
from t5x_lite.devices import HOST, fetched
from t5x_lite.models import prompted, transformer
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.stack import prefix_length
from t5x_lite.models.transformer import Transformer
from t5x_lite.peft.transform import Full, Transform
from t5x_lite.sharding import Partitioner
from t5x_lite.train import optim
from t5x_lite.train.step import TrainState
from t5x_lite.types import InputError, Params


@dataclass(frozen=True)
class Session:
    """Model and transform on a mesh, with the shapes and shardings of all that they hold."""

    config: ModelConfig
    transform: Transform = Full()
    partitioner: Partitioner = Partitioner()
    seed: int = 0

    @functools.cached_property
    def model(self) -> Transformer:
        return Transformer(self.config)

    @functools.cached_property
    def names(self) -> Params:
        """Logical axis names of the base parameters."""
        return transformer.axes(self.model)

    @functools.cached_property
    def base_shapes(self) -> Params:
        """Base parameters as `jax.ShapeDtypeStruct` with shardings. InputError: does not divide."""
        shapes = transformer.shapes(self.model)
        return _with_shardings(shapes, self.partitioner.tree_shardings(shapes, self.names))

    @functools.cached_property
    def split_names(self) -> tuple[Params, Params]:
        """Axis names of the trainable and the frozen parameters."""
        return self.transform.split_names(self.names)

    @functools.cached_property
    def split_shapes(self) -> tuple[Params, Params]:
        """The trainable and the frozen parameters as shape structs with shardings."""
        shapes = jax.eval_shape(self._split, self.base_shapes)
        trainable, frozen = (
            _with_shardings(shape, self.partitioner.tree_shardings(shape, names))
            for shape, names in zip(shapes, self.split_names, strict=True)
        )
        return trainable, self._held(frozen)

    def _held(self, frozen: Params) -> Params:
        """Frozen shapes where they are between uses. InputError: not layer by layer to be had."""
        if "frozen" not in self.partitioner.offload:
            return frozen
        if not jax.tree.leaves(frozen):
            raise InputError(
                f"Partitioner.offload has 'frozen', and {self.transform} freezes nothing: leave "
                "'frozen' out, or take a transform that freezes, such as LoRA"
            )
        for stack in (self.config.encoder, self.config.decoder):
            if stack is not None and stack.unroll > 1:
                raise InputError(
                    f"StackConfig.unroll={stack.unroll}: layers of a base that Partitioner.offload "
                    "keeps on the hosts are fetched one at a time; leave unroll at 1"
                )
        # Of 8-bit numbers libtpu 0.0.42 copies all layers in each turn of the loop over them.
        if coded := [path for path, x in trees.flatten(frozen).items() if x.dtype.itemsize == 1]:
            raise InputError(
                f"Partitioner.offload has 'frozen', and '{coded[0]}' is quantised: layers of "
                "such weights can't be fetched one at a time; leave 'frozen' out"
            )

        def place(path: str, x: jax.ShapeDtypeStruct) -> NamedSharding:
            # It can't fetch one row of two that share a word either: vectors stay where they are,
            # and biases, of which a device may have one head's.
            axes = len(x.shape) - ("layers" in path.split("/"))
            if axes < 2 or path.endswith("/bias"):
                return x.sharding
            return self.partitioner.between_uses("frozen", x.sharding.spec)

        return _with_shardings(frozen, trees.map_with_path(place, frozen))

    @functools.cached_property
    def away(self) -> dict[str, NamedSharding]:
        """Shardings of the base's parameters that stay as they are and that hosts hold, by path."""
        frozen = trees.flatten(self.split_shapes[1])
        held = {path: frozen[path].sharding for path in self._kept_paths}
        return {path: at for path, at in held.items() if at.memory_kind == HOST}

    @functools.cached_property
    def adapted(self) -> Params:
        """What `model.apply` takes, with shape structs for arrays."""
        return jax.eval_shape(self.transform.apply, *self.split_shapes)

    @functools.cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        """Ids of a soft prompt, which rows of data have in front of every example."""
        first = self.config.vocab_size
        return tuple(range(first, first + prompted.prompt_length(self.adapted)))

    def prefix(self, stack: str) -> int:
        """How many positions of a stack, "encoder" or "decoder", a trained prefix takes."""
        return prefix_length(self.adapted.get(stack, {}))

    @functools.cached_property
    def _kept_paths(self) -> frozenset[str]:
        """Paths of the base whose arrays the transform freezes as they are."""
        kept: set[str] = set()

        def find(base: Params) -> None:
            flat = trees.flatten(base)
            frozen = trees.flatten(self._split(base)[1])
            kept.update(path for path, leaf in frozen.items() if leaf is flat.get(path))

        jax.eval_shape(find, self.base_shapes)
        return frozenset(kept)

    def init_base(self) -> Params:
        """Fresh base parameters, each shard made on its device."""

        def init(seed: jax.Array) -> Params:
            return transformer.init(self.model, _key(seed, 0))

        jitted = jax.jit(init, out_shardings=shardings(self.base_shapes))
        return programs.Kept(jitted, self.partitioner, self.config)(self._seed)

    def init_some(self, paths: Sequence[str]) -> dict[str, jax.Array]:
        """Those of `init_base`'s parameters by path, without making the others."""
        shapes = trees.flatten(self.base_shapes)

        def init(seed: jax.Array) -> dict[str, jax.Array]:
            drawn = trees.flatten(transformer.init(self.model, _key(seed, 0)))
            return {path: drawn[path] for path in paths}

        out = {path: shapes[path].sharding for path in paths}
        return jax.jit(init, out_shardings=out)(self._seed)

    def split(self, base: Params) -> tuple[Params, Params]:
        """`(trainable, frozen)`; frozen arrays that stay as they are, there, are the base's own.

        Those of the base that are `away` may be on the hosts already.
        """
        if isinstance(self.transform, Full):
            return base, {}
        trainable_shapes, frozen_shapes = self.split_shapes
        found = trees.flatten(base)
        made = {
            path: x
            for path, x in trees.flatten(frozen_shapes).items()
            if path not in self._kept_paths
            or (path in self.away and found[path].sharding.memory_kind != HOST)
        }

        def parts(base: Params) -> tuple[Params, dict[str, jax.Array]]:
            trainable, frozen = self._split(fetched(base))
            flat = trees.flatten(frozen)
            return trainable, {path: flat[path] for path in made}

        out = shardings(trainable_shapes), shardings(made)
        trainable, altered = jax.jit(parts, out_shardings=out)(base)
        flat = {**found, **altered}
        return trainable, trees.map_with_path(lambda path, _: flat[path], frozen_shapes)

    def fingerprint(self, base: Params) -> str | None:
        """Of the base's parameters that are not trained themselves; None: all are.

        As they are in the base: what a transform makes of them (PiSSA's rest, quantised weights)
        is not the same bit by bit on every machine.
        """
        trained = trees.flatten(self.split_shapes[0])
        kept = {path: leaf for path, leaf in trees.flatten(base).items() if path not in trained}
        return trees.fingerprint(trees.unflatten(kept)) if kept else None

    def optimizer(self, optimizer: optim.Optimizer) -> optax.GradientTransformation:
        return optimizer.make(self.split_names[0])

    def state_shapes(self, optimizer: optax.GradientTransformation) -> TrainState:
        """A `TrainState` of shape structs with shardings."""
        params = self.split_shapes[0]
        opt_shapes = jax.eval_shape(optimizer.init, params)
        specs = optim.state_specs(
            opt_shapes, params, jax.tree.map(lambda shape: shape.sharding.spec, params)
        )

        def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
            if not leaf.shape:  # a count: nothing would be saved
                return self.partitioner.replicated
            return self.partitioner.between_uses("optimizer", spec)

        opt_shardings = jax.tree.map(place, opt_shapes, specs)
        step = jax.ShapeDtypeStruct((), "int32", sharding=self.partitioner.replicated)
        return TrainState(step, params, _with_shardings(opt_shapes, opt_shardings))

    def init_opt_state(self, optimizer: optax.GradientTransformation, params: Params) -> Any:
        out = shardings(self.state_shapes(optimizer).opt_state)
        return jax.jit(optimizer.init, out_shardings=out)(params)

    def _split(self, base: Params) -> tuple[Params, Params]:
        return self.transform.split(base, self.names, _key(self.seed, 1))

    @property
    def _seed(self) -> np.ndarray:
        """For programs, which are then the same for every seed; `jax.random.key` cuts it so too."""
        return np.int64(self.seed).astype(np.int32)


def _key(seed: int | jax.Array, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), stream)


def shardings(shapes: Params) -> Params:
    """The shardings of a tree of shape structs or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def _with_shardings(shapes: Params, tree: Params) -> Params:
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        tree,
    )
