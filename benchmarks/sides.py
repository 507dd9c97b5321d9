"""One side of a comparison: a program in a process of its own, which computes only when asked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Side:
    """A program of this folder that greets with a line of JSON, and answers each line with one.

    Between two questions it waits for its input, so that only the side that was asked computes.
    """

    def __init__(self, python: str, program: str, env: Mapping[str, str] | None = None):
        self._command = [python, str(Path(__file__).with_name(program))]
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.hello = self._read()

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._read()

    def peak(self) -> float:
        """GiB that were resident at most; NaN where the system does not say (all but Linux)."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        except FileNotFoundError:
            return math.nan
        # Not getrusage: a new program inherits its starter's peak there.
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            command = " ".join(self._command)
            sys.exit(
                f"error: {command} ended; its own message is above (does its Python have all?)"
            )
        found: dict[str, Any] = json.loads(line)
        return found
