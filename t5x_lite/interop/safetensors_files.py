"""Safetensors files as views: nothing of a tensor is read until somebody copies a part of it.

The library checks the files. It is not what reads them: its numpy side copies whole tensors and
knows no bfloat16, in which most large models are published.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from t5x_lite.types import InputError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_DTYPES: Final[Mapping[str, Any]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_tensors(directory: str) -> dict[str, np.ndarray]:
    """The tensors of a model's directory by name, as read-only views of memory-mapped files.

    Reads `model.safetensors`, or the files that `model.safetensors.index.json` lists. Raises
    InputError where there is neither, for a file that is missing, damaged or cut short, and for
    an index that names tensors which its files don't hold.
    """
    single, index = os.path.join(directory, SINGLE), os.path.join(directory, INDEX)
    if os.path.exists(single):
        return _map_file(single)
    if not os.path.exists(index):
        pickles = sorted(name for name in listed(directory) if name.endswith((".bin", ".pt")))
        if pickles:
            raise InputError(
                f"'{directory}' holds its weights as pickles ({', '.join(pickles)}), which can run "
                f"any code and are not read here: save the model as {SINGLE} where you trust it "
                "(transformers: save_pretrained)"
            )
        raise InputError(f"'{directory}' has no weights: expected {SINGLE} or {INDEX}")
    wanted: dict[str, str] = read_json(index).get("weight_map", {})
    if not wanted:
        raise InputError(f"'{index}' has no weight_map: expected file names by tensor name")
    files: dict[str, dict[str, np.ndarray]] = {}
    for file in dict.fromkeys(wanted.values()):
        if file != os.path.basename(file):
            raise InputError(f"'{index}' names the file '{file}': expected one in its own folder")
        files[file] = _map_file(os.path.join(directory, file))
    absent = [name for name, file in wanted.items() if name not in files[file]]
    if absent:
        raise InputError(
            f"'{index}' names tensors that its files don't hold: {', '.join(absent[:8])}"
        )
    return {name: files[file][name] for name, file in wanted.items()}


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file; InputError where there is none."""
    return _read_json(path, dict)


def read_json_list(path: str) -> list[dict[str, Any]]:
    """A JSON list of objects from a file; InputError where there is none."""
    return _read_json(path, list)


def _read_json(path: str, kind: type) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise InputError(f"can't read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(found, kind):
        raise InputError(f"'{path}' holds a {type(found).__name__}: expected a {kind.__name__}")
    return found


def write_json(path: str, content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")


class Writer:
    """Writes tensors to files of at most `file_bytes` each, holding one file's tensors at a time.

    All sizes are told first, because a file's name says how many there are.
    """

    def __init__(self, directory: str, sizes: Mapping[str, int], file_bytes: int):
        self.directory, self.sizes = directory, sizes
        groups: list[list[str]] = [[]]
        room = file_bytes
        for name, size in sizes.items():
            if groups[-1] and size > room:
                groups.append([])
                room = file_bytes
            groups[-1].append(name)
            room -= size
        self.file_of = {
            name: self._file_name(number, len(groups))
            for number, group in enumerate(groups, start=1)
            for name in group
        }

    @staticmethod
    def _file_name(number: int, total: int) -> str:
        return SINGLE if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"

    def write(self, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Takes tensors in the order of `sizes`, and writes a file as soon as it is full."""
        pending: dict[str, np.ndarray] = {}
        for name, tensor in tensors:
            if pending and self.file_of[name] != self.file_of[next(iter(pending))]:
                self._flush(pending)
                pending = {}
            pending[name] = tensor
        self._flush(pending)
        if len(set(self.file_of.values())) > 1:
            metadata = {"total_size": sum(self.sizes.values())}
            content = {"metadata": metadata, "weight_map": self.file_of}
            write_json(os.path.join(self.directory, INDEX), content)

    def _flush(self, tensors: dict[str, np.ndarray]) -> None:
        path = os.path.join(self.directory, self.file_of[next(iter(tensors))])
        # transformers refuses a file that doesn't say for which framework it is.
        save_file(tensors, path, metadata={"format": "pt"})


def listed(directory: str) -> list[str]:
    """Names in a directory, in no order; none if it isn't there."""
    return os.listdir(directory) if os.path.isdir(directory) else []


def _map_file(path: str) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # the library has checked the header, and that the file is as long as it says
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise InputError(
            f"'{path}' is not there: the download of the model is not whole"
        ) from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"'{path}' is damaged or cut short ({error}): fetch the file again"
        ) from error
    header.pop("__metadata__", None)
    mapped: np.ndarray = np.asarray(np.memmap(path, mode="r"))
    return {name: _view(mapped, 8 + length, name, entry) for name, entry in header.items()}


def _view(mapped: np.ndarray, start: int, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in _DTYPES:
        raise InputError(
            f"tensor '{name}' is {entry['dtype']}: expected one of {', '.join(_DTYPES)}; "
            "quantised weights are not read"
        )
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    begin = start + entry["data_offsets"][0]
    return mapped[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
