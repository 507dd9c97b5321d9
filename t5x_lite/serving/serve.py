"""The program: a model's folder, adapters by name, an address."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from typing import Final

import jax

from t5x_lite.decode.loaded import Loaded
from t5x_lite.serving.hosting import BASE, Host, share
from t5x_lite.serving.worker import Worker
from t5x_lite.sharding import Partitioner
from t5x_lite.train import run as runs
from t5x_lite.train.opening import open_model
from t5x_lite.types import InputError

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_GRACE_SECONDS: Final = 3  # for answers under way when the server is told to end


def serve(
    *,
    model_dir: str,
    adapters: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    step: int | None = None,
    slots: int = 8,
    queue: int = 32,
    max_input_tokens: int | None = None,
    max_tokens: int | None = None,
    max_body_bytes: int = 1 << 16,
    seconds: float = 300.0,
    partitioner: Partitioner = Partitioner(),
) -> None:
    """Serves a page and a JSON API to try a model, until it is interrupted.

    Args:
      model_dir: the model: a run's folder, or Hugging Face's.
      adapters: `NAME=FOLDER,NAME=FOLDER`: adapters on that model, to switch on and off.
      host: the address to listen at; others than loopback's let other machines in.
      port: 0: one that is free.
      step: the run's checkpoint; None: the latest.
      slots: how many texts are written at once: with LoRA adapters and without, in one batch; any
        other kind of adapter has so many of its own.
      queue: how many requests may wait on top of that; more are told to come again.
      max_input_tokens: the longest prompt, in tokens; None: what the model allows, at most 512.
      max_tokens: the most that may be written; None: likewise.
      max_body_bytes: the largest body.
      seconds: for an answer, waiting included.
      partitioner: the mesh.
    """
    try:
        import uvicorn

        from t5x_lite.serving import app
    except ImportError as error:
        raise InputError(f"serving needs '{error.name}': pip install 't5x_lite[serve]'") from error
    sizes = {"slots": slots, "queue": queue, "max_body_bytes": max_body_bytes, "seconds": seconds}
    for name, size in sizes.items():
        if size < (0 if name == "queue" else 1):
            raise InputError(f"serve.{name}={size} is too small")
    if jax.process_count() > 1:
        raise InputError("a page is served by one process: start scripts/serve.py on one host")
    folders = parse_adapters(adapters)
    models = open_all(model_dir, folders, step, partitioner)
    served = Host(
        os.path.basename(os.path.abspath(model_dir)),
        models,
        input_tokens=max_input_tokens,
        new_tokens=max_tokens,
    )
    listening = _listen(host, port)
    worker = Worker(served.engines(slots), places=slots + queue)
    local = host in _LOOPBACK
    names = (*_LOOPBACK, "[::1]", host) if local else ("*",)
    limits = app.Limits(max_body_bytes, seconds)
    settings = uvicorn.Config(
        app.build(served, worker, limits, names),
        log_level="warning",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    shown = f"[{host}]" if ":" in host else host
    print(
        f"Serving {model_dir} at http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C ends it)",
        flush=True,
    )
    if not local:
        print("warning: any machine that reaches this address may ask", file=sys.stderr)
    try:
        uvicorn.Server(settings).run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # how it is ended
    finally:
        worker.close()


def parse_adapters(text: str) -> dict[str, str]:
    """'kjv=runs/a,bbe=runs/b' -> {'kjv': 'runs/a', 'bbe': 'runs/b'}. Raises InputError."""
    found: dict[str, str] = {}
    for entry in filter(None, text.split(",")):
        name, equals, folder = (part.strip() for part in entry.partition("="))
        if not (name and equals and folder):
            raise InputError(f"serve.adapters has '{entry}': expected NAME=FOLDER,NAME=FOLDER")
        if name in found:
            raise InputError(f"serve.adapters has two called '{name}'")
        found[name] = folder
    return found


def open_all(
    model_dir: str, adapters: dict[str, str], step: int | None, partitioner: Partitioner
) -> dict[str, Loaded]:
    """The model by the name `BASE`, and with each adapter, whose base's arrays are shared."""
    base = open_model(model_dir, step=step, partitioner=partitioner)
    models = {BASE: base}
    for name, folder in adapters.items():
        try:
            # A run that was tuned has steps of its own, and names its base's.
            own = None if os.path.exists(os.path.join(folder, runs.FILE)) else step
            tuned = open_model(model_dir, adapter=folder, step=own, partitioner=partitioner)
        except InputError as error:
            raise InputError(f"adapter '{name}': {error}") from error
        models[name] = dataclasses.replace(tuned, params=share(base.params, tuned.params))
    return models


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"can't listen at serve.host={host}, serve.port={port}: {error}; another port, or 0 "
            "for one that is free?"
        ) from error
