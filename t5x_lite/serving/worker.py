"""One thread that owns the device: it drives every engine, and runs what else a model is asked.

Other threads hand it work and get answers through callbacks, which run on the worker's thread. How
much it holds at once is bounded: what comes on top is refused, so that waiting has an end.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from absl import logging

STOPPED: Final = "the server is not answering any more: restart it; its log says what happened"


class Engine(Protocol):
    """What the worker needs of `decode.engine.Engine`: many requests advance by a token a step."""

    @property
    def pending(self) -> int: ...  # requests that have not finished
    def submit(self, request: Any) -> int: ...
    def step(self) -> list[Any]: ...  # events: id, token or None, finished or None
    def cancel(self, id: int) -> Any: ...


class Full(Exception):
    """The worker holds as much as it may."""


class Stopped(Exception):
    """The worker's thread has ended."""


class Ticket:
    """Work handed in. `deliver` gets, on the worker's thread:

    of a request to an engine its events, the last with `finished`; of a call its result; of either,
    an exception in the place of what it stopped.
    """

    def __init__(
        self, work: Callable[[], Any], engine: Engine | None, deliver: Callable[[Any], None]
    ):
        self.work = work
        self.engine = engine
        self.deliver = deliver
        self.cancelled = False

    def cancel(self) -> None:
        """Nothing more is delivered; the slot is free before the next step."""
        self.cancelled = True


class Worker:
    """The thread, and the queue before it.

    Args:
      engines: by name.
      places: the most that may wait and run together.
    """

    def __init__(self, engines: Mapping[str, Engine], places: int):
        self._engines = dict(engines)
        self._places = places
        self._changed = threading.Condition()
        self._new: collections.deque[Ticket] = collections.deque()
        self._held = 0
        self._stopped: str | None = None  # why
        # Touched by the thread alone:
        self._calls: collections.deque[Ticket] = collections.deque()
        self._running: dict[tuple[int, int], Ticket] = {}  # by engine and the engine's id
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """How much waits or runs."""
        return self._held

    @property
    def alive(self) -> bool:
        return self._stopped is None

    def generate(self, name: str, request: Any, deliver: Callable[[Any], None]) -> Ticket:
        """Has the engine called `name` answer. Raises Full and Stopped."""
        engine = self._engines[name]
        return self._hand_in(Ticket(lambda: engine.submit(request), engine, deliver))

    def call(self, function: Callable[[], Any], deliver: Callable[[Any], None]) -> Ticket:
        """Runs `function` between two steps. Raises Full and Stopped."""
        return self._hand_in(Ticket(function, None, deliver))

    def close(self) -> None:
        """Ends the thread; what it holds gets Stopped."""
        with self._changed:
            self._stopped = self._stopped or "closed"
            self._changed.notify()
        self._thread.join()

    def _hand_in(self, ticket: Ticket) -> Ticket:
        with self._changed:
            if self._stopped is not None:
                raise Stopped(STOPPED)
            if self._held >= self._places:
                raise Full(f"{self._held} requests wait or run, and no more may: try again later")
            self._held += 1
            self._new.append(ticket)
            self._changed.notify()
        return ticket

    def _run(self) -> None:
        try:
            while self._take():
                self._drop_cancelled()
                for engine in self._engines.values():
                    if engine.pending:
                        self._step(engine)
                if self._calls:  # one a turn: streams go on meanwhile
                    ticket = self._calls.popleft()
                    self._finish(ticket, _outcome(ticket))
        except Exception as error:
            # Nobody knows what an engine holds after a failed step: no answer beats a wrong one.
            logging.exception("the thread of the model has stopped")
            self._stopped = repr(error)
        finally:
            self._stopped = self._stopped or "ended"
            self._give_up()

    def _take(self) -> bool:
        """Moves new work to where it runs, waiting for some if there is none; False: closed."""
        with self._changed:
            while not (self._new or self._calls or self._running or self._stopped):
                self._changed.wait()
            new = list(self._new)
            self._new.clear()
        for ticket in new:
            if ticket.cancelled:
                self._finish(ticket)
                continue
            if ticket.engine is None:
                self._calls.append(ticket)
                continue
            outcome = _outcome(ticket)
            if isinstance(outcome, Exception):
                self._finish(ticket, outcome)
            else:
                self._running[id(ticket.engine), outcome] = ticket
        return self._stopped is None

    def _drop_cancelled(self) -> None:
        for key, ticket in list(self._running.items()):
            if ticket.cancelled and ticket.engine is not None:
                ticket.engine.cancel(key[1])
                self._finish(self._running.pop(key))
        for ticket in [ticket for ticket in self._calls if ticket.cancelled]:
            self._calls.remove(ticket)
            self._finish(ticket)

    def _step(self, engine: Engine) -> None:
        for event in engine.step():
            key = id(engine), event.id
            if key not in self._running:
                continue  # cancelled
            if event.finished is None:
                self._running[key].deliver(event)
            else:
                self._finish(self._running.pop(key), event)

    def _finish(self, ticket: Ticket, last: Any = None) -> None:
        with self._changed:
            self._held -= 1
        if not ticket.cancelled:
            ticket.deliver(last)

    def _give_up(self) -> None:
        with self._changed:
            rest = [*self._new, *self._calls, *self._running.values()]
            self._new.clear()
        for ticket in rest:
            self._finish(ticket, Stopped(STOPPED))


def _outcome(ticket: Ticket) -> Any:
    try:
        return ticket.work()
    except Exception as error:
        return error
