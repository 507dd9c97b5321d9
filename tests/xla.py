"""How XLA compiles in tests, and in the processes that they start.

Tests compile more than they compute. So LLVM is told not to try hard, fusions go through the older
and quicker emitters, and what was compiled once is kept for the other processes and the next run:
the same programs in a quarter of the time. Imports nothing that reads these settings.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)


def _known(flag: str) -> bool:
    """Whether this jaxlib has the flag: one that it has not ends the process."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    largest = max(Path(folder).glob("*.so"), key=lambda path: path.stat().st_size)
    with largest.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        # A string of its own: names of flags that are gone stand in lists of reserved ones.
        return text.find(b"\0" + flag.lstrip("-").split("=")[0].encode() + b"\0") >= 0


QUICK = tuple(flag for flag in _QUICK if _known(flag))


def flags(devices: int) -> str:
    """`XLA_FLAGS` of a process of its own with so many devices."""
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *QUICK))


def prepare(devices: int) -> None:
    """Sets this process's environment, unless whoever called it has."""
    given = os.environ.get("XLA_FLAGS", "")
    names = [flag for flag in flags(devices).split() if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *names]).strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
