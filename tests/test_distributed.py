"""Who a process is, and that all meet before jax does: with threads in the place of hosts."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest

from t5x_lite import distributed
from t5x_lite.distributed import Process, from_flags, on_pod
from t5x_lite.types import InputError
from tests.processes import free_port


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def test_flags_name_a_process_or_none() -> None:
    assert from_flags(None, None, None) is None
    process = from_flags("[::1]:123", 4, 3)
    assert process == Process("[::1]:123", 4, 3)
    assert process.address == ("::1", 123)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("host:1", None, None), "--num_processes=N and --process_id=I missing"),
        ((None, 2, 0), "--coordinator=HOST:PORT missing"),
        (("host:1", 2, None), "--process_id=I missing"),
        (("host", 2, 0), "--coordinator=host: expected HOST:PORT"),
        (("host:port", 2, 0), "--coordinator=host:port: expected HOST:PORT"),
        (("host:0", 2, 0), "--coordinator=host:0: expected HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2: expected 0 to 1, for --num_processes=2"),
    ],
)
def test_flags_that_name_no_process(flags: tuple[Any, Any, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        from_flags(*flags)


# Pods


@pytest.fixture
def tpu() -> Iterator[None]:
    """As after jax's import where there are chips."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", before)


@pytest.fixture
def metadata() -> Iterator[tuple[dict[str, str], dict[str, str], list[str]]]:
    """What a metadata server answers, the environment in which it is found, what it was asked."""
    values: dict[str, str] = {}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            asked.append(name)
            known = self.headers["Metadata-Flavor"] == "Google" and name in values
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(values.get(name, "").encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield values, {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, asked
    server.shutdown()
    server.server_close()


def test_nobody_is_asked_where_there_are_no_chips(tpu: None, metadata: Any) -> None:
    values, environment, asked = metadata
    values["worker-network-endpoints"] = "a,b"
    assert on_pod({**environment, "TPU_SKIP_MDS_QUERY": "1"}) is None
    for platforms in (None, "", "cpu", "cuda,cpu"):
        jax.config.update("jax_platforms", platforms)
        assert on_pod({**environment, "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}) is None
    assert asked == []


def test_a_tpu_vms_workers(tpu: None, metadata: Any) -> None:
    values, environment, _ = metadata
    assert on_pod(environment) is None  # chips, and no Compute Engine
    values["worker-network-endpoints"] = "unknown:unknown:10.0.0.7"
    values["agent-worker-number"] = "0"
    assert on_pod(environment) is None  # one host
    values["worker-network-endpoints"] = "x:0:10.0.0.7,x:1:10.0.0.8"
    values["agent-worker-number"] = "1"
    assert on_pod(environment) == Process("10.0.0.7:8482", 2, 1)
    values["worker-network-endpoints"] = "host-0,host-1"
    assert on_pod(environment) == Process("host-0:8482", 2, 1)
    values["tpu-env"] = (
        "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n"
    )
    assert on_pod(environment) == Process("10.0.0.1:8482", 6, 5)
    del values["agent-worker-number"]
    with pytest.raises(InputError, match=r"2 workers \(host-0, host-1\), but neither"):
        on_pod(environment)


def test_gkes_workers(tpu: None, metadata: Any) -> None:
    _, environment, asked = metadata
    alone = {**environment, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert on_pod(alone) is None
    four = {**environment, "TPU_WORKER_HOSTNAMES": "w-0,w-1,w-2,w-3", "TPU_WORKER_ID": "2"}
    assert on_pod(four) == Process("w-0:8482", 4, 2)
    slices = {
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job",
    }
    assert on_pod({**four, **slices}) == Process("job-0-0.job:8482", 8, 6)
    with pytest.raises(InputError, match="neither TPU_WORKER_ID"):
        on_pod({**four, "TPU_WORKER_ID": ""})
    assert asked == []


# Meeting


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, dict[int, socket.socket]]]:
    """Each process's connections to others, in place of its lifeline, which could end the tests."""
    found: dict[int, dict[int, socket.socket]] = {}

    def lifeline(index: int, count: int, connections: dict[int, socket.socket]) -> None:
        found[index] = connections

    monkeypatch.setattr(distributed, "Lifeline", lifeline)
    monkeypatch.setattr(distributed, "_lifeline", None)
    yield found
    for connections in found.values():
        for connection in connections.values():
            connection.close()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, lines: Any) -> list[int]:
    """The processes that went on to jax."""
    found: list[int] = []

    def initialize(coordinator: str, count: int, index: int, **_: Any) -> None:
        found.append(index)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "_started", None)
    return found


def meet(*processes: Process, agreed: tuple[str, ...] = (), timeout: float = 2) -> list[str]:
    """What each is told, all at once; an empty string: it went on."""

    def attempt(process: Process, text: str) -> str:
        try:
            distributed.start(process, timeout, text)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(attempt, processes, agreed or [""] * len(processes)))


def test_all_who_come_go_on(joined: list[int]) -> None:
    address = free_address()
    assert meet(*(Process(address, 4, i) for i in (3, 1, 0, 2)), timeout=30) == [""] * 4
    assert sorted(joined) == [0, 1, 2, 3]


def test_connections_stay_and_the_port_is_free(joined: list[int], lines: Any) -> None:
    process = Process(free_address(), 3, 0)
    meet(process, *(Process(process.coordinator, 3, i) for i in (1, 2)), timeout=30)
    assert {index: set(found) for index, found in lines.items()} == {0: {1, 2}, 1: {0}, 2: {0}}
    socket.create_server(process.address).close()  # as jax does next
    for index in (1, 2):
        lines[index][0].sendall(b"here %d" % index)
        assert lines[0][index].recv(16) == b"here %d" % index


def test_one_process_alone_waits_for_nobody(joined: list[int]) -> None:
    distributed.start(None)
    distributed.start(Process("nowhere.invalid:1", 1, 0))
    assert joined == []
    assert distributed.started() is None
    distributed.finish()  # both are for one of several
    distributed.leave(1)


def test_who_is_missing_is_said_to_all(joined: list[int]) -> None:
    address = free_address()
    first, second = meet(Process(address, 4, 0), Process(address, 4, 2))
    assert "4 processes were expected, 2 came in 2 seconds: missing 1, 3 (of 0 to 3)" in first
    assert first == second
    assert joined == []


def test_process_0_is_missing(joined: list[int]) -> None:
    address = free_address()
    (told,) = meet(Process(address, 2, 1), timeout=0.5)
    assert "2 processes were expected; process 1 of 2 did not meet process 0" in told
    assert "Connection refused" in told
    (told,) = meet(Process("nowhere.invalid:9", 2, 1), timeout=0.5)
    assert "did not meet process 0 at nowhere.invalid:9" in told
    assert joined == []


@pytest.mark.parametrize(
    ("count", "index", "agreed", "expected"),
    [
        (3, 1, "a", "process 1 was started with --num_processes=3, process 0 with 2"),
        (2, 1, "b", "process 1 has another configuration than process 0"),
    ],
)
def test_who_disagrees_is_named(
    joined: list[int], count: int, index: int, agreed: str, expected: str
) -> None:
    address = free_address()
    told = meet(Process(address, 2, 0), Process(address, count, index), agreed=("a", agreed))
    assert told[0].startswith(expected)
    assert told[0] == told[1]
    assert joined == []


def test_two_of_one_number(joined: list[int]) -> None:
    address = free_address()
    told = meet(Process(address, 3, 0), Process(address, 3, 1), Process(address, 3, 1), timeout=20)
    assert all("two processes were started with --process_id=1" in text for text in told)
    assert joined == []


def test_a_port_that_is_taken(joined: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_GRACE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (told,) = meet(Process(address, 2, 0))
        assert f"can't listen at --coordinator={address}: Address already in use" in told
        (told,) = meet(Process(address, 2, 1), timeout=0.2)  # and what listens says nothing
    assert "what listens there has not said that all have come" in told


def test_strangers_and_those_who_left_do_not_count(
    joined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_HELLO_SECONDS", 0.2)
    address = free_address()
    where = Process(address, 3, 0).address
    hello = b'{"process": 1, "count": 3, "agreed": ""}\n'
    with ThreadPoolExecutor(1) as thread:
        zero = thread.submit(meet, Process(address, 3, 0), timeout=20)
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": "1"}\n', b"", hello):
            deadline = time.monotonic() + 10
            while True:
                try:
                    connection = socket.create_connection(where, timeout=10)
                    break
                except OSError:
                    assert time.monotonic() < deadline
            connection.sendall(text)
            connection.close()
        told = meet(Process(address, 3, 2), Process(address, 3, 1), timeout=20)
        assert [*zero.result(), *told] == [""] * 3
    assert sorted(joined) == [0, 1, 2]
