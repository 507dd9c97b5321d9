"""The fixtures of Hugging Face's models: where they are, and what they expect.

`python tests/fixtures/make_hf.py` made them; it says how to make them anew.
"""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.interop import ARCHITECTURES
from t5x_lite.interop.name_maps import Architecture

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "hf"
NAMES = sorted(path.name for path in FOLDER.iterdir())
SHARED_WEIGHTS = {
    f"llama_{scaling}": "llama_tied" for scaling in ("linear", "dynamic", "llama3", "yarn")
}


def block(language: str) -> str:
    """The code of docs/add_a_model.md."""
    page = (FOLDER.parents[2] / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)
    return found


@functools.cache
def architectures() -> tuple[Architecture, ...]:
    """Those that the library knows, and the one that the page adds."""
    names: dict[str, Any] = {}
    exec(block("python"), names)
    return (*ARCHITECTURES, names["GPT_NEOX"])


def directory(name: str, scratch: Path) -> Path:
    """A fixture's folder; one that shares another's weights is put together in `scratch`."""
    if name not in SHARED_WEIGHTS:
        return FOLDER / name
    made = scratch / name
    made.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FOLDER / name / "config.json", made / "config.json")
    weights = FOLDER / SHARED_WEIGHTS[name] / "model.safetensors"
    shutil.copyfile(weights, made / "model.safetensors")
    return made


def expected(name: str) -> dict[str, np.ndarray]:
    """A batch under our keys; `outputs`; and under `greedy_...` a prompt and what follows it."""
    with np.load(FOLDER / name / "expected.npz") as file:
        return dict(file)
