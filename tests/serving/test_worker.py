"""The worker's promises: all answered, so many at once, cancelled means free, failure is said."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import pytest

from t5x_lite.serving.worker import Full, Stopped, Worker
from tests.serving.common import EchoEngine, wait_for


def request(*tokens):
    return SimpleNamespace(tokens=tokens, max_tokens=99)


@pytest.fixture
def engine():
    return EchoEngine()


@pytest.fixture
def worker(engine):
    worker = Worker({"": engine}, places=4)
    yield worker
    engine.held.clear()
    worker.close()


def until_finished(outcomes):
    events = []
    while not events or events[-1].finished is None:
        events.append(outcomes.get(timeout=60))
    return [event.token for event in events]


def test_every_request_gets_its_own_tokens_in_order(worker):
    inboxes = []
    for number in range(4):
        inboxes.append(queue.Queue())
        worker.generate("", request(*range(number, number + 5)), inboxes[-1].put)
    for number, inbox in enumerate(inboxes):
        assert until_finished(inbox) == list(range(number, number + 5))
        assert inbox.empty()
    wait_for(lambda: worker.held == 0)


def test_calls_run_between_the_steps_and_their_errors_are_theirs_alone(worker, engine):
    engine.held.set()
    streamed, called = queue.Queue(), queue.Queue()
    worker.generate("", request(1, 2), streamed.put)
    worker.call(lambda: "an answer", called.put)
    assert called.get(timeout=60) == "an answer"
    worker.call(lambda: 1 / 0, called.put)
    assert isinstance(called.get(timeout=60), ZeroDivisionError)
    engine.held.clear()
    assert until_finished(streamed) == [1, 2]


def test_a_request_that_the_engine_refuses_gets_the_reason(worker, engine):
    engine.submit = lambda request: [][0]
    inbox = queue.Queue()
    worker.generate("", request(1), inbox.put)
    assert isinstance(inbox.get(timeout=60), IndexError)
    wait_for(lambda: worker.held == 0)


def test_more_than_its_places_are_refused_and_nothing_of_them_is_kept(worker, engine):
    engine.held.set()
    inboxes = [queue.Queue() for _ in range(4)]
    for inbox in inboxes:
        worker.generate("", request(7), inbox.put)
    with pytest.raises(Full, match="4 requests wait or run"):
        worker.generate("", request(8), print)
    with pytest.raises(Full):
        worker.call(print, print)
    engine.held.clear()
    assert [until_finished(inbox) for inbox in inboxes] == [[7]] * 4
    wait_for(lambda: worker.held == 0)
    again = queue.Queue()
    worker.generate("", request(9), again.put)
    assert until_finished(again) == [9]


def test_what_is_cancelled_frees_its_slot_and_says_nothing_more(worker, engine):
    engine.held.set()
    heard = []
    tickets = [worker.generate("", request(1, 2, 3), heard.append) for _ in range(3)]
    call = worker.call(lambda: None, heard.append)
    wait_for(lambda: len(engine.running) == 2 and len(engine.waiting) == 1 and heard == [None])
    heard.clear()
    for ticket in (*tickets, call):
        ticket.cancel()
    wait_for(lambda: worker.held == 0)
    assert engine.pending == 0
    assert len(engine.cancelled) == 3
    engine.held.clear()
    inbox = queue.Queue()
    worker.generate("", request(4), inbox.put)
    assert until_finished(inbox) == [4]
    assert heard == []


def test_a_step_that_fails_ends_the_worker_and_tells_everyone(worker, engine):
    engine.held.set()
    inbox = queue.Queue()
    worker.generate("", request(1), inbox.put)
    engine.fails = True
    assert isinstance(inbox.get(timeout=60), Stopped)
    wait_for(lambda: not worker.alive)
    with pytest.raises(Stopped, match="restart it"):
        worker.generate("", request(1), print)


def test_closing_tells_those_who_wait(engine):
    worker = Worker({"": engine}, places=4)
    engine.held.set()
    inbox = queue.Queue()
    worker.generate("", request(1), inbox.put)
    worker.close()
    assert isinstance(inbox.get(timeout=60), Stopped)
