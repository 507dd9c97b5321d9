"""T5X's checkpoint files: which arrays there are, read one at a time.

Its native format (version 3, since 2021) is a msgpack tree, the file `checkpoint`, whose leaves are
small arrays or TensorStore specs of zarr directories beside it, `target.encoder.encoder_norm.scale`
for one. Later ones are Orbax's: the same names as zarr directories or in one OCDBT database, in the
item `state`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import tensorstore

from t5x_lite.types import InputError

CHECKPOINT = "checkpoint"  # the native format's file, and the prefix of a step's folder
OCDBT = "manifest.ocdbt"
ARRAY_FILES = {".zarray": "zarr", "zarr.json": "zarr3"}  # what marks an array, and its driver
VERSIONS = (2, 3)


@dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint: where it is, and what `read` will return."""

    path: str  # "target/encoder/encoder_norm/scale"
    where: str  # for messages: a file or directory
    shape: tuple[int, ...]
    value: np.ndarray | tensorstore.TensorStore

    def read(self) -> np.ndarray:
        """The whole array. Raises InputError for a chunk that is missing or cut off."""
        try:
            array = np.asarray(
                self.value if isinstance(self.value, np.ndarray) else self.value.read().result()
            )
        except (ValueError, OSError) as error:
            raise _damaged(self.path, self.where, self.shape, error) from error
        # Version 2 kept the bits of bfloat16 in uint16, which no parameter is otherwise.
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def find(directory: str) -> str:
    """The folder of one checkpoint: `directory` itself, or the latest `checkpoint_<step>` in it.

    Raises InputError where there is neither.
    """
    if "://" in directory:
        raise InputError(
            f"'{directory}' is not a local folder: copy the checkpoint to this machine first, for "
            f"instance with `gcloud storage cp -r {directory} .`"
        )
    if not os.path.isdir(directory):
        raise InputError(f"'{directory}' is not a folder: expected a T5X checkpoint")
    names = set(os.listdir(directory))
    if {OCDBT, "_METADATA", "state"} & names or os.path.isfile(os.path.join(directory, CHECKPOINT)):
        return directory
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint_(\d+)", name))]
    if not steps:
        raise InputError(
            f"'{directory}' is no T5X checkpoint: expected a '{CHECKPOINT}' file, a 'state' "
            "folder, or folders named checkpoint_<step>"
        )
    return os.path.join(directory, f"{CHECKPOINT}_{max(steps)}")


def arrays(directory: str, part: str) -> dict[str, StoredArray]:
    """The arrays of one part of the checkpoint in `directory`, by path: `target/...`, say.

    Args:
      directory: see `find`.
      part: "target" (the parameters) or "state" (the optimizer's).

    Raises InputError for a file that is not readable, or of an unknown version.
    """
    directory = os.path.abspath(find(directory))
    state = os.path.join(directory, "state")
    if os.path.isdir(state):
        directory = state
    found: dict[str, StoredArray] = {}
    whole = False
    if os.path.exists(os.path.join(directory, CHECKPOINT)):
        found, whole = _native(directory, part)
    return found if whole else found | _orbax(directory, part)


def _inner(path: str, part: str) -> str | None:
    """The path without what Orbax's first checkpoints put before it; None: of another part."""
    path = path.removeprefix("_optimizer/")
    return path if path.startswith(f"{part}/") else None


def _native(directory: str, part: str) -> tuple[dict[str, StoredArray], bool]:
    """What the msgpack tree says, and whether that is all: Orbax's first versions had one too."""
    file = os.path.join(directory, CHECKPOINT)
    try:
        with open(file, "rb") as stream:
            tree = flax.serialization.msgpack_restore(stream.read())
    except Exception as error:  # msgpack has many kinds, and none says which file
        raise InputError(f"'{file}' is not a readable msgpack file: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"'{file}' holds no tree of arrays: expected a T5X checkpoint")
    if "optimizer" in tree:
        if tree.get("version") not in VERSIONS:
            raise InputError(
                f"'{file}' has version {tree.get('version')!r}; known: {VERSIONS}. Load and save "
                "it once with a later T5X"
            )
        tree = tree["optimizer"]
    flat = flax.traverse_util.flatten_dict(tree, sep="/", is_leaf=lambda _, value: _is_spec(value))
    found = {}
    whole = True
    for full, leaf in flat.items():
        path = _inner(full, part)
        if path is None or leaf is None:
            continue
        if isinstance(leaf, str) and leaf.startswith("PLACEHOLDER://"):
            whole = False
        elif isinstance(leaf, dict):
            found[path] = _open(path, directory, _spec_path(path, file, leaf), leaf)
        else:
            value = np.asarray(leaf)
            found[path] = StoredArray(path, file, value.shape, value)
    return found, whole


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and value.get("driver") == "zarr" and "kvstore" in value


def _spec_path(path: str, file: str, spec: Mapping[str, Any]) -> str:
    """The array's directory. Old specs have the path outside of `kvstore`."""
    name = str(spec["kvstore"].get("path") or spec.get("path") or "").rstrip("/")
    if not name or os.path.isabs(name) or ".." in name.split("/"):
        raise InputError(f"'{file}': '{path}' lies at '{name}'; expected a name inside its folder")
    return name


def _orbax(directory: str, part: str) -> dict[str, StoredArray]:
    ocdbt = os.path.exists(os.path.join(directory, OCDBT))
    try:
        store = tensorstore.KvStore.open(_kvstore(directory, "", ocdbt)).result()
        keys = [key.decode() for key in store.list().result()]
    except ValueError as error:
        raise InputError(f"'{directory}' is not a readable Orbax checkpoint: {error}") from error
    found = {}
    for key in keys:
        name, _, file = key.rpartition("/")
        path = _inner(name.replace(".", "/"), part)
        if file in ARRAY_FILES and path is not None:
            found[path] = _open(path, directory, name, driver=ARRAY_FILES[file], ocdbt=ocdbt)
    return found


def _kvstore(directory: str, name: str, ocdbt: bool) -> dict[str, Any]:
    if ocdbt:
        base = {"driver": "file", "path": directory + "/"}
        return {"driver": "ocdbt", "base": base, "path": name}
    return {"driver": "file", "path": os.path.join(directory, name)}


def _open(
    path: str,
    directory: str,
    name: str,
    spec: Mapping[str, Any] | None = None,
    *,
    driver: str = "zarr",
    ocdbt: bool = False,
) -> StoredArray:
    """Opens an array without reading it; `spec` is what the native format's tree says of it."""
    where = os.path.join(directory, name)
    shape = None if spec is None else tuple(spec.get("metadata", {}).get("shape", ()))
    try:
        store = tensorstore.open(
            {
                "driver": driver,
                "kvstore": _kvstore(directory, name + "/", ocdbt),
                # Or else a chunk that got lost would read as zeros.
                "fill_missing_data_reads": False,
            },
            open=True,
            read=True,
        ).result()
    except ValueError as error:
        raise _damaged(path, where, shape, error) from error
    if shape is not None and tuple(store.shape) != shape:
        raise InputError(
            f"'{where}' holds an array of shape {tuple(store.shape)}, but the checkpoint's tree "
            f"says {shape} for '{path}'"
        )
    return StoredArray(path, where, tuple(store.shape), store)


def _damaged(path: str, where: str, shape: tuple[int, ...] | None, error: Exception) -> InputError:
    reason = str(error).partition(" [")[0]
    return InputError(
        f"'{path}' {'' if shape is None else f'{shape} '}in '{where}' is missing or damaged: "
        f"{reason}. Copy the checkpoint again"
    )
