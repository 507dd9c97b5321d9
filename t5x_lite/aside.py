"""Compiling in a thread of its own, while this one does other things."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

import jax

_THREAD: Final = "t5x_lite-compiles"
T = TypeVar("T")


def start(function: Callable[..., T], *args: Any) -> Future[T]:
    """Calls what compiles in a thread of its own; `.result()` waits for it.

    Or here and now: on GPUs, whose compiler times kernels on the device, and where the caller has
    set something by `with jax.default_matmul_precision(...)` and the like, for that is set for one
    thread alone.
    """
    pool = ThreadPoolExecutor(1, _THREAD)
    try:
        there = pool.submit(lambda: dict(jax.config.values)).result()
        if jax.default_backend() == "gpu" or there != dict(jax.config.values):
            done: Future[T] = Future()
            done.set_result(function(*args))
            return done
        return pool.submit(function, *args)
    finally:
        pool.shutdown(wait=False)


def under_way() -> bool:
    """Whether something that was started is not done."""
    return bool(_threads())


def wait() -> None:
    """Returns when all that was started is done."""
    for thread in _threads():
        thread.join()


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(_THREAD)]


def leave(code: int) -> None:
    """Ends this process at once with an exit code, if it is compiling; else does nothing.

    For one that has failed: at its end Python would wait for the compiler, which can take minutes.
    """
    if under_way():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
