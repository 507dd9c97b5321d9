"""What XLA compiled is kept on disk: a program's second start reads what its first compiled.

jax's persistent cache, which jax itself leaves off: programs switch it on here. Its entries are
keyed by program, options and versions; one that can't be read is compiled anew, with a warning.
What the compiler took of the host's memory is given back.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import jax
from absl import logging

MAX_BYTES: Final = 2 * 2**30  # of all entries; what was read longest ago goes first
LEAST_SECONDS: Final = 0.05  # of compiling: to read what takes less saves nothing


def keep_compiled() -> None:
    """Has this process keep what it compiles in `folder()`, unless the environment says otherwise.

    jax's own variables stand: JAX_COMPILATION_CACHE_DIR names another folder, which is not bounded
    in size unless JAX_COMPILATION_CACHE_MAX_SIZE is set too, and JAX_ENABLE_COMPILATION_CACHE=false
    switches it off. A folder that can't be made is gone without. Call it before anything compiles.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    if jax.config.jax_compilation_cache_dir is None:
        path = folder()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logging.warning("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(path))
        # jax bounds it with filelock's help, and fails without.
        if jax.config.jax_compilation_cache_max_size == -1 and find_spec("filelock"):
            jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def give_back() -> None:
    """Returns freed memory to the system, after compiling; with glibc alone it does something.

    The compiler frees hundreds of MiB in small pieces, which malloc keeps between those that are
    still in use (malloc_trim(3)) and a step's large buffers can't have: so they would stay in the
    process's peak beside the step's own.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def folder() -> Path:
    """`$XDG_CACHE_HOME/t5x_lite/xla/<kind of processor>`, by default under ~/.cache.

    XLA:CPU compiles for the very processor it runs on and only warns of a program made for another,
    which may then die of an instruction that is not there; so hosts that share a home folder and
    differ in their instructions share no entries.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return root / "t5x_lite" / "xla" / processor()


def processor() -> str:
    """The machine's architecture, and 8 hex digits of what its processor can do."""
    digest = hashlib.sha256(_abilities().encode()).hexdigest()[:8]
    return f"{platform.machine() or 'unknown'}-{digest}"


def _abilities() -> str:
    """Linux's lists of the first processor's flags and its model; else what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    first = text.split("\n\n")[0].splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in first if line.startswith(wanted))
