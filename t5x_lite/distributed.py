"""Several processes, one run: which of them this is, whether all have come, and jax told of it.

The one place that calls `jax.distributed.initialize`. jax by itself ends a process, with a stack of
C++ and no exception, when another does not come in time. So the processes meet here first: each
calls process 0 at the address where jax will meet, and says who it is and what it is about to run.
Only when all have come and agree does jax go on; otherwise each says the same one sentence. The
connections stay open: when a process ends before its time, the others learn it by them and end too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax

from t5x_lite.lifeline import Lifeline
from t5x_lite.types import InputError

POD_PORT: Final = 8482  # jax's own on pods: their networks let it through
_RETRY_SECONDS: Final = 0.2
_HELLO_SECONDS: Final = 5.0  # for a line from whoever has called
_GRACE_SECONDS: Final = 10.0  # process 0 may have been started so much later
_METADATA_TRIES: Final = 3


@dataclass(frozen=True)
class Process:
    """One of a run's processes."""

    coordinator: str  # HOST:PORT, where process 0 listens
    count: int  # of the run's processes
    index: int  # from 0

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise InputError(
                f"--coordinator={self.coordinator}: expected HOST:PORT, an address of process 0's "
                "machine that the others reach, and a free port there"
            )
        if not 0 <= self.index < self.count:
            raise InputError(
                f"--process_id={self.index}: expected 0 to {self.count - 1}, for "
                f"--num_processes={self.count}"
            )

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def name(self) -> str:
        return f"process {self.index} of {self.count}"


# As jax has its own, for the whole of this process:
_started: Process | None = None
_lifeline: Lifeline | None = None


def from_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Process | None:
    """The process that three flags name; None: none is given. InputError: only some are."""
    given = {
        "--coordinator=HOST:PORT": coordinator,
        "--num_processes=N": num_processes,
        "--process_id=I": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError(
            f"{' and '.join(missing)} missing: a run of several processes takes "
            f"{', '.join(given)}, and none of them on a TPU pod, where they are found"
        )
    return Process(coordinator, num_processes, process_id)


def on_pod(environment: Mapping[str, str] = os.environ) -> Process | None:
    """The process on this worker of a TPU pod, one a worker; None on one host alone.

    GKE says in the environment who the workers are; on TPU VMs Compute Engine's metadata server
    does. That server is asked only where jax, when it was imported, found libtpu and TPU chips and
    is to use them; everywhere else this returns at once.
    """
    if "tpu" not in (jax.config.jax_platforms or "").split(","):
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    settings: Mapping[str, str] = environment
    if hosts:
        worker = environment.get("TPU_WORKER_ID", "")
    elif "TPU_SKIP_MDS_QUERY" in environment:  # by jax itself, where there are no chips
        return None
    else:
        hosts = _metadata("worker-network-endpoints", environment)
        worker = _metadata("agent-worker-number", environment)
        lines = re.findall(r"^(\w+): *'?(.*?)'?$", _metadata("tpu-env", environment), re.M)
        settings = {**dict(lines), **environment}
    # Entries are hosts, hosts with ports, or Compute Engine's NAME:NUMBER:ADDRESS.
    parts = [entry.strip().split(":") for entry in hosts.split(",") if entry.strip()]
    workers = [part[2] if len(part) == 3 else part[0] for part in parts]
    slices = int(settings.get("MEGASCALE_NUM_SLICES") or 1)
    count = len(workers) * slices
    if count <= 1:
        return None
    which = settings.get("MEGASCALE_SLICE_ID") or "0"
    if not (worker.isdigit() and which.isdigit()):
        raise InputError(
            f"this TPU slice has {len(workers)} workers ({', '.join(workers)}), but neither "
            "TPU_WORKER_ID nor the metadata server says which of them this is: give --coordinator, "
            "--num_processes and --process_id"
        )
    first = (settings.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    return Process(f"{first}:{POD_PORT}", count, int(which) * len(workers) + int(worker))


def _metadata(name: str, environment: Mapping[str, str]) -> str:
    """An attribute of this machine on Compute Engine; empty where there is none to be had."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is never behind one
    for _ in range(_METADATA_TRIES):
        try:
            with opener.open(request, timeout=_HELLO_SECONDS) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return ""
        except OSError:
            pass
        time.sleep(_RETRY_SECONDS)
    return ""


def start(process: Process | None, timeout: float = 300, agreed: str = "") -> None:
    """Makes this process one of its run's; with None, or a count of 1, does nothing.

    Comes before anything that asks jax for devices. From then on this process ends when another
    ends that has not called `finish`, within two seconds (process 0: four), with exit code 1.

    Args:
      process: which one this is.
      timeout: seconds to wait for the others.
      agreed: what all processes have to say alike: a fingerprint of the configuration.

    Raises:
      InputError: in every process that has come, if some haven't by then, or don't agree.
    """
    global _started, _lifeline
    if process is None or process.count == 1:
        return
    meet = _call_roll if process.index == 0 else _answer_roll
    _lifeline = Lifeline(process.index, process.count, meet(process, timeout, agreed))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    local = _is_loopback(process.address[0])
    try:
        jax.distributed.initialize(
            process.coordinator,
            process.count,
            process.index,
            cluster_detection_method="deactivate",  # nothing is left to detect
            initialization_timeout=max(60, int(timeout)),  # they are all there
            coordinator_bind_address=process.coordinator if local else None,
        )
    except RuntimeError as error:
        raise InputError(f"{process.name} can't join at {process.coordinator}: {error}") from error
    _started = process


def started() -> Process | None:
    """The process that `start` has made this one; None: it is alone."""
    return _started


def finish() -> None:
    """Says that this process has done its part, so that its end harms no other."""
    if _lifeline is not None:
        _lifeline.finish()


def leave(code: int) -> None:
    """Ends this process at once with an exit code, if it is one of several; else does nothing.

    For one that has failed. jax would have it wait minutes for the others to finish, which wait for
    it. So they are told, and end within two seconds; process 0 stays four at most.
    """
    if _lifeline is not None:
        _lifeline.fail(code)


def _call_roll(process: Process, timeout: float, agreed: str) -> dict[int, socket.socket]:
    """Process 0's part: waits for the others, and tells them all what became of it.

    Returns the connections to them, by index. The port is free again, for jax.
    """
    deadline = time.monotonic() + timeout
    try:
        server = _listen(*process.address)
    except OSError as error:
        raise InputError(
            f"{process.name} can't listen at --coordinator={process.coordinator}: "
            f"{error.strerror or error}; it has to be an address of this machine, and a free port"
        ) from error
    seen: dict[int, socket.socket] = {}
    listening: list[socket.socket] = []  # those seen, and whom there is an objection to
    problem = ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        while not problem and len(seen) < process.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                problem = _missing(process, seen, timeout)
                break
            stack.enter_context(connection)
            hello = _receive(connection, _HELLO_SECONDS)
            if not isinstance(hello.get("process"), int):
                continue  # somebody else, who tries ports
            seen = {index: other for index, other in seen.items() if not _has_gone(other)}
            listening.append(connection)
            problem = _objection(process, agreed, hello, seen)
            seen[hello["process"]] = connection
        for other in listening:
            with contextlib.suppress(OSError):
                other.sendall(json.dumps({"problem": problem}).encode() + b"\n")
        if problem:
            raise InputError(problem)
        # A copy outlives the stack, which closes all else.
        return {index: other.dup() for index, other in seen.items()}


def _answer_roll(process: Process, timeout: float, agreed: str) -> dict[int, socket.socket]:
    """Any other process's part: calls process 0 until it answers, and hears that all are there.

    Returns the connection to process 0, by its index.
    """
    deadline = time.monotonic() + timeout
    hello = {"process": process.index, "count": process.count, "agreed": agreed}
    reason = "nobody listens there"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(process.address, timeout=left) as connection:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                answer = _receive(connection, left + _GRACE_SECONDS)
                if answer.get("problem") == "":
                    return {0: connection.dup()}
            if answer.get("problem"):
                raise InputError(answer["problem"])
            reason = "what listens there has not said that all have come"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(_RETRY_SECONDS)
    raise InputError(
        f"{process.count} processes were expected; {process.name} did not meet process 0 at "
        f"{process.coordinator} in {timeout:g} seconds ({reason}). Is process 0 running, with the "
        "same --coordinator and --num_processes, and may this machine reach that port? "
        "--process_timeout=SECONDS waits longer"
    )


def _missing(process: Process, seen: Mapping[int, Any], timeout: float) -> str:
    absent = [str(i) for i in range(1, process.count) if i not in seen]
    shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return (
        f"{process.count} processes were expected, {len(seen) + 1} came in {timeout:g} seconds: "
        f"missing {shown} (of 0 to {process.count - 1}). Start this program on every host; what "
        f"stopped one is in its own log. They meet at {process.coordinator}. "
        "--process_timeout=SECONDS waits longer; on a pod, JAX_PLATFORMS=cpu runs on one host alone"
    )


def _objection(
    process: Process, agreed: str, hello: Mapping[str, Any], seen: Mapping[int, Any]
) -> str:
    """Why a process that has come can't take part, or an empty string."""
    index, count = hello["process"], hello.get("count")
    if count != process.count:
        return (
            f"process {index} was started with --num_processes={count}, process 0 with "
            f"{process.count}: give all the same"
        )
    if index in seen or not 0 < index < process.count:
        return f"two processes were started with --process_id={index}: give each its own"
    if hello.get("agreed") != agreed:
        return (
            f"process {index} has another configuration than process 0: start all with the same "
            "gin files and flags (--dry_run prints what a process would run)"
        )
    return ""


def _listen(host: str, port: int) -> socket.socket:
    """On all addresses, as jax will, since a name may not be this machine's own; or on loopback."""
    if _is_loopback(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """One line of JSON; an empty dict if none comes, or another kind of text."""
    connection.settimeout(seconds)
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 4096:
            if not (piece := connection.recv(4096)):
                break
            text += piece
        found = json.loads(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_gone(connection: socket.socket) -> bool:
    """Whether the other end, which has nothing to say until it hears, has closed."""
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_HELLO_SECONDS)
