"""What ties the processes of a run together: when one of them ends before its time, all do.

A process that waits for another in a collective may wait for minutes when that one has gone. So the
connections over which they met stay open, process 0's with each other one, and a thread watches
them. Who has done its part says so. A connection that closes without that, or a word of failure,
ends the process at the other side; process 0 first passes it on to all the others.

What goes over a connection are lines of JSON: `{"process": 1, "end": "failed"}`.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

_LAST_WORDS_SECONDS: Final = 1.0  # when one has failed, others may be about to say the same
_RELAY_SECONDS: Final = 3.0  # process 0 stays so much longer: without it jax ends the others
_HEAR_SECONDS: Final = 0.5
_KEEP_ALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a minute in all


class End(enum.StrEnum):
    """How a process has ended."""

    DONE = "done"  # has done its part: the others go on
    FAILED = "failed"  # has said why
    LOST = "lost"  # its connection has closed, and it has said nothing


_SAID: Final = {
    End.FAILED: "{} has failed, its own log says why; ",
    End.LOST: "{} has gone without a word, killed or cut off; ",
}


class Lifeline:
    """One process's connections: process 0's to each other, any other's to process 0.

    Watches from the start, in a thread that keeps no process alive.

    Args:
      index: of this process.
      count: of the run's processes.
      connections: by the index of the process at the other side; nobody else may use them.
      leave: ends this process with an exit code, and does not return.
    """

    def __init__(
        self,
        index: int,
        count: int,
        connections: Mapping[int, socket.socket],
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._index, self._count = index, count
        self._connections, self._leave = dict(connections), leave
        self._heard = threading.Event()  # that another has ended
        self._sentence = ""  # which says so
        self._leaving = threading.Lock()  # taken once, by whoever ends this process
        for connection in self._connections.values():
            _keep_alive(connection)
            connection.setblocking(False)
        os.register_at_fork(after_in_child=self._let_go)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def finish(self) -> None:
        """Tells the others that this process has done its part. It still ends with them."""
        self._tell(self._index, End.DONE)

    def fail(self, code: int) -> None:
        """Ends this process with an exit code, and the others with it."""
        self._leaving.acquire()
        # What nobody foresaw may come of another's end, and be seen before that is heard of.
        if code == 1 and self._heard.wait(_HEAR_SECONDS):
            print(self._sentence, file=sys.stderr)
        self._tell(self._index, End.FAILED)
        if self._index == 0:
            time.sleep(_LAST_WORDS_SECONDS + _RELAY_SECONDS)
        self._flush_and_leave(code)

    def _watch(self) -> None:
        done: set[int] = set()
        for other, end in self._hear():
            if end is End.DONE:
                done.add(other)
            elif end is End.FAILED or other not in done:
                self._end_with(other, end)
                return

    def _hear(self) -> Iterator[tuple[int, End]]:
        """The ends of processes as they become known, until all connections have closed."""
        unread = dict.fromkeys(self._connections, b"")
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    index = key.data
                    try:
                        data = self._connections[index].recv(4096)
                    except BlockingIOError:
                        continue
                    except OSError:
                        data = b""  # as closed
                    *lines, unread[index] = (unread[index] + data).split(b"\n")
                    for line in lines:
                        told = json.loads(line)
                        yield told["process"], End(told["end"])
                    if not data:
                        selector.unregister(key.fileobj)
                        yield index, End.LOST

    def _end_with(self, other: int, end: End) -> None:
        """Ends this process because another has ended."""
        self._sentence = (
            f"{_SAID[end].format(f'process {other} of {self._count}')}"
            f"process {self._index} ends with it. The same command goes on from the last checkpoint"
        )
        self._heard.set()
        if self._index == 0:
            self._tell(other, end)
            time.sleep(_RELAY_SECONDS)
        if end is End.FAILED:
            time.sleep(_LAST_WORDS_SECONDS)
        self._leaving.acquire()
        print(self._sentence, file=sys.stderr)
        self._flush_and_leave(1)

    def _tell(self, process: int, end: End) -> None:
        line = json.dumps({"process": process, "end": end}).encode() + b"\n"
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # that one has gone too
                connection.send(line)

    def _flush_and_leave(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave(code)

    def _let_go(self) -> None:
        """In a forked child, which would keep the connections open after its parent's end."""
        for connection in self._connections.values():
            connection.close()


def _keep_alive(connection: socket.socket) -> None:
    """So that networks don't forget a connection that is silent for days, and a cut is noticed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
