"""Parameter trees as path dicts, and the one helper that selects parameters by regex.

A path joins the keys from the root with slashes: `encoder/layers/self_attention/query/kernel`.
Whatever selects parameters (freezing, decay masks, LoRA targets, restore maps) is an ordered list
of `(regex, value)` rules on these paths: the first full match wins, what matched is logged, and a
rule that matches nothing is an error.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from t5x_lite.devices import fetched
from t5x_lite.types import InputError, Params

T = TypeVar("T")
Rules = Sequence[tuple[str, T]]


def path_name(key_path: Iterable[Any]) -> str:
    """`a/b/c` for a key path of `jax.tree_util` (dict keys, attributes and indices alike)."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def flatten(tree: Params, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves of `tree` by path, in tree order: `{"a": {"b": x}}` -> `{"a/b": x}`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from path keys; the inverse of `flatten` on a tree of dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: Params, *rest: Params) -> Params:
    """`jax.tree.map`, with each leaf's path as the first argument."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def match_first(
    rules: Rules[T], paths: Iterable[str], *, default: T | None = None, what: str = "rule"
) -> dict[str, T | None]:
    """The value of the first rule whose regex fully matches each path, else `default`.

    Logs how many paths each rule took. Raises InputError for a regex that does not compile and
    for a rule that no path matches (a rule wholly shadowed by earlier ones counts as matching).
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise InputError(f"{what} '{pattern}' is not a regular expression: {error}") from error
    paths = list(paths)
    chosen: dict[str, T | None] = {}
    taken = [0] * len(compiled)
    for path in paths:
        chosen[path] = default
        for index, (regex, value) in enumerate(compiled):
            if regex.fullmatch(path):
                chosen[path] = value
                taken[index] += 1
                break
    for (regex, value), count in zip(compiled, taken, strict=True):
        logging.info(
            "%s '%s' -> %r takes %d of %d paths", what, regex.pattern, value, count, len(paths)
        )
        if not any(regex.fullmatch(path) for path in paths):
            some = "\n  ".join(paths[:12] + (["..."] if len(paths) > 12 else []))
            raise InputError(
                f"{what} '{regex.pattern}' matches no parameter; it must match a whole path "
                f"of:\n  {some}"
            )
    return chosen


def partition(tree: Params, take: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree of dicts in two by path: (leaves that `take` accepts, the rest)."""
    flat = flatten(tree)
    taken = {path: leaf for path, leaf in flat.items() if take(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in taken}
    return unflatten(taken), unflatten(rest)


def merge(*trees: Params) -> dict[str, Any]:
    """One tree of dicts from several with disjoint paths; the inverse of `partition`."""
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"two trees hold the path '{path}'")
            flat[path] = leaf
    return unflatten(flat)


def count(tree: Params) -> int:
    """Number of scalars in the tree's arrays (or shape structs)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Params) -> int:
    """Bytes of the tree's arrays (or shape structs)."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


@jax.jit
def _checksum(x: Any) -> Any:
    x = fetched(x)
    # Integer sums wrap, so the order of summation (that is, the mesh) does not matter.
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    places = jnp.uint32(1)
    for axis in range(x.ndim):  # a place's number, without reshaping what is sharded
        places = places * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis
        )
    # Mixed, or else an even number of flipped signs would cancel out in the sum.
    return jnp.sum(_mix(bits ^ _mix(places)), dtype=jnp.uint32)


def _mix(x: Any) -> Any:
    """MurmurHash3's finaliser: every bit of a uint32 moves about half of the result's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def fingerprint(tree: Params) -> str:
    """16 hex digits that change with any path, shape, dtype or bit of the tree's arrays.

    Computed where the arrays live, without gathering them (of those in hosts' memory, on the
    devices, one after another); the same on every mesh.
    """
    digest = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        digest.update(f"{path}{leaf.shape}{leaf.dtype}{int(_checksum(leaf))}".encode())
    return digest.hexdigest()[:16]
