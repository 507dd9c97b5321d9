"""Times starts of a run: seconds from the command to its first step, and what was compiled.

    python benchmarks/start.py --gin_file=runs/demo_t5.gin          # needs the demo's data
    python benchmarks/start.py --gin_file=runs/demo_t5.gin --gin_file=models/t5_1_1_small.gin

Three starts of the same run, each a process of its own: the first with an empty cache of compiled
programs, the second with the first's, and one that goes on from the second's checkpoint. All read
the library's bytecode, as Python keeps it unless told not to. Nothing here is asserted. Flags that
it doesn't know go to scripts/train.py.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
# What the loop says -> what was just done.
MARKS = (
    (r"^(Starting|Resuming) ", "imports, data, parameters"),
    (r"; compiling", "first batch"),
    (r"^  compiled in", "step compiled or read"),
    (r"^step 0 ", "evaluation at step 0"),
    (r"^step \d+/", "first step done"),
)
CPU = "CPU-seconds, all of it"
PROGRAMS = (
    "programs read whole",
    "others, lowered",
    "of these from jax's cache",
    "seconds for these",
)

_STEPS = flags.DEFINE_integer("steps", 3, "Steps of each start.")

# The program itself, and at its end a line on standard error with what became of its programs.
CHILD = """
import runpy, sys
import jax

asked, read, whole = [], [], []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: name.endswith("/backend_compile_duration") and asked.append(seconds))
jax.monitoring.register_event_listener(
    lambda name, **_: name.endswith("/cache_hits") and read.append(name))
jax.monitoring.register_event_listener(
    lambda name, **_: name == "/t5x_lite/programs/read" and whole.append(name))
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    counts = len(whole), len(asked), len(read)
    print("programs:", *counts, f"{sum(asked):.2f}", file=sys.stderr)
"""


def start(arguments: list[str], cache: str) -> tuple[dict[str, float], str]:
    """Seconds from the command to each mark, and of the programs the numbers of `PROGRAMS`.

    The last time is of all threads until the process ended, a few steps later.
    """
    began, before = time.monotonic(), _cpu_seconds()
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, str(ROOT / "scripts" / "train.py"), *arguments],
        env={**_environment(), "PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": cache},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    found: dict[str, float] = {}
    programs, said = "", []
    for line in child.stderr:
        now = time.monotonic() - began
        said.append(line)
        for pattern, name in MARKS:
            if name not in found and re.search(pattern, line):
                found[name] = now
        if line.startswith("programs: "):
            programs = line.split(maxsplit=1)[1].strip()
    if child.wait() != 0:
        sys.exit("".join(said[-20:]))
    found[CPU] = _cpu_seconds() - before
    return found, programs


def _environment() -> dict[str, str]:
    """This process's, without what would have each start compile a fresh clone's sources anew."""
    found = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**found, "PYTHONPATH": os.pathsep.join([str(ROOT), found.get("PYTHONPATH", "")])}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: list[str]) -> None:
    console = Console(width=max(Console().width, 100))
    # Writes the bytecode.
    warm = [sys.executable, str(ROOT / "scripts" / "train.py"), "--help"]
    subprocess.run(warm, env=_environment(), stdout=subprocess.DEVNULL, check=False)
    with tempfile.TemporaryDirectory() as folder:
        cache = os.path.join(folder, "cache")
        given = [*argv[1:], "--log_period=1"]
        steps = _STEPS.value
        starts = {
            "first": ("a", steps),
            "second": ("b", steps),
            "going on": ("b", 2 * steps),
        }
        found = {
            name: start([*given, f"--model_dir={folder}/{run}", f"--total_steps={total}"], cache)
            for name, (run, total) in starts.items()
        }
        size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    table = Table(title="Seconds from the command")
    table.add_column("to")
    for name in found:
        table.add_column(name, justify="right")
    for mark in (*(name for _, name in MARKS), CPU):
        values = (times.get(mark) for times, _ in found.values())
        table.add_row(mark, *("" if value is None else f"{value:.2f}" for value in values))
    for index, what in enumerate(PROGRAMS):
        table.add_row(what, *(programs.split()[index] for _, programs in found.values()))
    console.print(table)
    console.print(f"The cache holds {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
