"""The processes of one run, started together on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests import xla

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def flags(port: int, count: int, index: int) -> list[str]:
    """The flags that say which process of a run it is; of one alone, none."""
    if count == 1:
        return []
    return [
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={count}",
        f"--process_id={index}",
    ]


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[str]], folder: Path, devices: int
) -> Iterator[list[subprocess.Popen[str]]]:
    """Python with each of these arguments, in `folder`; none outlives the block.

    `devices` are those of all processes together.
    """
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices // len(commands)),
    }
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                cwd=folder,
            )
            stack.enter_context(process)
            stack.callback(process.kill)  # comes before the wait that ends its context
            processes.append(process)
        yield processes


def run(
    commands: Sequence[Sequence[str]], folder: Path, devices: int, timeout: float = 600
) -> list[subprocess.CompletedProcess[str]]:
    """How each of these processes ended, all started together."""
    with started(commands, folder, devices) as processes:
        ended = []
        for process in processes:
            stdout, stderr = process.communicate(timeout=timeout)
            ended.append(
                subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
            )
        return ended
