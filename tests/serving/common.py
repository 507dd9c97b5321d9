"""An engine without a model, and servers in threads."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import jax
import uvicorn

from t5x_lite.sharding import MESH_AXES, Partitioner


@dataclass(frozen=True)
class Event:
    id: int
    token: int | None
    finished: str | None = None


class EchoEngine:
    """Writes a request's tokens back, one a step; `held` keeps it to the steps of `step_once`."""

    def __init__(self, slots: int = 2):
        self.slots = slots
        self.held = threading.Event()
        self.allowed = 0
        self.fails = False
        self.running: dict[int, list[int]] = {}
        self.waiting: list[tuple[int, list[int]]] = []
        self.cancelled: list[int] = []
        self.count = 0

    @property
    def pending(self) -> int:
        return len(self.running) + len(self.waiting)

    def submit(self, request) -> int:
        self.count += 1
        tokens = [int(token) for token in request.tokens][: request.max_tokens]
        self.waiting.append((self.count, tokens))
        return self.count

    def step(self) -> list[Event]:
        if self.fails:
            raise RuntimeError("out of memory")
        while self.waiting and len(self.running) < self.slots:
            number, tokens = self.waiting.pop(0)
            self.running[number] = tokens
        if self.held.is_set():
            if not self.allowed:
                time.sleep(0.002)
                return []
            self.allowed -= 1
        events = []
        for number, tokens in list(self.running.items()):
            token = tokens.pop(0)
            events.append(Event(number, token, None if tokens else "length"))
            if not tokens:
                del self.running[number]
        return events

    def step_once(self) -> None:
        """Lets one more step be taken, and waits for it."""
        self.allowed = 1
        wait_for(lambda: not self.allowed)

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)
        self.running.pop(id, None)
        self.waiting = [one for one in self.waiting if one[0] != id]


@contextlib.contextmanager
def running(app) -> Iterator[httpx.Client]:
    """A client of `app`, served on a free port of loopback by a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition, seconds: float = 60.0) -> None:
    """Until `condition()` holds; the limit is there for what would hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class OneDevice(Partitioner):
    """A mesh of the first device alone: tiny models gain nothing from more."""

    @functools.cached_property
    def mesh(self):
        axes = (jax.sharding.AxisType.Auto,) * 3
        return jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=axes, devices=jax.devices()[:1])
