"""The commands of README.md and docs/, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests import xla

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md")
_PRELUDE = """
set -euo pipefail
python() {{
  case "$1 ${{2-}}" in
    {cases}
    *) "$PYTHON" "$@" ;;
  esac
}}
"""


def blocks(page: str | Path, language: str = "bash") -> list[str]:
    """The page's blocks of code; `page` is a path in the project."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def shell(
    commands: str, folder: Path, cases: str = "", timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """Runs a page's commands in `folder`, with the project's scripts beside.

    `cases` are cases of bash on a program and its first argument, for what is to be cut short:

        scripts/train.py*) "$PYTHON" "$@" --gin.STEPS=2 ;;
    """
    scripts = folder / "scripts"
    if not scripts.exists():
        scripts.symlink_to(ROOT / "scripts")
    return subprocess.run(
        ["bash", "-c", _PRELUDE.format(cases=cases) + commands],
        cwd=folder,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla.flags(devices=1),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run(commands: str, folder: Path, cases: str = "", timeout: int = 600) -> str:
    """What the commands print; an AssertionError with their last words if one of them fails."""
    done = shell(commands, folder, cases, timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def train_for(steps: int, flags: str = "") -> str:
    """A case for `shell`: training cut short."""
    return f'scripts/train.py*) "$PYTHON" "$@" --gin.STEPS={steps} {flags} ;;'
