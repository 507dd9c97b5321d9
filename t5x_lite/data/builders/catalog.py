"""The datasets that `scripts/prepare_data.py` builds, by name."""

from __future__ import annotations

import os
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from t5x_lite.data.builders import bible, python_functions, seq2seq, word_pairs
from t5x_lite.data.sources import TfdsSource
from t5x_lite.types import InputError

DATASETS: dict[str, Any] = {
    **bible.DATASETS,
    "aclsum": seq2seq.Aclsum,
    "indico_po": seq2seq.IndicoPo,
    "chatterbot": seq2seq.Chatterbot,
    "docstrings": python_functions.Docstrings,
    **word_pairs.DATASETS,
}


def names() -> list[str]:
    """All datasets, those of several configs with each."""
    found = []
    for name, builder in DATASETS.items():
        configs = [config.name for config in builder.BUILDER_CONFIGS]
        found += [f"{name}/{config}" for config in configs] or [name]
    return found


def prepare(dataset: str, data_dir: str, *, wheels: str | None = None) -> dict[str, Any]:
    """Fetches and builds `dataset` under `data_dir`, unless it is there; returns a summary.

    `{"dataset": ..., "path": ..., "splits": {"train": records, ...}, "bytes": on disk}`. A
    dataset of several configs is named with one of them: `indico_po/fr`.

    The wheels go to `wheels`, by default `data_dir/wheels`. TFDS builds in a temporary folder and
    renames it, so a build that was killed leaves nothing that could be taken for a dataset; one
    that is prepared is not built again, and needs no network.

    Raises InputError for an unknown dataset and for wheels that can't be had.
    """
    if dataset not in names():
        raise InputError(f"dataset '{dataset}' is unknown; expected one of: {', '.join(names())}")
    data_dir = os.path.expanduser(data_dir)
    source = TfdsSource(dataset, data_dir)
    try:
        _ = source.splits
    except InputError:
        logging.info("Preparing %s in %s", dataset, data_dir)
        tfds.disable_progress_bar()
        name, _, config = dataset.partition("/")
        options = {"config": config} if config else {}
        builder = DATASETS[name](data_dir=data_dir, wheels=wheels, **options)
        builder.download_and_prepare(file_format="array_record")
        source = TfdsSource(dataset, data_dir)
    path = source.path
    return {
        "dataset": dataset,
        "path": path,
        "splits": {split: len(source.open(split)) for split in source.splits},
        "bytes": sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)),
    }
