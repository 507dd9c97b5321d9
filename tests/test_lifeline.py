"""When one process ends, who else does: with threads in the place of processes."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from t5x_lite import lifeline
from t5x_lite.lifeline import Lifeline
from tests.processes import ROOT

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
COUNT = 4
SECONDS = 20  # in which what should happen does, on a busy machine too


class Run:
    """Connected processes with lifelines, which don't end but say so; `bare` ones have none."""

    def __init__(self, bare: int | None = None) -> None:
        self.left = queue.Queue[tuple[int, int]]()  # which process has ended, and its code
        self.zero: dict[int, socket.socket] = {}  # process 0's ends
        self.others: dict[int, socket.socket] = {}
        self.lines: dict[int, Lifeline] = {}
        before = {*threading.enumerate()}
        with socket.create_server(("127.0.0.1", 0)) as server:
            for index in range(1, COUNT):
                self.others[index] = socket.create_connection(server.getsockname())
                self.zero[index] = server.accept()[0]
        for index in {*range(COUNT)} - {bare}:
            connections = {0: self.others[index]} if index else self.zero
            self.lines[index] = Lifeline(index, COUNT, connections, self.leaver(index))
        self.threads = {*threading.enumerate()} - before

    def leaver(self, index: int) -> Callable[[int], Any]:
        return lambda code: self.left.put((index, code))

    def close(self, index: int) -> None:
        for connection in [self.others[index]] if index else self.zero.values():
            connection.close()

    def ended(self, count: int) -> set[tuple[int, int]]:
        return {self.left.get(timeout=SECONDS) for _ in range(count)}


def readable(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    monkeypatch.setattr(lifeline, "_LAST_WORDS_SECONDS", 0.1)
    monkeypatch.setattr(lifeline, "_RELAY_SECONDS", 0.1)
    runs: list[Run] = []

    def made(**given: Any) -> Run:
        runs.append(Run(**given))
        return runs[-1]

    yield made
    for run in runs:
        for index in range(COUNT):
            run.close(index)


@pytest.mark.parametrize("which", [0, 1, 3])
def test_one_fails_and_all_end(start: Any, which: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = start()
    assert run.zero[3].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    run.lines[which].fail(2)
    assert run.ended(COUNT) == {(i, 2 if i == which else 1) for i in range(COUNT)}
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == [
        f"process {which} of {COUNT} has failed, its own log says why; process {i} ends with it. "
        "The same command goes on from the last checkpoint"
        for i in range(COUNT)
        if i != which
    ]


@pytest.mark.parametrize("which", [0, 1, 3])
def test_one_is_killed_and_all_end(
    start: Any, which: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(bare=which)
    run.close(which)
    assert run.ended(COUNT - 1) == {(i, 1) for i in range(COUNT) if i != which}
    said = capsys.readouterr().err
    assert said.count(f"process {which} of {COUNT} has gone without a word") == COUNT - 1


def test_who_has_done_its_part_harms_nobody(start: Any) -> None:
    run = start(bare=2)
    run.others[2].sendall(b'{"process": 2, "en')
    while readable(run.zero[2]):  # so that it comes in two parts
        pass
    run.others[2].sendall(b'd": "done"}\n')
    run.close(2)
    for line in run.lines.values():
        line.finish()
    for connection in (*run.others.values(), *run.zero.values()):
        with contextlib.suppress(OSError):  # that of process 2 has closed
            connection.shutdown(socket.SHUT_WR)
    for thread in run.threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert run.left.empty()


def test_who_has_done_its_part_ends_with_the_others(start: Any) -> None:
    run = start(bare=1)
    for line in run.lines.values():
        line.finish()
    run.close(1)
    assert run.ended(COUNT - 1) == {(0, 1), (2, 1), (3, 1)}


def test_last_words_of_ones_own(
    start: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who has heard of another's failure, and then fails itself, ends with a code of its own."""
    heard, over = threading.Semaphore(0), threading.Event()

    def sleep(seconds: float) -> None:
        heard.release()
        assert over.wait(SECONDS)

    monkeypatch.setattr(lifeline.time, "sleep", sleep)
    run = start(bare=1)
    run.others[1].sendall(b'{"process": 1, "end": "failed"}\n')
    for _ in range(COUNT - 1):
        assert heard.acquire(timeout=SECONDS)
    run.lines[2].fail(2)
    run.lines[3].fail(1)
    assert run.ended(2) == {(2, 2), (3, 1)}
    (said,) = capsys.readouterr().err.splitlines()  # the one of bad input knows why it ends
    assert said.startswith("process 1 of 4 has failed, its own log says why; process 3 ends")
    over.set()
    assert run.ended(1) == {(0, 1)}


def test_who_fails_by_anothers_end_waits_to_hear_of_it(
    start: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lifeline, "_HEAR_SECONDS", SECONDS)
    run = start(bare=1)
    fails = threading.Thread(target=run.lines[3].fail, args=(1,))
    fails.start()
    run.close(1)
    fails.join(SECONDS)
    assert (3, 1) in run.ended(COUNT - 1)
    said = capsys.readouterr().err
    assert "process 1 of 4 has gone without a word, killed or cut off; process 3 ends" in said


FORKS = """
import os, signal, socket, sys, time
from t5x_lite.lifeline import Lifeline

connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
line = Lifeline(1, 2, {0: connection})
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(600)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_child_does_not_hold_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        program = subprocess.Popen(
            [sys.executable, "-c", FORKS, port], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        connection, _ = server.accept()
    said, _ = program.communicate(timeout=SECONDS)
    assert program.returncode == -signal.SIGKILL
    try:
        connection.settimeout(SECONDS)
        assert connection.recv(1) == b""
    finally:
        connection.close()
        os.kill(int(said), signal.SIGKILL)
