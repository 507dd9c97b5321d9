"""Compiled programs kept whole: a start that finds its programs neither traces nor lowers them.

jax's persistent cache (see `compilation`) knows a program by its text, for which it has to be
traced and lowered anew in every process. Here it is known by all that its text is made from:

    the sources of this package and of every other loaded module that is not an installed one;
    the versions of Python, jax, jaxlib, Flax, Optax, NumPy and of the devices' own compiler;
    jax's and Flax's configuration, and the environment's variables for them and for XLA;
    the devices; the arguments' shapes, dtypes and shardings;
    the values that the function was made with, field by field.

What can't be told in this way leaves its program out, which is then traced as ever: a lambda, an
array, an object whose class is neither this package's nor of those libraries, sources that have
changed since this process read them, and a run of several processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import os
import pickle
import re
import sys
import sysconfig
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, Final

import flax
import jax
import jaxlib
import numpy as np
import optax
from absl import logging
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import t5x_lite
from t5x_lite import compilation
from t5x_lite.sharding import Partitioner

MAX_BYTES: Final = 2**30  # of all that is kept; what was read longest ago goes first
READ: Final = "/t5x_lite/programs/read"  # jax.monitoring's event for each that was
_PACKAGE: Final = Path(__file__).resolve().parent
_LIBRARIES: Final = {m.__name__: m.__version__ for m in (jax, jaxlib, flax, optax, np)}
_PREFIXES: Final = (
    "JAX_",
    "FLAX_",
    "XLA_",
    "TF_",
    "LIBTPU_",
    "TPU_",
    "CUDA_",
    "NVIDIA_",
    "ROCM_",
    "NPROC",
)
_OF_CACHES: Final = ("jax_compilation_cache_", "jax_persistent_cache_")

_ADDRESS: Final = re.compile(r"\b0x[0-9a-f]+")  # in the text of a jaxpr: of functions
_PYTHON: Final = tuple(f"{sysconfig.get_path(x)}{os.sep}" for x in ("stdlib", "platstdlib"))

_folder: Path | None = None  # None: nothing is kept
_here = threading.local()  # .read: jax's cache gave this thread a program


class _UntoldError(Exception):
    """A value that no text stands for."""


def keep() -> None:
    """Has this process keep what it compiles: see `compilation.keep_compiled`, and here.

    Here in `programs-<user>` of the folder where jax does, if it does and that is a local one.
    """
    compilation.keep_compiled()
    base = jax.config.jax_compilation_cache_dir
    if base and "://" not in base and jax.config.jax_enable_compilation_cache:
        keep_in(Path(base) / f"programs-{os.getuid()}")


def keep_in(folder: Path | None) -> None:
    """Has programs of this process kept in a folder, which need not exist; None: not any more."""
    global _folder
    if folder is not None and _folder is None:
        jax.monitoring.register_event_listener(_listen)
    _folder = folder


def _listen(event: str, **_: Any) -> None:
    if event.endswith("/compilation_cache/cache_hits"):
        _here.read = True


class Kept:
    """A jitted function, compiled once for each kind of arguments: here, or by an earlier process.

    Without a folder to keep it in, calls are the function's own.
    """

    def __init__(self, jitted: Any, partitioner: Partitioner, *parts: Any):
        """`parts` are all values that the function's result depends on beside its arguments."""
        self._jitted, self._partitioner, self._parts = jitted, partitioner, parts
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        if not self._is_kept:
            return self._jitted(*args)
        leaves, tree = jax.tree.flatten(args)
        kind = (tree, *((np.shape(x), x.dtype, getattr(x, "sharding", None)) for x in leaves))
        if kind not in self._compiled:
            self._compiled[kind] = self.compiled(*args)
        return self._compiled[kind](*args)

    def compiled(self, *args: Any, options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """The program for arguments, which may be shape structs; `options` are the compiler's."""
        folder = _folder
        try:
            if folder is None or not self._is_kept:
                raise _UntoldError("nothing is kept, or not for these devices")
            where = [self._partitioner, self._partitioner.mesh]
            around, sources, kinds = _around(), _sources(), [_kinds(args), options]
            made_of = _digest([around, sources, where, self._parts, kinds])
        except Exception as error:  # a module or value of the user's may be as odd as it likes
            logging.debug("traced and lowered: %s", error)
            return self._jitted.lower(*args).compile(compiler_options=options)
        name, devices = self._jitted.__name__, tuple(self._partitioner.mesh.devices.flat)
        pointer = folder / f"{name}-{made_of}.key"
        target = _target(pointer)
        found = None if target is None else _load(target, devices)
        if found is not None:
            return found
        traced = self._jitted.trace(*args)
        lowered = traced.lower()
        # Other sources, or other parts, may give the same program. Its text alone leaves out which
        # arguments it was found not to need.
        text = [_ADDRESS.sub("", str(traced.jaxpr)), lowered.as_text()]
        path = folder / f"{name}-{_digest([around, where[1], kinds, text])}.program"
        found = _load(path, devices)
        if found is None or found.out_tree != lowered.out_tree:
            _here.read = False
            found = lowered.compile(compiler_options=options)
            if _here.read:  # by jax: what XLA:CPU has read back it can't write whole again
                return found
            _save(path, found, set(devices))
        if _sources_again() == sources:
            _write(pointer, path.name.encode())
        return found

    @functools.cached_property
    def _is_kept(self) -> bool:
        """Not where devices are described only (see `planning`), or other processes' too."""
        devices = set(self._partitioner.mesh.devices.flat)
        return _folder is not None and devices <= set(jax.local_devices())


# Programs on disk


def _target(pointer: Path) -> Path | None:
    """The program that a pointer names."""
    try:
        path = pointer.with_name(pointer.read_text(encoding="utf-8"))
        os.utime(pointer)
    except (OSError, ValueError):
        return None
    return path


def _load(path: Path, devices: tuple[jax.Device, ...]) -> jax.stages.Compiled | None:
    """A kept program; None: there is none that can be read."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return None
    if owner != os.getuid():  # to read a program is to run it
        logging.warning("%s is made anew, for it is another user's", path)
        return None
    try:
        payload, arguments, results = pickle.loads(zlib.decompress(path.read_bytes()))
        found = serialize_executable.deserialize_and_load(
            payload, arguments, results, execution_devices=devices
        )
    except Exception as error:  # whatever XLA and pickle make of it
        logging.warning("%s is made anew, for it can't be read: %s", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):  # another process has pruned it
        os.utime(path)
    jax.monitoring.record_event(READ)
    return found


def _save(path: Path, compiled: jax.stages.Compiled, devices: set[jax.Device]) -> None:
    if any(at.device_set != devices for at in jax.tree.leaves(compiled.output_shardings)):
        logging.info("%s is not kept: it is not of all devices", path.name)
        return
    try:
        kept = pickle.dumps(serialize_executable.serialize(compiled))
    except Exception as error:  # not every backend's can be, and none that calls Python back
        logging.info("%s is not kept: %s", path.name, error)
        return
    _write(path, zlib.compress(kept, 1))  # with a checksum
    _prune(path.parent)


def _write(path: Path, data: bytes) -> None:
    """A file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        logging.warning("compiled programs are not kept: %s", error)
        with contextlib.suppress(OSError):
            partial.unlink()


def _prune(folder: Path) -> None:
    """Deletes what was read longest ago, until the rest is small enough."""
    with contextlib.suppress(OSError):  # another process prunes too
        found = [(path, path.stat()) for path in folder.iterdir()]
        size = sum(stat.st_size for _, stat in found)
        for path, stat in sorted(found, key=lambda one: one[1].st_mtime):
            if size <= MAX_BYTES:
                return
            path.unlink(missing_ok=True)
            size -= stat.st_size


# What a program is made of, as text


def _digest(value: Any) -> str:
    """Of a value told field by field. Raises `_UntoldError` if something in it can't be."""
    return hashlib.sha256("\n".join(_lines(value)).encode()).hexdigest()


def _lines(value: Any) -> Iterator[str]:
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        yield repr(value)
    elif kind in (tuple, list, PartitionSpec):
        yield f"{kind.__name__} of {len(value)}"
        for one in value:
            yield from _lines(one)
    elif isinstance(value, Mapping):
        yield f"{kind.__name__} of {len(value)}"
        for key, one in value.items():
            yield from _lines(key)
            yield from _lines(one)
    elif isinstance(value, enum.Enum):
        yield f"{_name(kind)}.{value.name}"
    elif isinstance(value, np.dtype | np.generic):
        yield f"{kind.__name__} {value!r}"
    elif isinstance(value, type | FunctionType):
        yield _name(value)
    elif "__dataclass_fields__" in vars(kind):
        yield _name(kind)
        for field in dataclasses.fields(value):
            yield field.name
            yield from _lines(getattr(value, field.name))
    elif isinstance(value, NamedSharding):
        yield from _lines([value.mesh, value.spec, value.memory_kind])
    elif isinstance(value, SingleDeviceSharding):
        yield from _lines([sorted(device.id for device in value.device_set), value.memory_kind])
    elif isinstance(value, Mesh):
        ids = [device.id for device in value.devices.flat]
        yield from _lines([value.axis_names, value.devices.shape, ids, str(value.axis_types)])
    else:
        raise _UntoldError(f"{kind.__module__}.{kind.__qualname__} {value!r:.100}")


def _name(value: Any) -> str:
    """Of a class or function of this package's or a known library's. Raises `_UntoldError`."""
    module, path = value.__module__ or "", value.__qualname__
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is not value or module.partition(".")[0] not in (*_LIBRARIES, "builtins", __package__):
        raise _UntoldError(f"{module}.{path}")
    return f"{module}.{path}"


def _kinds(args: Any) -> list[Any]:
    """Structure of the arguments, and what is compiled for in each."""
    leaves, tree = jax.tree.flatten(args)

    def kind(x: Any) -> list[Any]:
        weak, committed = getattr(x, "weak_type", False), getattr(x, "committed", True)
        return [np.shape(x), str(x.dtype), weak, committed, getattr(x, "sharding", None)]

    return [str(tree), [kind(leaf) for leaf in leaves]]


def _around() -> dict[str, Any]:
    """What programs of this process depend on, whatever they are."""
    config = {key: str(value) for key, value in sorted(jax.config.values.items())}
    environment = {key: os.environ[key] for key in sorted(os.environ) if key.startswith(_PREFIXES)}
    devices = jax.devices()
    return {
        "versions": [sys.version, _LIBRARIES, devices[0].client.platform_version],
        "processor": compilation.processor(),
        "jax": {key: value for key, value in config.items() if not key.startswith(_OF_CACHES)},
        "flax": [str(getattr(flax.config, x)) for x in dir(flax.config) if x.startswith("flax_")],
        "environment": {
            key: value
            for key, value in environment.items()
            if not key.lower().startswith(_OF_CACHES)
        },
        "devices": [
            [device.id, device.platform, device.device_kind, device.process_index]
            for device in devices
        ],
    }


def _sources() -> str:
    """A digest of this package and of the other loaded modules that are not installed ones.

    Raises `_UntoldError` if one has changed since, or may have: it isn't what this process runs.
    """
    loaded = [getattr(module, "__dict__", {}).get("__file__") for module in [*sys.modules.values()]]
    others = {str(file) for file in loaded if file and not _is_installed(str(file))}
    ours = [str(path) for path in sorted(_PACKAGE.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in [*ours, *sorted(others - set(ours))]:
        if os.stat(file).st_ctime > t5x_lite.BEGAN - 0.02:  # files go by the clock of the last tick
            raise _UntoldError(f"{file} has changed since this process began")
        digest.update(f"{os.path.relpath(file, _PACKAGE)} {_content(file)}\n".encode())
    return digest.hexdigest()


def _sources_again() -> str | None:
    """As they are after tracing, which may have loaded more."""
    with contextlib.suppress(OSError, _UntoldError):
        return _sources()
    return None


@functools.cache
def _content(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@functools.cache
def _is_installed(file: str) -> bool:
    """Python's own, or of a package with a version."""
    if any(f"{os.sep}{name}{os.sep}" in file for name in ("site-packages", "dist-packages")):
        return True
    return file.startswith(_PYTHON)
